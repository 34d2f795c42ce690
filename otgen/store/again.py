"""Facts that hold on the present template too: which they may be, and how they are inserted once more. Nothing is changed."""

from __future__ import annotations

import sqlite3
from typing import Any

from otgen.store.records import PastTrial

_PROBLEM = ("gpu", "family", "n", "m", "d", "dtype", "flags")
_KEY = " AND ".join(f"{{0}}.{column} = :{column}" for column in _PROBLEM)

OUTDATED = f"""
SELECT t.id, t.variant, t.compile, c.source_hash, v.triton
FROM trial t JOIN compile c ON c.id = t.compile JOIN environment v ON v.id = t.environment
WHERE {_KEY.format("t")}
      AND t.template_hash IN (SELECT w.template_hash FROM winner w
                              WHERE {_KEY.format("w")} AND w.template_hash <> :template_hash)
ORDER BY t.created_at, t.id
"""

PRESENT = f"SELECT p.variant FROM trial p WHERE {_KEY.format('p')} AND p.template_hash = :template_hash"

CARRIED = "carried over from trial"
"""What the message of a trial says that repeats one of an earlier template."""

_TRIAL = f"""
INSERT INTO trial (environment, {", ".join(_PROBLEM)}, variant, template_hash, status, message, seed, compile)
SELECT environment, {", ".join(_PROBLEM)}, :variant, :template_hash, status,
       CASE WHEN instr(message, '{CARRIED}') THEN substr(message, 1, instr(message, '{CARRIED}') - 1)
            WHEN message = '' THEN '' ELSE message || '; ' END
       || '{CARRIED} ' || id || ' of template ' || template_hash || ', whose kernels are the same', seed, :compile
FROM trial WHERE id = :trial
"""

_COMPILED = ("source_hash", "registers", "spills", "shared_bytes", "instructions")

_COMPILE = f"""
INSERT OR IGNORE INTO compile (key, {", ".join(_COMPILED)}) SELECT :key, {", ".join(_COMPILED)} FROM compile WHERE id = :compile
"""

_MEASURED = (
    *("protocol", "median_us", "p20_us", "p80_us", "samples_us", "default_us"),
    *("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w"),
)

_FACTS = tuple(
    f"INSERT INTO {table} (trial, {', '.join(columns)}) SELECT :again, {', '.join(columns)} FROM {table} WHERE trial = :trial"
    for table, columns in {
        "prediction": ("us", "terms"),
        "measurement": _MEASURED,
        "accuracy": ("metric", "value", "budget"),
    }.items()
)


def insert_again(connection: sqlite3.Connection, trial: PastTrial, compile_key: str | None, template_hash: str) -> None:
    """Insert what is known of `trial` under `template_hash`, inside the transaction the caller has opened.

    Its phases took no time again and have none. compile_key: of its binary, whose row is copied; None leaves it the row it has.
    """
    values: dict[str, Any] = {"trial": trial.id, "compile": trial.compile, "template_hash": template_hash}
    values["variant"] = trial.variant.json  # complete; the old row may lack an axis
    if compile_key is not None:
        connection.execute(_COMPILE, {"key": compile_key, "compile": trial.compile})
        (values["compile"],) = connection.execute("SELECT id FROM compile WHERE key = ?", (compile_key,)).fetchone()
    again = connection.execute(_TRIAL, values).lastrowid
    for statement in _FACTS:
        connection.execute(statement, {"again": again, "trial": trial.id})
