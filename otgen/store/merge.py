"""Several databases made one: the union of their facts, decided anew, and what became of decisions that disagree."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otgen.errors import UsageError
from otgen.problem import Problem
from otgen.store.connect import still
from otgen.store.decide import REFUTES, RESOLUTION, by_share, standing, sure_time
from otgen.store.decisions import problem_key, stored_trials
from otgen.store.facts import Fact
from otgen.store.publish import write_database
from otgen.store.reading import Contents, read_database
from otgen.store.records import StoredTrial, Winner
from otgen.store.union import known_facts
from otgen.store.winners import select


@dataclass(frozen=True, slots=True)
class Claim:
    """What one file had decided."""

    path: Path
    variant: str
    evidence: str
    us: float
    interval_us: tuple[float, float] | None

    @property
    def text(self) -> str:
        interval = f" ({_interval(self.interval_us)})" if self.interval_us else ""
        return f"{self.path}: {self.us:.4g} µs {self.evidence}{interval}, {self.variant}"


@dataclass(frozen=True, slots=True)
class Conflict:
    """Files that had decided differently on a problem, the variant that has it now ("" for none), and why."""

    problem: Problem
    gpu: str
    precision: str
    claims: Sequence[Claim]
    won: str
    why: str


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made: the facts that each file brought and no file before it had, the winners, the conflicts."""

    added: dict[Path, int]
    winners: Sequence[Winner]
    conflicts: Sequence[Conflict]
    refused: Sequence[str]


def merge(sources: Sequence[Path], out: Path, *, replace: bool) -> Merged:
    """Write the union of `sources`, which are only read, to `out`.

    Raises StoreError when a source cannot be used or `out` cannot be written (`otgen.store.publish.new_file`), UsageError when
    `out` is a source. A row that is not sound is left out, and `Merged.refused` says why.
    """
    for path in sources:
        if path.exists() and out.exists() and path.samefile(out):
            raise UsageError(
                f"expected a new file for the union; {out} is one of its sources, which are never changed; name another"
            )
    found = [read_database(path) for path in sources]
    added: dict[Path, int] = dict.fromkeys(sources, 0)
    first: dict[str, tuple[str, int, str, Fact]] = {}
    for contents in found:
        for number, fact in contents.facts.items():
            identity = fact.identity
            added[contents.path] += identity not in first
            placed = fact.created_at, number, identity, fact
            first[identity] = min(placed, first.get(identity, placed), key=lambda place: place[:3])
    write_database([fact for *_, fact in sorted(first.values(), key=lambda place: place[:3])], out, replace=replace)
    with still(out) as connection:
        winners = select(connection, out, {})
        conflicts = _conflicts(found, winners, connection)
    return Merged(added, winners, conflicts, [sentence for contents in found for sentence in contents.refused])


def _conflicts(found: Sequence[Contents], winners: Iterable[Winner], connection: sqlite3.Connection) -> list[Conflict]:
    claimed: dict[Any, list[tuple[Contents, Winner]]] = {}
    for contents in found:
        for winner in contents.winners:
            claimed.setdefault(winner.key, []).append((contents, winner))
    now = {winner.key: winner for winner in winners}
    disagreed = {key: rows for key, rows in claimed.items() if len({winner.variant for _, winner in rows}) > 1}
    known = known_facts(connection) if disagreed else {}
    return [_settled(rows, now.get(key), known, connection) for key, rows in disagreed.items()]


def _settled(
    rows: Sequence[tuple[Contents, Winner]], now: Winner | None, known: Mapping[str, int], connection: sqlite3.Connection
) -> Conflict:
    problem, gpu, precision = rows[0][1].key
    templates = dict.fromkeys([winner.template_hash for _, winner in rows] + ([now.template_hash] if now else []))
    history = {
        template: stored_trials(connection, problem_key(problem, gpu) | {"template_hash": template}) for template in templates
    }
    trials = {trial.id: (template, trial) for template, stored in history.items() for trial in stored}
    claims, reasons = [], []
    for contents, winner in rows:
        template, trial = trials[known[contents.facts[winner.trial].identity]]
        claims.append(Claim(contents.path, winner.variant.text, winner.evidence, winner.us, trial.interval_us))
        if now is None or winner.variant != now.variant:
            reasons.append(_why(trials[now.trial] if now else None, (template, trial), history[template]))
    return Conflict(problem, gpu, precision, claims, now.variant.text if now else "", "; ".join(dict.fromkeys(reasons)))


def _why(won: tuple[str, StoredTrial] | None, lost: tuple[str, StoredTrial], history: Sequence[StoredTrial]) -> str:
    """Why the trial `lost` did not win; history: the trials on its template, oldest first."""
    template, trial = lost
    stands = standing(history).get(trial.variant)
    if stands is None:
        refuted = [later.status for later in history if later.variant == trial.variant and later.status in REFUTES]
        return f"a later {refuted[-1]} took back {_short(trial)}" if refuted else f"{_short(trial)} was not found right"
    if won is None:
        return "no trial stands"
    if won[0] != template:
        return f"{_short(trial)} was tuned on another template than the one taken"
    return _faster(
        won[1],
        stands,
        by_share(
            other
            for other in standing(history).values()
            if other.measured_us is not None and other.variant["precision"] == trial.variant["precision"]
        ),
    )


def _faster(won: StoredTrial, lost: StoredTrial, share: bool) -> str:
    if won.measured_us is None:
        assert won.predicted_us is not None
        assert lost.predicted_us is not None
        if lost.predicted_us > won.predicted_us * (1 + RESOLUTION):
            return f"the prediction of {_short(won)} is shorter"
        return (
            f"predictions within {RESOLUTION:.0%} are a tie, and {_short(won)} issues fewer instructions or ranks first otherwise"
        )
    if lost.measured_us is None:
        return "a measured time comes before a predicted one"
    if share:
        shares = f"{sure_time(won, True):.3g} against {sure_time(lost, True):.3g}"
        return f"timed in different environments: {_short(won)} takes the smaller share of its default's time, {shares}"
    assert won.interval_us is not None
    assert lost.interval_us is not None
    spans = f"{_interval(won.interval_us)} and {_interval(lost.interval_us)}"
    if won.interval_us[1] < lost.interval_us[0]:
        return f"the intervals of the medians, {spans}, do not overlap: {_short(won)} is faster"
    return f"the intervals of the medians, {spans}, overlap: {_short(won)} has the lower upper end"


def _short(trial: StoredTrial) -> str:
    us = trial.predicted_us if trial.measured_us is None else trial.measured_us
    return f"the {'predicted' if trial.measured_us is None else 'measured'} {us:.4g} µs" if us else "a trial"


def _interval(ends: tuple[float, float]) -> str:
    return f"95 %: {ends[0]:.4g} to {ends[1]:.4g} µs"
