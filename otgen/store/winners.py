"""Winners, read back: every row is data to be checked, never trusted."""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from otgen.precision import MODES
from otgen.problem import Problem, Value, Variant
from otgen.resources import resource
from otgen.store.connect import connect, errors_of
from otgen.store.records import EVIDENCE, TuningWarning, Winner

_SELECT = """
SELECT w.family, w.gpu, w.n, w.m, w.d, w.dtype, w.flags, w.precision, w.evidence, w.variant, w.predicted_us, w.measured_us,
       w.template_hash, w.trial, c.registers, c.spills, c.shared_bytes
FROM winner w LEFT JOIN trial t ON t.id = w.trial LEFT JOIN compile c ON c.id = t.compile
WHERE {match}
ORDER BY w.gpu, w.family, w.flags, w.dtype, w.n, w.m, w.d, coalesce(w.measured_us, w.predicted_us), w.precision
"""


def _warn(message: str) -> None:
    warnings.warn(message, TuningWarning, stacklevel=4)


def shipped() -> list[Path]:
    """The databases that come with otgen, one per GPU, named by its slug."""
    return sorted(resource("tuning_db").glob("*.db"))


def read_winners(
    path: Path, *, gpu: str | None = None, family: str | None = None, complain: Callable[[str], None] = _warn
) -> list[Winner]:
    """The winners in the file at `path`, opened read-only. A malformed row is skipped and `complain` is told.

    Raises StoreError when the file cannot be read.
    """
    with errors_of(path), closing(connect(path, readonly=True)) as connection:
        return select(connection, path, {"gpu": gpu, "family": family}, complain)


def select(
    connection: sqlite3.Connection, path: Path, match: Mapping[str, Any], complain: Callable[[str], None] = _warn
) -> list[Winner]:
    """The winners that an open connection to `path` gives; match: column → the value it must have, None for any."""
    winners = []
    wanted = {column: value for column, value in match.items() if value is not None}
    where = " AND ".join(f"w.{column} = :{column}" for column in wanted) or "TRUE"
    for row in connection.execute(_SELECT.format(match=where), wanted):
        try:
            winners.append(_winner(row, path))
        except (ValueError, TypeError) as error:
            complain(f"expected a winner in {path}; skipped the row {row[:9]}: {error}; tune that problem again")
    return winners


def _winner(row: tuple[Any, ...], path: Path) -> Winner:
    name, gpu, n, m, d, dtype, flags, precision, evidence, variant, predicted, measured, template, trial, *resources = row
    if not all(type(size) is int for size in (n, m, d)):
        raise ValueError("a size is not an integer")
    if not all(us is None or (isinstance(us, float) and 0 < us < float("inf")) for us in (predicted, measured)):
        raise ValueError("a time is not a positive number")
    axes = _object(variant)
    if precision not in MODES or axes.get("precision") != precision:
        raise ValueError(f"its variant does not have precision {precision!r}")
    if evidence not in EVIDENCE or (evidence == "measured") != (measured is not None) or (measured, predicted) == (None, None):
        raise ValueError(f"its evidence {evidence!r} does not agree with its times")
    problem = Problem(str(name), n, m, d, dtype, tuple(_object(flags).items()))
    registers, spills, shared_bytes = (value if isinstance(value, int) else None for value in resources)
    return Winner(
        problem,
        gpu,
        precision,
        evidence,
        Variant(axes),
        predicted,
        measured,
        registers,
        spills,
        shared_bytes,
        template,
        trial,
        path,
    )


def _object(text: str) -> dict[str, Value]:
    values = json.loads(text)
    if not isinstance(values, dict) or not all(type(value) in (int, str) for value in values.values()):
        raise ValueError(f"not an object of integers and strings: {text!r}")
    return values


def overlay(layers: Iterable[Iterable[Winner]], stale: Callable[[Winner], bool]) -> list[Winner]:
    """One winner per (problem, GPU, precision) from `layers`, the user's last.

    A row that is not stale comes before one that is, then stronger evidence before weaker (a prediction never hides a measurement),
    then a later layer before an earlier one.
    """

    def strength(winner: Winner) -> tuple[bool, int]:
        return not stale(winner), -EVIDENCE.index(winner.evidence)

    best: dict[Any, Winner] = {}
    for layer in layers:
        for winner in layer:
            if winner.key not in best or strength(winner) >= strength(best[winner.key]):
                best[winner.key] = winner
    return list(best.values())
