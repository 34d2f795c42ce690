"""Which of a problem's trials wins, one per precision mode: a pure function of the facts."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from otgen.problem import Variant
from otgen.store.records import StoredTrial

RESOLUTION = 0.03
"""Predictions closer than this, relatively, are a tie: of the kernels the one that issues fewer instructions wins."""

REFUTES = ("wrong_result", "illegal_access", "launch_error")
"""Statuses that take back an earlier ok of the same variant: the kernel itself is at fault, not the machine's load."""


def best_of(trials: Iterable[StoredTrial]) -> dict[str, StoredTrial]:
    """Precision mode → the winning trial, from trials given oldest first.

    Only a trial whose outputs were compared with float64 and found within their budgets can win. A measured one comes before a
    predicted one; then the shorter time, of predictions within RESOLUTION of the shortest the fewest instructions; then the smaller
    error, fewer registers, the earlier trial.
    """
    standing: dict[Variant, StoredTrial] = {}
    for trial in trials:
        if trial.status in REFUTES:
            standing.pop(trial.variant, None)
        elif trial.status == "ok" and trial.us is not None and trial.error is not None and trial.error <= 1:
            earlier = standing.get(trial.variant)
            if earlier is None or trial.measured_us is not None or earlier.measured_us is None:
                standing[trial.variant] = trial
    modes: dict[str, list[StoredTrial]] = {}
    for trial in sorted(standing.values(), key=_rank):
        modes.setdefault(str(trial.variant["precision"]), []).append(trial)
    return {mode: min(_ties(ranked), key=_issue) for mode, ranked in modes.items()}


def _ties(ranked: list[StoredTrial]) -> list[StoredTrial]:
    """The first of a mode's trials, and those that the model cannot tell from it."""
    first = ranked[0]
    if first.measured_us is not None or first.predicted_us is None:
        return [first]
    longest = (1.0 + RESOLUTION) * first.predicted_us
    return [trial for trial in ranked if trial.predicted_us is not None and trial.predicted_us <= longest]


def _issue(trial: StoredTrial) -> float:
    return inf if trial.issue_us is None else trial.issue_us


def _rank(trial: StoredTrial) -> tuple[bool, float, float, float, int]:
    return (
        trial.measured_us is None,
        inf if trial.us is None else trial.us,
        inf if trial.error is None else trial.error,
        inf if trial.registers is None else trial.registers,
        trial.id,
    )
