"""The tables of the tuning database: their columns, what a row may hold, and the queries of its README."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from toy_family import HASH, put, variant

from otgen.errors import StoreError, UsageError
from otgen.problem import Problem
from otgen.store import STATUSES, Accuracy, Compiled, Measurement, Prediction, Store, Trial

pytestmark = pytest.mark.usefixtures("toy")

TABLES = {
    "environment": "id gpu driver torch triton ptxas otgen",
    "trial": "id created_at environment family gpu n m d dtype flags variant template_hash status message seed compile "
    "render_ms compile_ms verify_ms predict_ms measure_ms",
    "compile": "id key source_hash registers spills shared_bytes instructions",
    "measurement": "id trial protocol median_us p20_us p80_us samples_us default_us sm_clock_mhz memory_clock_mhz "
    "temperature_c power_w",
    "accuracy": "id trial metric value budget",
    "prediction": "id trial us terms",
    "winner": "family gpu n m d dtype flags precision evidence variant template_hash predicted_us measured_us trial",
}

SCHEMA = """\
CREATE TABLE environment (
    id INTEGER PRIMARY KEY,
    gpu TEXT NOT NULL,
    driver TEXT NOT NULL,
    torch TEXT NOT NULL,
    triton TEXT NOT NULL,
    ptxas TEXT NOT NULL,
    otgen TEXT NOT NULL,
    UNIQUE (gpu, driver, torch, triton, ptxas, otgen)
);
CREATE TABLE compile (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    source_hash TEXT NOT NULL,
    registers INTEGER NOT NULL CHECK (registers >= 0),
    spills INTEGER NOT NULL CHECK (spills >= 0),
    shared_bytes INTEGER NOT NULL CHECK (shared_bytes >= 0),
    instructions TEXT NOT NULL CHECK (json_valid(instructions))
);
CREATE TABLE trial (
    id INTEGER PRIMARY KEY,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    environment INTEGER NOT NULL REFERENCES environment (id),
    family TEXT NOT NULL,
    gpu TEXT NOT NULL,
    n INTEGER NOT NULL CHECK (n > 0),
    m INTEGER NOT NULL CHECK (m > 0),
    d INTEGER NOT NULL CHECK (d > 0),
    dtype TEXT NOT NULL,
    flags TEXT NOT NULL CHECK (json_valid(flags)),
    variant TEXT NOT NULL CHECK (json_valid(variant)),
    template_hash TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('ok', 'pruned', 'compile_error', 'resource', 'wrong_result', 'launch_error', 'illegal_access', 'timeout', 'oom', 'crashed', 'duplicate')),
    message TEXT NOT NULL,
    seed INTEGER,
    compile INTEGER REFERENCES compile (id),
    render_ms REAL CHECK (render_ms BETWEEN 0 AND 1e300),
    compile_ms REAL CHECK (compile_ms BETWEEN 0 AND 1e300),
    verify_ms REAL CHECK (verify_ms BETWEEN 0 AND 1e300),
    predict_ms REAL CHECK (predict_ms BETWEEN 0 AND 1e300),
    measure_ms REAL CHECK (measure_ms BETWEEN 0 AND 1e300)
);
CREATE INDEX trial_by_key ON trial (family, d, dtype, flags, template_hash, gpu, n, m);
CREATE TABLE prediction (
    id INTEGER PRIMARY KEY,
    trial INTEGER NOT NULL UNIQUE REFERENCES trial (id),
    us REAL NOT NULL CHECK (us > 0 AND us < 1e300),
    terms TEXT NOT NULL CHECK (json_valid(terms))
);
CREATE TABLE measurement (
    id INTEGER PRIMARY KEY,
    trial INTEGER NOT NULL UNIQUE REFERENCES trial (id),
    protocol TEXT NOT NULL,
    median_us REAL NOT NULL CHECK (median_us > 0 AND median_us < 1e300),
    p20_us REAL NOT NULL CHECK (p20_us > 0 AND p20_us <= median_us),
    p80_us REAL NOT NULL CHECK (p80_us >= median_us AND p80_us < 1e300),
    samples_us TEXT NOT NULL CHECK (json_valid(samples_us)),
    default_us REAL CHECK (default_us > 0 AND default_us < 1e300),
    sm_clock_mhz REAL,
    memory_clock_mhz REAL,
    temperature_c REAL,
    power_w REAL
);
CREATE TABLE accuracy (
    id INTEGER PRIMARY KEY,
    trial INTEGER NOT NULL REFERENCES trial (id),
    metric TEXT NOT NULL,
    value REAL CHECK (value BETWEEN 0 AND 1e300),
    budget REAL NOT NULL CHECK (budget > 0 AND budget < 1e300),
    UNIQUE (trial, metric)
);
CREATE TABLE winner (
    family TEXT NOT NULL,
    gpu TEXT NOT NULL,
    n INTEGER NOT NULL CHECK (n > 0),
    m INTEGER NOT NULL CHECK (m > 0),
    d INTEGER NOT NULL CHECK (d > 0),
    dtype TEXT NOT NULL,
    flags TEXT NOT NULL CHECK (json_valid(flags)),
    precision TEXT NOT NULL,
    evidence TEXT NOT NULL CHECK (evidence IN ('measured', 'ported', 'interpolated', 'predicted', 'default')),
    variant TEXT NOT NULL CHECK (json_valid(variant)),
    template_hash TEXT NOT NULL,
    predicted_us REAL CHECK (predicted_us > 0 AND predicted_us < 1e300),
    measured_us REAL CHECK (measured_us > 0 AND measured_us < 1e300),
    trial INTEGER NOT NULL REFERENCES trial (id),
    PRIMARY KEY (gpu, family, n, m, d, dtype, flags, precision),
    CHECK ((evidence = 'measured') = (measured_us IS NOT NULL)),
    CHECK (evidence <> 'predicted' OR predicted_us IS NOT NULL)
);"""  # noqa: E501


def schema_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name NOT LIKE '\\_sqlite%' ESCAPE '\\' ORDER BY rowid"
        )
        return ";\n".join(sql for (sql,) in rows) + ";"


def test_the_schema_is_this_one(path: Path) -> None:
    Store.open(path).close()
    assert schema_of(path) == SCHEMA


def test_the_tables_are_the_seven_nouns(path: Path) -> None:
    Store.open(path).close()
    with closing(sqlite3.connect(path)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert sorted(names) == sorted([*TABLES, "_sqlite_migrations"])
        for table, columns in TABLES.items():
            assert [row[1] for row in connection.execute(f"PRAGMA table_info({table})")] == columns.split()


def test_a_trial_comes_back_with_all_that_was_learnt(path: Path, problem: Problem) -> None:
    compiled = Compiled("key", "source", 128, 0, 49152, {"mufu": 1.0, "ffma": 2.5})
    with Store.open(path) as store:
        environment = store.environment({"gpu": "a100", "triton": "3.7.1"})
        assert store.environment({"triton": "3.7.1", "gpu": "a100"}) == environment
        trial = Trial(problem, "a100", variant(), "ok", HASH, seed=0, compile_ms=310.5)
        for _ in range(2):
            store.record(
                trial,
                environment=environment,
                compiled=compiled,
                prediction=Prediction(11.5, {"issue": 9.0}),
                measurement=Measurement("cold", 12.5, 12.0, 13.0, (12.0, 12.5, 13.0), default_us=40.0, power_w=310.0),
                accuracy=[Accuracy("out", 1e-5, 1e-4), Accuracy("rho", 5e-5, 1e-4)],
            )
        assert store.compiled("key") == compiled
        assert store.compiled("another") is None
        first, second = store.trials(problem, "a100")
    assert (first.variant, first.status, first.measured_us, first.predicted_us, first.us) == (variant(), "ok", 12.5, 11.5, 12.5)
    assert (first.error, first.registers, first.spills, first.shared_bytes) == (pytest.approx(0.5), 128, 0, 49152)
    assert second.id > first.id
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM compile").fetchone() == (1,)
        assert json.loads(connection.execute("SELECT samples_us FROM measurement").fetchone()[0]) == [12.0, 12.5, 13.0]


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_of_the_vocabulary_is_stored(path: Path, problem: Problem, status: str) -> None:
    with Store.open(path) as store:
        put(store, problem, status=status)
        assert [trial.status for trial in store.trials(problem, "a100")] == [status]


def test_a_row_outside_the_schema_is_refused_whole(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, predicted=1.0)
        with pytest.raises(StoreError, match=r"meets the schema .* CHECK constraint failed"):
            put(store, problem, status="fine")
        for us in (float("inf"), float("nan"), -1.0):
            with pytest.raises(StoreError, match=r"constraint failed: .*us"):
                put(store, problem, predicted=us)
        environment = store.environment({"gpu": "a100", "otgen": "test"})
        trial, terms = Trial(problem, "a100", variant(), "ok", HASH), {"overlap": float("nan")}
        with pytest.raises(StoreError, match="finite numbers"):
            store.record(trial, environment=environment, prediction=Prediction(1.0, terms))
        with pytest.raises(StoreError, match="FOREIGN KEY"):
            store.record(trial, environment=environment + 1)
        with pytest.raises(UsageError, match=r"unknown environment fact 'cuda'; known: driver, .*"):
            store.environment({"cuda": "13"})
        assert len(store.trials(problem, "a100")) == 1


def test_an_error_that_is_not_finite_is_stored_as_null(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, status="wrong_result", error=float("nan"))
        assert store.trials(problem, "a100")[0].error is None


def test_the_queries_of_the_readme_run(path: Path, problem: Problem) -> None:
    readme = (Path(__file__).parent.parent / "tuning_db" / "README.md").read_text(encoding="utf-8")
    queries = re.findall(r"```sql\n(.*?)```", readme, re.DOTALL)
    assert len(queries) == 3
    with Store.open(path) as store:
        put(store, problem, predicted=1.0, measured=2.0)
        put(store, problem, status="timeout")
        store.decide(problem, "a100")
    with closing(sqlite3.connect(path)) as connection:
        assert all(connection.execute(query).fetchall() for query in queries)
    for table, columns in TABLES.items():
        assert f"`{table}`" in readme
        assert all(f"`{column}`" in readme for column in columns.split()), table
