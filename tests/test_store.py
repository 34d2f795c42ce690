"""The tuning database: its schema, its rules, and what it says to bad files."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from toy_family import HASH, TOY, install, put, variant

from otgen.errors import StoreError, UsageError
from otgen.problem import Problem
from otgen.store import (
    EVIDENCE,
    STATUSES,
    Accuracy,
    Compiled,
    Measurement,
    Prediction,
    Store,
    Trial,
    TuningWarning,
    default_path,
    overlay,
    read_winners,
)

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


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "tuning.db"


@pytest.fixture
def problem() -> Problem:
    return TOY.problem(1024, 2048, 64)


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


def test_one_winner_per_precision_by_time_then_error_then_registers(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, choice=variant("ieee", BLOCK_M=16), predicted=9.0)
        put(store, problem, choice=variant("ieee", BLOCK_M=32), predicted=8.0, error=0.9)
        put(store, problem, choice=variant("ieee", BLOCK_M=64), predicted=8.0, error=0.1)
        put(store, problem, choice=variant("tf32"), predicted=5.0)
        put(store, problem, choice=variant("bf16"), status="wrong_result")
        put(store, problem, "h100", choice=variant("bf16"), predicted=1.0)
        winners = store.decide(problem, "a100")
        assert {winner.precision: winner.variant for winner in winners} == {
            "ieee": variant("ieee", BLOCK_M=64),
            "tf32": variant("tf32"),
        }
        assert {winner.evidence for winner in winners} == {"predicted"}
        assert store.winners("a100") == winners
        assert store.winners("h100") == []
        assert store.decide(problem, "a100") == winners


def test_fewer_registers_break_a_tie(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        environment = store.environment({"gpu": "a100"})
        for block, registers in ((16, 200), (32, 100), (64, 255)):
            store.record(
                Trial(problem, "a100", variant(BLOCK_M=block), "ok", HASH),
                environment=environment,
                compiled=Compiled(f"key {block}", "source", registers, 0, 0),
                prediction=Prediction(3.0),
                accuracy=[Accuracy("out", 0.5, 1.0)],
            )
        (winner,) = store.decide(problem, "a100")
        assert (winner.variant["BLOCK_M"], winner.registers) == (32, 100)


def test_a_trial_nobody_checked_cannot_win(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, choice=variant(BLOCK_M=16), predicted=2.0)
        store.record(
            Trial(problem, "a100", variant(BLOCK_M=32), "ok", HASH),
            environment=store.environment({"gpu": "a100"}),
            prediction=Prediction(1.0),
        )
        put(store, problem, choice=variant(BLOCK_M=64), predicted=1.0, error=2.0)
        assert [winner.variant["BLOCK_M"] for winner in store.decide(problem, "a100")] == [16]


def test_a_prediction_never_beats_a_measurement(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, choice=variant(BLOCK_M=16), predicted=20.0, measured=30.0)
        put(store, problem, choice=variant(BLOCK_M=32), predicted=1.0)
        put(store, problem, choice=variant(BLOCK_M=16), predicted=2.0)
        (winner,) = store.decide(problem, "a100")
        assert (winner.evidence, winner.measured_us, winner.predicted_us) == ("measured", 30.0, 20.0)


def test_a_later_wrong_result_takes_a_winner_back_and_a_timeout_does_not(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, predicted=1.0)
        put(store, problem, status="timeout")
        assert store.decide(problem, "a100")
        put(store, problem, status="illegal_access")
        assert store.decide(problem, "a100") == []
        assert store.winners() == []


def test_a_new_template_forgets_trials_but_keeps_old_winners_of_other_modes(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, choice=variant("ieee"), predicted=1.0)
        put(store, problem, choice=variant("tf32"), predicted=1.0)
        store.decide(problem, "a100")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE trial SET template_hash = 'old'")
        connection.execute("UPDATE winner SET template_hash = 'old'")
    with Store.open(path) as store:
        assert store.trials(problem, "a100") == []
        put(store, problem, choice=variant("ieee"), predicted=2.0)
        assert [winner.precision for winner in store.decide(problem, "a100")] == ["ieee"]
        assert {winner.precision: winner.template_hash for winner in store.winners()} == {"ieee": HASH, "tf32": "old"}


def test_json_has_the_fields_that_were_promised(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, predicted=1.5)
        (winner,) = store.decide(problem, "a100")
    assert winner.to_json() == {
        "family": "toy",
        "gpu": "a100",
        "n": 1024,
        "m": 2048,
        "d": 64,
        "flags": {"schedule": "alternating", "width": 1},
        "dtype": "fp32",
        "precision": "ieee",
        "evidence": "predicted",
        "variant": {"BLOCK_M": 32, "BLOCK_K": 64, "precision": "ieee"},
        "predicted_us": 1.5,
        "measured_us": None,
        "registers": None,
        "spills": None,
        "shared_bytes": None,
        "template_hash": HASH,
    }


def test_overlay_ranks_fresh_then_evidence_then_the_users_file(tmp_path: Path, problem: Problem) -> None:
    def layer(name: str, **values: float) -> Path:
        with Store.open(tmp_path / name) as store:
            put(store, problem, **values)
            store.decide(problem, "a100")
        return tmp_path / name

    first, second = layer("first.db", predicted=1.0), layer("second.db", predicted=2.0)
    timed = layer("timed.db", measured=9.0)

    def top(*paths: Path, stale: tuple[Path, ...] = ()) -> Path:
        (winner,) = overlay(map(read_winners, paths), lambda winner: winner.path in stale)
        return winner.path

    assert top(first, second) == second
    assert top(timed, second) == timed
    assert top(first, timed) == timed
    assert top(timed, second, stale=(timed,)) == second
    assert EVIDENCE[0] == "measured"


def test_a_snapshot_is_one_file_that_opens_without_a_write(path: Path, tmp_path: Path, problem: Problem) -> None:
    shipped = tmp_path / "shipped" / "a100.db"
    with Store.open(path) as store:
        put(store, problem, choice=variant("ieee"), predicted=2.0)
        put(store, problem, choice=variant("ieee", BLOCK_M=16), predicted=3.0)
        put(store, problem, status="timeout")
        store.decide(problem, "a100")
        store.snapshot(shipped)
        store.snapshot(tmp_path / "small.db", winners_of="a100")
        assert len(store.trials(problem, "a100")) == 3
    assert shipped.read_bytes()[18:20] == b"\x01\x01", (
        "expected a rollback journal: a write-ahead log cannot be read from read-only media"
    )
    with Store.open(shipped, readonly=True) as store:
        assert len(store.trials(problem, "a100")) == 3
        with pytest.raises(StoreError, match=r"can be written at .*--db or set OTGEN_DB"):
            put(store, problem)
    with Store.open(tmp_path / "small.db", readonly=True) as store:
        assert [trial.predicted_us for trial in store.trials(problem, "a100")] == [2.0]
        assert [winner.us for winner in store.winners()] == [2.0]
    assert os.listdir(shipped.parent) == ["a100.db"]


def test_reading_while_another_process_writes(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, predicted=1.0)
        store.decide(problem, "a100")
        assert len(read_winners(path)) == 1


def test_two_processes_may_create_and_write_one_database(path: Path, problem: Problem) -> None:
    script = (
        "import sys; from otgen.problem import *; from otgen.store import *\n"
        "with Store.open(sys.argv[1]) as store:\n"
        "    environment = store.environment({'gpu': 'a100'})\n"
        "    for i in range(50):\n"
        "        trial = Trial(Problem('toy', 8, 8, 8), 'a100', Variant(precision='ieee'), 'ok', 'hash', seed=i)\n"
        "        store.record(trial, environment=environment, prediction=Prediction(1.0 + i))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=subprocess.PIPE) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in running] == [(b"", 0)] * 3
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT environment) FROM trial").fetchone() == (150, 1)


def test_a_reader_needs_the_standard_library_alone(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, predicted=1.0)
        store.decide(problem, "a100")
    script = (
        "import sys; from pathlib import Path; from otgen.store import Store, read_winners\n"
        "assert len(read_winners(Path(sys.argv[1]))) == 1\n"
        "Store.open(sys.argv[1]).close()\n"
        "print(*{'sqlite_utils', 'click', 'optuna', 'jinja2', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_default_path_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OTGEN_DB", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "otgen" / "tuning.db"
    monkeypatch.setenv("OTGEN_DB", str(tmp_path / "mine.db"))
    assert default_path() == tmp_path / "mine.db"


def test_a_missing_file_is_not_created_by_a_reader(path: Path) -> None:
    with pytest.raises(StoreError, match=r"expected a tuning database at .*; found no file; create it with `otgen tune --gpu"):
        Store.open(path, readonly=True)
    assert not path.parent.exists()


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"a folder that can be written for .*; name another with --db or OTGEN_DB"):
        Store.open(tmp_path / "file" / "tuning.db")
    with pytest.raises(StoreError, match=r"a database that can be written at .*unable to open"):
        Store.open(tmp_path)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file_is_refused_at_the_start(path: Path) -> None:
    Store.open(path).close()
    path.chmod(0o444)
    with pytest.raises(StoreError, match="a database that can be written"):
        Store.open(path)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_corrupt_file_is_left_as_it_is(tmp_path: Path, readonly: bool) -> None:
    path = tmp_path / "tuning.db"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(
        StoreError, match=r"expected an otgen tuning database; .* is corrupt .*; move it away or name another file with --db"
    ):
        Store.open(path, readonly=readonly)
    assert path.read_bytes() == b"this is no database" * 100


def test_a_file_damaged_in_the_middle_is_an_error_of_otgen(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        for _ in range(50):
            put(store, problem, predicted=1.0)
        store.snapshot(path.with_name("whole.db"))
    damaged = path.with_name("whole.db")
    content = bytearray(damaged.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    damaged.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="corrupt"), Store.open(damaged) as store:
        store.trials(problem, "a100")


@pytest.mark.parametrize("readonly", [False, True])
def test_a_newer_database_is_not_touched(path: Path, readonly: bool) -> None:
    Store.open(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('otgen', '0099_future', '')")
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=r"0099_future from a newer otgen, and was left untouched; run `pip install --upgrade otgen`"
    ):
        Store.open(path, readonly=readonly)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE photo (id)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="is a SQLite file of another program"):
        Store.open(path)
    assert path.read_bytes() == before


def test_an_empty_file_becomes_a_database_but_cannot_be_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    path.touch()
    with pytest.raises(StoreError, match="is older or empty"):
        Store.open(path, readonly=True)
    with Store.open(path) as store:
        assert store.winners() == []


def test_a_locked_database_says_so_and_keeps_what_it_has(path: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otgen.store.connect.BUSY_SECONDS", 0.05)
    with Store.open(path) as store:
        put(store, problem, predicted=1.0)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match=r"to be free within 0.05 s; another process holds it"):
                put(store, problem, predicted=2.0)
            other.execute("ROLLBACK")
        put(store, problem, predicted=3.0)
        assert [trial.predicted_us for trial in store.trials(problem, "a100")] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("flags", '"text"'),
        ("flags", '{"schedule": 0.5}'),
        ("variant", '{"precision": "ieee", "BLOCK_M": [1]}'),
        ("variant", '{"precision": "tf32"}'),
        ("n", "many"),
        ("predicted_us", "soon"),
    ],
)
def test_a_malformed_winner_is_skipped_with_a_warning(path: Path, problem: Problem, column: str, value: str) -> None:
    with Store.open(path) as store:
        for precision in ("ieee", "bf16"):
            put(store, problem, choice=variant(precision), predicted=1.0)
        store.decide(problem, "a100")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE winner SET {column} = ? WHERE precision = 'ieee'", (value,))
    with pytest.warns(TuningWarning, match=r"skipped the row .*toy"):
        (left,) = read_winners(path)
    assert left.precision == "bf16"


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
