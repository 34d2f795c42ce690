"""Decisions from the facts in an open database. Every function here runs inside the transaction the caller has opened."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from otgen.problem import Problem, Variant
from otgen.store.decide import best_of, median_interval
from otgen.store.records import StoredTrial

SAME_PROBLEM = "gpu = :gpu AND family = :family AND n = :n AND m = :m AND d = :d AND dtype = :dtype AND flags = :flags"

_TRIALS = f"""
SELECT t.id, t.variant, t.status, t.message, p.us, e.median_us,
       (SELECT max(a.value / a.budget) FROM accuracy a WHERE a.trial = t.id), c.registers, c.spills, c.shared_bytes,
       json_extract(p.terms, '$.issue'), t.environment, e.default_us, e.p20_us, e.p80_us, e.samples_us
FROM trial t LEFT JOIN compile c ON c.id = t.compile
     LEFT JOIN prediction p ON p.trial = t.id LEFT JOIN measurement e ON e.trial = t.id
WHERE {SAME_PROBLEM} AND template_hash = :template_hash
ORDER BY t.created_at, t.id
"""

_TEMPLATES = f"""
SELECT template_hash FROM trial WHERE {SAME_PROBLEM}
GROUP BY template_hash ORDER BY template_hash = :template_hash DESC, max(created_at) DESC, max(id) DESC
"""

_WINNER = f"""
INSERT OR {{conflict}} INTO winner
       (gpu, family, n, m, d, dtype, flags, precision, evidence, variant, template_hash, predicted_us, measured_us, trial)
VALUES ({", ".join(f":{name}" for name in ("gpu", "family", "n", "m", "d", "dtype", "flags"))},
        :precision, :evidence, :variant, :template_hash, :predicted_us, :measured_us, :trial)
"""


def problem_key(problem: Problem, gpu: str) -> dict[str, Any]:
    """The columns that tell a problem on a GPU from others."""
    return {
        "gpu": gpu,
        "family": problem.family,
        "n": problem.n,
        "m": problem.m,
        "d": problem.d,
        "dtype": problem.dtype,
        "flags": json.dumps(dict(problem.flags), separators=(",", ":")),
    }


def stored_trials(connection: sqlite3.Connection, key: Mapping[str, Any]) -> list[StoredTrial]:
    """The trials of a problem on one template, oldest first; key: `problem_key` and template_hash."""
    return [_trial(*row) for row in connection.execute(_TRIALS, key)]


def _trial(number: int, variant: str, *rest: Any) -> StoredTrial:
    *facts, p20_us, p80_us, samples_us = rest
    trial = StoredTrial(number, Variant(json.loads(variant)), *facts)
    if p20_us is None:
        return trial
    samples = json.loads(samples_us)
    return replace(trial, interval_us=median_interval(samples) if samples else (p20_us, p80_us))


def decide(connection: sqlite3.Connection, key: Mapping[str, Any]) -> None:
    """Decide a problem anew on one template. A mode that was tuned on another template only keeps its winner."""
    connection.execute(f"DELETE FROM winner WHERE {SAME_PROBLEM} AND template_hash = :template_hash", key)
    _write(connection, key, "REPLACE")


def decide_anew(connection: sqlite3.Connection, key: Mapping[str, Any]) -> None:
    """Decide a problem from all facts there are: on the template in `key`, what that leaves open on the latest ones before it."""
    connection.execute(f"DELETE FROM winner WHERE {SAME_PROBLEM}", key)
    for (template,) in connection.execute(_TEMPLATES, key).fetchall():
        _write(connection, {**key, "template_hash": template}, "IGNORE")


def _write(connection: sqlite3.Connection, key: Mapping[str, Any], conflict: str) -> None:
    for precision, trial in best_of(stored_trials(connection, key)).items():
        row = {
            "precision": precision,
            "evidence": "predicted" if trial.measured_us is None else "measured",
            "variant": trial.variant.json,
            "predicted_us": trial.predicted_us,
            "measured_us": trial.measured_us,
            "trial": trial.id,
        }
        connection.execute(_WINNER.format(conflict=conflict), {**key, **row})
