"""The schema, as a sequence of migrations: names are never changed and steps never edited once released, only appended."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from otgen.errors import StoreError
from otgen.store.records import EVIDENCE, STATUSES


def _among(column: str, values: tuple[str, ...]) -> str:
    """A closed vocabulary. Names that grow with otgen (families, dtypes, precision modes) are checked by the reader instead."""
    return f"CHECK ({column} IN ({', '.join(repr(value) for value in values)}))"


_KEY_COLUMNS = """\
    family TEXT NOT NULL,
    gpu TEXT NOT NULL,
    n INTEGER NOT NULL CHECK (n > 0),
    m INTEGER NOT NULL CHECK (m > 0),
    d INTEGER NOT NULL CHECK (d > 0),
    dtype TEXT NOT NULL,
    flags TEXT NOT NULL CHECK (json_valid(flags)),"""

_FINITE = "1e300"
"""SQLite stores infinity; every time must lie below this."""

FACTS_AND_WINNERS = (
    """\
CREATE TABLE environment (
    id INTEGER PRIMARY KEY,
    gpu TEXT NOT NULL,
    driver TEXT NOT NULL,
    torch TEXT NOT NULL,
    triton TEXT NOT NULL,
    ptxas TEXT NOT NULL,
    otgen TEXT NOT NULL,
    UNIQUE (gpu, driver, torch, triton, ptxas, otgen)
)""",
    """\
CREATE TABLE compile (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    source_hash TEXT NOT NULL,
    registers INTEGER NOT NULL CHECK (registers >= 0),
    spills INTEGER NOT NULL CHECK (spills >= 0),
    shared_bytes INTEGER NOT NULL CHECK (shared_bytes >= 0),
    instructions TEXT NOT NULL CHECK (json_valid(instructions))
)""",
    f"""\
CREATE TABLE trial (
    id INTEGER PRIMARY KEY,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    environment INTEGER NOT NULL REFERENCES environment (id),
{_KEY_COLUMNS}
    variant TEXT NOT NULL CHECK (json_valid(variant)),
    template_hash TEXT NOT NULL,
    status TEXT NOT NULL {_among("status", STATUSES)},
    message TEXT NOT NULL,
    seed INTEGER,
    compile INTEGER REFERENCES compile (id),
    render_ms REAL CHECK (render_ms BETWEEN 0 AND {_FINITE}),
    compile_ms REAL CHECK (compile_ms BETWEEN 0 AND {_FINITE}),
    verify_ms REAL CHECK (verify_ms BETWEEN 0 AND {_FINITE}),
    predict_ms REAL CHECK (predict_ms BETWEEN 0 AND {_FINITE}),
    measure_ms REAL CHECK (measure_ms BETWEEN 0 AND {_FINITE})
)""",
    "CREATE INDEX trial_by_key ON trial (family, d, dtype, flags, template_hash, gpu, n, m)",
    f"""\
CREATE TABLE prediction (
    id INTEGER PRIMARY KEY,
    trial INTEGER NOT NULL UNIQUE REFERENCES trial (id),
    us REAL NOT NULL CHECK (us > 0 AND us < {_FINITE}),
    terms TEXT NOT NULL CHECK (json_valid(terms))
)""",
    f"""\
CREATE TABLE measurement (
    id INTEGER PRIMARY KEY,
    trial INTEGER NOT NULL UNIQUE REFERENCES trial (id),
    protocol TEXT NOT NULL,
    median_us REAL NOT NULL CHECK (median_us > 0 AND median_us < {_FINITE}),
    p20_us REAL NOT NULL CHECK (p20_us > 0 AND p20_us <= median_us),
    p80_us REAL NOT NULL CHECK (p80_us >= median_us AND p80_us < {_FINITE}),
    samples_us TEXT NOT NULL CHECK (json_valid(samples_us)),
    default_us REAL CHECK (default_us > 0 AND default_us < {_FINITE}),
    sm_clock_mhz REAL,
    memory_clock_mhz REAL,
    temperature_c REAL,
    power_w REAL
)""",
    f"""\
CREATE TABLE accuracy (
    id INTEGER PRIMARY KEY,
    trial INTEGER NOT NULL REFERENCES trial (id),
    metric TEXT NOT NULL,
    value REAL CHECK (value BETWEEN 0 AND {_FINITE}),
    budget REAL NOT NULL CHECK (budget > 0 AND budget < {_FINITE}),
    UNIQUE (trial, metric)
)""",
    f"""\
CREATE TABLE winner (
{_KEY_COLUMNS}
    precision TEXT NOT NULL,
    evidence TEXT NOT NULL {_among("evidence", EVIDENCE)},
    variant TEXT NOT NULL CHECK (json_valid(variant)),
    template_hash TEXT NOT NULL,
    predicted_us REAL CHECK (predicted_us > 0 AND predicted_us < {_FINITE}),
    measured_us REAL CHECK (measured_us > 0 AND measured_us < {_FINITE}),
    trial INTEGER NOT NULL REFERENCES trial (id),
    PRIMARY KEY (gpu, family, n, m, d, dtype, flags, precision),
    CHECK ((evidence = 'measured') = (measured_us IS NOT NULL)),
    CHECK (evidence <> 'predicted' OR predicted_us IS NOT NULL)
)""",
)

STEPS = {"0001_facts_and_winners": FACTS_AND_WINNERS}
"""Migration name → its statements, oldest first."""

_SET = "otgen"


def pending(connection: sqlite3.Connection, path: Path) -> list[str]:
    """The migrations that the database still needs; all of them when it is empty. Writes nothing.

    Raises StoreError when the file belongs to another program or to a newer otgen.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return list(STEPS)
    if "_sqlite_migrations" not in tables:
        raise StoreError(f"expected an otgen tuning database; {path} is a SQLite file of another program; name another with --db")
    applied = [name for (name,) in connection.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = ?", (_SET,))]
    newer = [name for name in applied if name not in STEPS]
    if newer:
        raise StoreError(
            f"expected a database of schema {list(STEPS)[-1]} or older; {path} has {newer[-1]} from a newer otgen, and was left "
            "untouched; run `pip install --upgrade otgen` or name another file with --db"
        )
    if not applied:
        raise StoreError(f"expected an otgen tuning database; {path} is a SQLite file of another program; name another with --db")
    return [name for name in STEPS if name not in applied]


def migrate(connection: sqlite3.Connection) -> None:
    """Apply what is pending, inside the transaction the caller has opened."""
    from sqlite_utils import Database, Migrations

    migrations = Migrations(_SET)
    for name, statements in STEPS.items():

        def step(db: Database, statements: tuple[str, ...] = statements) -> None:
            for statement in statements:
                db.execute(statement)

        migrations(name=name)(step)
    migrations.apply(Database(connection))
