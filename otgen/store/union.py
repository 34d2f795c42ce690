"""Facts put into a database that does not have them yet, and what follows from them decided anew."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from otgen.errors import UsageError
from otgen.store.decisions import decide_anew, problem_key
from otgen.store.facts import PHASES, Fact, plain_key
from otgen.store.inserts import as_json, environment_id, insert, insert_learnt
from otgen.store.reading import present_hash, stored_facts
from otgen.store.records import Compiled


def known_facts(connection: sqlite3.Connection) -> dict[str, int]:
    """Identity → trial id of the facts that the database has. A row that no longer passes the checks equals none that does."""
    known = {}
    for number, row in stored_facts(connection):
        try:
            known[Fact.from_json(row).identity] = number
        except UsageError:
            continue
    return known


def unite(connection: sqlite3.Connection, facts: Iterable[Fact], known: dict[str, int]) -> int:
    """Insert the facts that are not `known`, which grows by them, and decide their problems anew; returns how many.

    Runs inside the transaction the caller has opened: all of it or nothing.
    """
    touched: dict[tuple[Any, ...], dict[str, Any]] = {}
    added = 0
    for fact in facts:
        identity = fact.identity
        if identity not in known:
            known[identity] = _insert_fact(connection, fact)
            key = problem_key(fact.trial.problem, fact.trial.gpu)
            touched[tuple(key.values())] = key | {"template_hash": present_hash(fact.trial.problem.family)}
            added += 1
    for key in touched.values():
        decide_anew(connection, key)
    return added


def _insert_fact(connection: sqlite3.Connection, fact: Fact) -> int:
    trial = fact.trial
    row = problem_key(trial.problem, trial.gpu) | {
        "created_at": fact.created_at,
        "environment": environment_id(connection, fact.environment),
        "variant": trial.variant.json,
        "template_hash": trial.template_hash,
        "status": trial.status,
        "message": trial.message,
        "seed": trial.seed,
        "compile": _compile(connection, fact.compiled) if fact.compiled else None,
    }
    number = insert(connection, "trial", row | {phase: getattr(trial, phase) for phase in PHASES})
    insert_learnt(connection, number, fact.prediction, fact.measurement, fact.accuracy)
    return number


def _compile(connection: sqlite3.Connection, compiled: Compiled) -> int:
    """The id of the compile row. Another binary of the same key gets the key and a digest of what it is: neither is lost."""
    row = asdict(compiled) | {"key": plain_key(compiled.key), "instructions": as_json(compiled.instructions)}
    content = tuple(row.values())[1:]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    for key in (row["key"], f"{row['key']}~{digest}"):
        insert(connection, "compile", row | {"key": key}, conflict="IGNORE")
        number, *known = connection.execute(f"SELECT id, {', '.join(row)} FROM compile WHERE key = ?", (key,)).fetchone()
        if tuple(known[1:]) == content:
            return int(number)
    raise AssertionError(f"two binaries of digest {digest}")
