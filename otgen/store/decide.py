"""Which of a problem's trials wins, one per precision mode: a pure function of the facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, sqrt

from otgen.problem import Variant
from otgen.store.records import StoredTrial

RESOLUTION = 0.03
"""Predictions closer than this, relatively, are a tie: of the kernels the one that issues fewer instructions wins."""

REFUTES = ("wrong_result", "illegal_access", "launch_error")
"""Statuses that take back an earlier ok of the same variant: the kernel itself is at fault, not the machine's load."""

_NORMAL = 1.96
"""Standard deviations on either side of the mean that hold 95 % of a normal distribution."""


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Ends of a 95 % confidence interval of the median, free of assumptions on the distribution: two of the sorted samples.

    Their ranks are n/2 ± 0.98√n, the binomial distribution's quantiles by its normal approximation; below 6 samples, the extremes.
    """
    ordered = sorted(samples)
    below = max(1, int(len(ordered) / 2 - _NORMAL / 2 * sqrt(len(ordered)))) if len(ordered) >= 6 else 1
    return ordered[below - 1], ordered[-below]


def standing(trials: Iterable[StoredTrial]) -> dict[Variant, StoredTrial]:
    """Variant → the trial that speaks for it, from trials given oldest first.

    Only a trial whose outputs were compared with float64 and found within their budgets speaks. The latest does, but a prediction
    never takes a measurement's place; a later refutation (REFUTES) silences all before it.
    """
    found: dict[Variant, StoredTrial] = {}
    for trial in trials:
        if trial.status in REFUTES:
            found.pop(trial.variant, None)
        elif trial.status == "ok" and trial.us is not None and trial.error is not None and trial.error <= 1:
            earlier = found.get(trial.variant)
            if earlier is None or trial.measured_us is not None or earlier.measured_us is None:
                found[trial.variant] = trial
    return found


def best_of(trials: Iterable[StoredTrial]) -> dict[str, StoredTrial]:
    """Precision mode → the winning trial, from trials given oldest first.

    Of those that stand, a measured one comes before a predicted one. Measured ones go by the time that one can be sure of
    (`sure_time`), predicted ones by their time, where of those within RESOLUTION of the shortest the fewest instructions win; then
    the smaller error, fewer registers, the earlier trial.
    """
    modes: dict[str, list[StoredTrial]] = {}
    for trial in standing(trials).values():
        modes.setdefault(str(trial.variant["precision"]), []).append(trial)
    return {mode: _best(candidates) for mode, candidates in modes.items()}


def by_share(measured: Iterable[StoredTrial]) -> bool:
    """Whether measured trials are compared by their share of the default variant's time in the same batch.

    So it is where they come from several environments, whose times do not compare, and all have the default's time.
    """
    trials = list(measured)
    return len({trial.environment for trial in trials}) > 1 and all(trial.default_us for trial in trials)


def sure_time(trial: StoredTrial, share: bool) -> float:
    """The upper end of a measured trial's interval, in µs, or as a share of the default variant's time.

    Of two intervals that do not overlap it is in the order of the medians; of two that do, the narrower tends to win.
    """
    upper = inf if trial.interval_us is None else trial.interval_us[1]
    return upper / trial.default_us if share and trial.default_us else upper


def _best(candidates: Sequence[StoredTrial]) -> StoredTrial:
    measured = [trial for trial in candidates if trial.measured_us is not None]
    if measured:
        share = by_share(measured)
        return min(measured, key=lambda trial: (sure_time(trial, share), *_tail(trial)))
    ranked = sorted(candidates, key=lambda trial: (inf if trial.us is None else trial.us, *_tail(trial)))
    return min(_ties(ranked), key=_issue)


def _ties(ranked: list[StoredTrial]) -> list[StoredTrial]:
    """The first of a mode's predicted trials, and those that the model cannot tell from it."""
    longest = (1.0 + RESOLUTION) * (ranked[0].predicted_us or inf)
    return [trial for trial in ranked if trial.predicted_us is not None and trial.predicted_us <= longest]


def _issue(trial: StoredTrial) -> float:
    return inf if trial.issue_us is None else trial.issue_us


def _tail(trial: StoredTrial) -> tuple[float, float, int]:
    return (
        inf if trial.error is None else trial.error,
        inf if trial.registers is None else trial.registers,
        trial.id,
    )
