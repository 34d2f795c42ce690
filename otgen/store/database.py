"""The store: records trials, and decides winners from them."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from otgen.errors import StoreError, unknown
from otgen.families import family
from otgen.problem import Problem, Variant
from otgen.resources import template_hash
from otgen.store.again import OUTDATED, PRESENT, insert_again
from otgen.store.connect import connect, errors_of, transaction
from otgen.store.decisions import decide, problem_key, stored_trials
from otgen.store.facts import Fact
from otgen.store.inserts import as_json, environment_id, insert, insert_learnt
from otgen.store.records import (
    ENVIRONMENT,
    Accuracy,
    Compiled,
    Measurement,
    PastTrial,
    Prediction,
    StoredTrial,
    Trial,
    Winner,
)
from otgen.store.union import known_facts, unite
from otgen.store.winners import select

_RELATIVES = """
SELECT t.variant
FROM trial t LEFT JOIN prediction p ON p.trial = t.id LEFT JOIN measurement e ON e.trial = t.id
WHERE family = :family AND d = :d AND dtype = :dtype AND flags = :flags AND gpu IN ({gpus}) AND status = 'ok'
      AND template_hash = :template_hash AND coalesce(e.median_us, p.us) IS NOT NULL
ORDER BY coalesce(e.median_us, p.us) / (1.0 * n * m)
"""

_CHECKED = """
SELECT t.id, a.metric, a.value, a.budget
FROM trial t JOIN accuracy a ON a.trial = t.id
WHERE t.variant = :variant AND t.family = :family AND t.d = :d AND t.dtype = :dtype AND t.flags = :flags
      AND t.template_hash = :template_hash AND t.status = 'ok' AND NOT EXISTS (SELECT 1 FROM measurement e WHERE e.trial = t.id)
ORDER BY t.id
"""

_KEEP_WINNERS_ONLY = (
    *(f"DELETE FROM {fact} WHERE trial NOT IN (SELECT trial FROM winner)" for fact in ("prediction", "measurement", "accuracy")),
    "DELETE FROM trial WHERE id NOT IN (SELECT trial FROM winner)",
    "DELETE FROM compile WHERE id NOT IN (SELECT compile FROM trial WHERE compile IS NOT NULL)",
    "DELETE FROM environment WHERE id NOT IN (SELECT environment FROM trial)",
)


class Store:
    """An open tuning database. Use as a context manager; every method raises StoreError and leaves what was stored intact."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path | str, *, readonly: bool = False) -> Store:
        """The database at `path`, created and migrated unless `readonly`. Raises StoreError (see `otgen.store.connect`)."""
        path = Path(path).expanduser()
        return cls(connect(path, readonly=readonly), path)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with errors_of(self.path), transaction(self._connection):
            yield

    def _query(self, sql: str, values: Mapping[str, Any]) -> list[Any]:
        with errors_of(self.path):
            return self._connection.execute(sql, values).fetchall()

    def environment(self, facts: Mapping[str, str]) -> int:
        """The id of the environment with these facts (names in `ENVIRONMENT`; one left out is empty), inserted when new.

        Raises UsageError for an unknown name.
        """
        for name in facts:
            if name not in ENVIRONMENT:
                raise unknown("environment fact", name, ENVIRONMENT)
        with self._transaction():
            return environment_id(self._connection, facts)

    def record(
        self,
        trial: Trial,
        *,
        environment: int,
        compiled: Compiled | None = None,
        prediction: Prediction | None = None,
        measurement: Measurement | None = None,
        accuracy: Iterable[Accuracy] = (),
    ) -> int:
        """Insert a trial and all that was learnt from it, in one transaction; returns the trial's id.

        A compile row is shared by all trials of its key. Raises StoreError when a value breaks the schema (a status outside the
        vocabulary, a time that is infinite or not positive); nothing of the trial is stored then.
        """
        row = asdict(trial)
        del row["problem"]
        row |= problem_key(trial.problem, trial.gpu) | {"variant": trial.variant.json, "environment": environment}
        with self._transaction():
            row["compile"] = self._compile_id(compiled) if compiled else None
            trial_id = insert(self._connection, "trial", row)
            insert_learnt(self._connection, trial_id, prediction, measurement, accuracy)
        return trial_id

    def _compile_id(self, compiled: Compiled) -> int:
        row = asdict(compiled) | {"instructions": as_json(compiled.instructions)}
        known = self._connection.execute("SELECT id FROM compile WHERE key = ?", (compiled.key,)).fetchone()
        return int(known[0]) if known else insert(self._connection, "compile", row)

    def compiled(self, key: str) -> Compiled | None:
        """What the compiler made of `key` the first time, or None when it has not been compiled."""
        rows = self._query(
            "SELECT key, source_hash, registers, spills, shared_bytes, instructions FROM compile WHERE key = :key", {"key": key}
        )
        if not rows:
            return None
        key, source_hash, registers, spills, shared_bytes, instructions = rows[0]
        return Compiled(key, source_hash, registers, spills, shared_bytes, json.loads(instructions))

    def trials(self, problem: Problem, gpu: str) -> list[StoredTrial]:
        """The trials of a problem for a GPU on the family's present template, oldest first: what a study is rebuilt from."""
        with errors_of(self.path):
            return stored_trials(self._connection, problem_key(problem, gpu) | {"template_hash": template_hash(problem.family)})

    def relatives(self, problem: Problem, gpus: Sequence[str]) -> list[Variant]:
        """Variants that worked on `gpus` for `problem`'s kind at any n and m, present template, least time per pair first."""
        places = ", ".join(f":gpu{number}" for number in range(len(gpus)))
        rows = self._query(
            _RELATIVES.format(gpus=places),
            problem_key(problem, "")
            | {"template_hash": template_hash(problem.family)}
            | {f"gpu{i}": gpu for i, gpu in enumerate(gpus)},
        )
        return list(dict.fromkeys(Variant(json.loads(row[0])) for row in rows))

    def checked(self, problem: Problem, variant: Variant) -> list[Accuracy]:
        """What the interpreter's check of `variant` found before, for whatever GPU, n and m: it looks at none of them. Else []."""
        rows = self._query(
            _CHECKED,
            problem_key(problem, "") | {"variant": variant.json, "template_hash": template_hash(problem.family)},
        )
        return [Accuracy(*row[1:]) for row in rows if row[0] == rows[0][0]]

    def decide(self, problem: Problem, gpu: str) -> list[Winner]:
        """Recompute the winners of a problem for a GPU from its trials, one per precision mode (rules in `otgen.store.decide`).

        A mode that was tuned on an earlier template only keeps its old winner, whose template_hash tells.
        """
        key = problem_key(problem, gpu) | {"template_hash": template_hash(problem.family)}
        with self._transaction():
            decide(self._connection, key)
        with errors_of(self.path):
            return select(self._connection, self.path, key)

    def outdated(self, problem: Problem, gpu: str) -> list[PastTrial]:
        """The compiled trials on the templates of a problem's stale winners, oldest first; no variant tried on the present one.

        A variant that lacks an axis which its family has got since comes with the value it then had (`Family.complete`).
        """
        key = problem_key(problem, gpu) | {"template_hash": template_hash(problem.family)}
        present = {variant for (variant,) in self._query(PRESENT, key)}
        complete = family(problem.family).complete
        past = [PastTrial(row[0], complete(problem, json.loads(row[1])), *row[2:]) for row in self._query(OUTDATED, key)]
        return [trial for trial in past if trial.variant.json not in present]

    def carry(self, gpu: str, trials: Mapping[Problem, Mapping[PastTrial, str | None]]) -> None:
        """Insert trials of earlier templates as ones of the present, and decide their problems anew: all of it or nothing.

        trials  those of each problem → the key of its binary on the present template, None to leave it the compile row it has;
                one that is not `outdated` any more, because another process was faster, is left out
        """
        with self._transaction():
            for problem, keys in trials.items():
                key = problem_key(problem, gpu) | {"template_hash": template_hash(problem.family)}
                for trial in self.outdated(problem, gpu):
                    if trial in keys:
                        insert_again(self._connection, trial, keys[trial], key["template_hash"])
                decide(self._connection, key)

    def add(self, facts: Iterable[Fact]) -> int:
        """Insert the facts that are not there yet, decide their problems anew, and return how many there were: all or nothing."""
        with self._transaction():
            return unite(self._connection, facts, known_facts(self._connection))

    def winners(self, gpu: str | None = None, family: str | None = None) -> list[Winner]:
        """The winners of this file, stale ones among them, ordered by GPU, problem and time."""
        with errors_of(self.path):
            return select(self._connection, self.path, {"gpu": gpu, "family": family})

    def snapshot(self, path: Path | str, *, winners_of: str | None = None, templates: Collection[str] = ()) -> None:
        """Write a compact copy that can be shipped and opened from read-only media; an old file at `path` is replaced at once.

        winners_of  a GPU: keep its winners and the facts behind them, leave out everything else
        templates   hashes of templates: of the winners keep those on one of them; none: all
        """
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with errors_of(unfinished):
                self._connection.execute("VACUUM INTO ?", (str(unfinished),))
                with closing(sqlite3.connect(unfinished, isolation_level=None)) as copy:
                    copy.execute("PRAGMA journal_mode = DELETE")
                    if winners_of is not None:
                        with transaction(copy):
                            copy.execute("DELETE FROM winner WHERE gpu <> ?", (winners_of,))
                            if templates:
                                kept = ", ".join("?" * len(templates))
                                copy.execute(f"DELETE FROM winner WHERE template_hash NOT IN ({kept})", tuple(templates))
                            for statement in _KEEP_WINNERS_ONLY:
                                copy.execute(statement)
                        copy.execute("VACUUM")
            unfinished.replace(path)
        except OSError as error:
            raise StoreError(f"expected a snapshot to be written to {path}; got: {error}; name another place") from error
        finally:
            unfinished.unlink(missing_ok=True)
