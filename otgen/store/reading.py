"""All facts of a file that somebody sent: a tuning database, or what `otgen export` wrote as JSON. Limits first, then every row."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from otgen.errors import StoreError, UsageError
from otgen.families import FAMILIES
from otgen.resources import template_hash
from otgen.store.connect import still
from otgen.store.facts import PHASES, SENSORS, Fact, misfit
from otgen.store.records import ENVIRONMENT, Winner
from otgen.store.rows import OPEN_ENDED, expected
from otgen.store.winners import select

MOST_BYTES = {"json": 1 << 26, "sqlite": 1 << 30}
"""The largest file of each kind that is looked into."""

MOST_TRIALS = 500_000

FORMAT, VERSION = "otgen trials", 1
"""What a JSON export says of itself in its fields ``format`` and ``version``."""

TABLES = ("environment", "compile", "trial", "prediction", "measurement", "accuracy", "winner")

_TRIAL = (
    *("created_at", "family", "gpu", "n", "m", "d", "dtype", "flags", "variant", "template_hash", "status", "message", "seed"),
    *PHASES,
)
_COMPILE = ("key", "source_hash", "registers", "spills", "shared_bytes", "instructions")
_PREDICTION = ("us", "terms")
_MEASUREMENT = ("protocol", "median_us", "p20_us", "p80_us", "samples_us", "default_us", *SENSORS)
_PARTS = (
    ("environment", "v", ENVIRONMENT),
    ("compile", "c", _COMPILE),
    ("prediction", "p", _PREDICTION),
    ("measurement", "e", _MEASUREMENT),
)

_FACTS = f"""
SELECT t.id, {", ".join(f"t.{name}" for name in _TRIAL)},
       {", ".join(f"{table}.id, " + ", ".join(f"{table}.{name}" for name in columns) for _, table, columns in _PARTS)}
FROM trial t LEFT JOIN environment v ON v.id = t.environment LEFT JOIN compile c ON c.id = t.compile
     LEFT JOIN prediction p ON p.trial = t.id LEFT JOIN measurement e ON e.trial = t.id
ORDER BY t.created_at, t.id
"""

_OPEN_ENDED = {"flags", "variant", "instructions", "terms", "samples_us"}


@dataclass(frozen=True, slots=True)
class Contents:
    """What was found in a file.

    facts    the number of the row (in a database the trial's id) → the fact, oldest first in a database
    winners  of a database: what it had decided itself;  refused  a sentence for each row that is not sound
    """

    path: Path
    facts: dict[int, Fact] = field(default_factory=dict)
    winners: list[Winner] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, number: int, row: object, *, strangers: bool) -> None:
        """Take the row, or say why not."""
        try:
            fact = Fact.from_json(row)
            reason = misfit(fact, present_hash(fact.trial.problem.family), strangers=strangers)
        except UsageError as error:
            reason = str(error)
        if reason:
            self.refused.append(f"row {number} of {self.path}: {reason}")
        else:
            self.facts[number] = fact

    def claim(self, winner: Winner) -> None:
        """Take a decision that agrees with the trial it rests on; that of a trial which was refused went with it."""
        if winner.trial in self.facts:
            trial = self.facts[winner.trial].trial
            if (trial.problem, trial.gpu, trial.variant, trial.template_hash) == (
                winner.problem,
                winner.gpu,
                winner.variant,
                winner.template_hash,
            ):
                self.winners.append(winner)
            else:
                self.refused.append(f"the winner of {winner.problem} in {self.path} is not the trial {winner.trial} it names")


def present_hash(family: str) -> str:
    """The hash of the family's present template; "" for a family this otgen does not know."""
    return template_hash(family) if family in FAMILIES else ""


def is_database(path: Path) -> bool:
    """Whether the file begins as SQLite's do. Raises StoreError for what is not a file that can be read."""
    if not path.is_file():
        raise StoreError(f"expected a file at {path}; found {'something else' if path.exists() else 'none'}; check the name")
    try:
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError as error:
        raise StoreError(f"expected a file that can be read at {path}; got: {error}; check its permissions") from error


def read_database(path: Path, *, strangers: bool = True) -> Contents:
    """The facts and winners of the database at `path`, which is opened read-only, checked whole, and runs no code of its own.

    strangers  whether families and GPUs that this otgen does not know are let in
    Raises StoreError for a file that is missing, too large, damaged, foreign, newer, or holds what no otgen writes.
    """
    with opened(path) as connection:
        contents = Contents(path)
        for number, row in stored_facts(connection):
            contents.add(number, row, strangers=strangers)
        for winner in select(connection, path, {}, contents.refused.append):
            contents.claim(winner)
    return contents


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection to the database at `path`, checked whole, that runs no code of its own; raises as `read_database`."""
    if path.is_file():
        _refuse_large(path, "sqlite")
    with still(path) as connection:
        _harden(connection, path)
        yield connection


def _harden(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("PRAGMA trusted_schema = OFF")
    if hasattr(connection, "setlimit"):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 16 * OPEN_ENDED)
    foreign = foreign_objects(connection)
    if foreign:
        raise StoreError(
            f"expected the plain tables of a tuning database; {path} holds {foreign[0]}, which otgen never makes; "
            "ask its sender for `otgen export --format json`"
        )
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise StoreError(f"expected an otgen tuning database; {path} is corrupt ({verdict}); ask for another copy")
    (trials,) = connection.execute("SELECT count(*) FROM trial").fetchone()
    if trials > MOST_TRIALS:
        raise StoreError(f"expected at most {MOST_TRIALS} trials; {path} has {trials}; ask for its winners alone")


def foreign_objects(connection: sqlite3.Connection) -> list[str]:
    """Triggers, views, virtual and missing tables: what would run when a table of the store is read or written."""
    objects = {name: (kind, sql or "") for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master")}
    found = [f"the {kind} {name[:64]!r}" for name, (kind, _) in objects.items() if kind in ("trigger", "view")]
    found += [f"the virtual table {name[:64]!r}" for name, (_, sql) in objects.items() if sql.upper().startswith("CREATE VIRTUAL")]
    return found + [f"no table {name}" for name in TABLES if objects.get(name, ("",))[0] != "table"]


def stored_facts(connection: sqlite3.Connection) -> Iterator[tuple[int, dict[str, Any]]]:
    """Trial id → the fact as `Fact.from_json` takes it, unchecked; oldest first."""
    accuracy: dict[int, list[dict[str, Any]]] = {}
    for trial, metric, value, budget in connection.execute("SELECT trial, metric, value, budget FROM accuracy ORDER BY trial, id"):
        accuracy.setdefault(trial, []).append({"metric": metric, "value": value, "budget": budget})
    for number, *values in connection.execute(_FACTS):
        row = {name: _parsed(name, value) for name, value in zip(_TRIAL, values)}
        place = len(_TRIAL)
        for part, _, columns in _PARTS:
            known, *content = values[place : place + 1 + len(columns)]
            row[part] = None if known is None else {name: _parsed(name, value) for name, value in zip(columns, content)}
            place += 1 + len(columns)
        yield number, row | {"accuracy": accuracy.get(number, [])}


def _parsed(name: str, value: Any) -> Any:
    """The JSON in a column that has it; text that is none is left as it is, for the check to refuse."""
    if name not in _OPEN_ENDED or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def read_json(path: Path) -> Contents:
    """The facts in a file that `otgen export --format json` wrote. Raises StoreError when the file as a whole is no such file."""
    _refuse_large(path, "json")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"expected JSON written by `otgen export`; {path} is none: {str(error)[:200]}; export it again") from error
    fields = document if isinstance(document, dict) else {}
    if fields.get("format") != FORMAT:
        raise StoreError(f"expected a file written by `otgen export --format json` or sqlite; {path} is another; export it again")
    if fields.get("version") != VERSION:
        raise StoreError(f"expected version {VERSION} of the format; {path} has another; run `pip install --upgrade otgen`")
    rows = fields.get("trials")
    if not isinstance(rows, list) or len(rows) > MOST_TRIALS:
        raise StoreError(f"expected a list of at most {MOST_TRIALS} trials in {path}; found none; export it again")
    contents = Contents(path)
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            row.pop("winner", None)  # decisions are made anew
        contents.add(number, row, strangers=False)
    return contents


def _no_constant(name: str) -> None:
    raise expected("finite numbers", name)


def _refuse_large(path: Path, kind: str) -> None:
    size = path.stat().st_size
    if size > MOST_BYTES[kind]:
        raise StoreError(f"expected at most {MOST_BYTES[kind]:,} bytes of {kind}; {path} has {size:,}; share its winners alone")
