"""The tuning database as a file: snapshots, several processes at once, and what is said of files that cannot be used."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from toy_family import HASH, put, variant

from otgen.errors import StoreError
from otgen.problem import Problem
from otgen.store import Store, default_path, read_winners, shipped
from otgen.store.connect import still
from otgen.store.publish import write_text

pytestmark = pytest.mark.usefixtures("toy")


def test_a_snapshot_is_one_file_that_opens_without_a_write(path: Path, tmp_path: Path, problem: Problem) -> None:
    published = tmp_path / "shipped" / "a100.db"
    with Store.open(path) as store:
        put(store, problem, choice=variant("ieee"), predicted=2.0)
        put(store, problem, choice=variant("ieee", BLOCK_M=16), predicted=3.0)
        put(store, problem, status="timeout")
        store.decide(problem, "a100")
        store.snapshot(published)
        store.snapshot(tmp_path / "small.db", winners_of="a100")
        assert len(store.trials(problem, "a100")) == 3
    assert published.read_bytes()[18:20] == b"\x01\x01", (
        "expected a rollback journal: a write-ahead log cannot be read from read-only media"
    )
    with Store.open(published, readonly=True) as store:
        assert len(store.trials(problem, "a100")) == 3
        with pytest.raises(StoreError, match=r"can be written at .*--db or set OTGEN_DB"):
            put(store, problem)
    with Store.open(tmp_path / "small.db", readonly=True) as store:
        assert [trial.predicted_us for trial in store.trials(problem, "a100")] == [2.0]
        assert [winner.us for winner in store.winners()] == [2.0]
    assert os.listdir(published.parent) == ["a100.db"]


def test_a_snapshot_can_leave_out_winners_of_other_templates(path: Path, tmp_path: Path, problem: Problem) -> None:
    larger = replace(problem, n=2 * problem.n)
    with Store.open(path) as store:
        for each, us in ((problem, 2.0), (larger, 3.0)):
            put(store, each, predicted=us)
            store.decide(each, "a100")
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE winner SET template_hash = '000000000000' WHERE n = ?", (problem.n,))
        store.snapshot(tmp_path / "present.db", winners_of="a100", templates=[HASH])
        assert len(store.winners()) == 2
    with Store.open(tmp_path / "present.db", readonly=True) as store:
        assert [winner.problem for winner in store.winners()] == [larger]
        assert store.trials(problem, "a100") == []


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


def test_the_last_moment_is_guarded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file made between the last look and the publication is kept; a file system without links is no obstacle."""
    out = tmp_path / "c.txt"
    with monkeypatch.context() as patched:
        patched.setattr("otgen.store.publish._refuse", lambda path, replace: None)
        out.write_text("theirs")
        with pytest.raises(StoreError, match=r"expected no file at .*c\.txt; there is one"):
            write_text("ours", out, replace=False)
    assert out.read_text() == "theirs"
    out.unlink()

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("otgen.store.publish.os.link", no_links)
    write_text("ours", out, replace=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["ours"]


def test_a_file_that_is_written_to_while_it_is_read_as_still(path: Path, problem: Problem) -> None:
    with Store.open(path) as store:
        put(store, problem, predicted=1.0)
    with (
        pytest.raises(StoreError, match=r"expected .*tuning\.db to stay as it is while it is read; .*; run this again"),
        still(path),
        Store.open(path) as store,
    ):
        put(store, problem, predicted=2.0)
    with Store.open(path) as store:
        put(store, problem, predicted=3.0)
        with still(path) as connection:
            assert connection.execute("SELECT count(*) FROM trial").fetchone() == (3,), "a writer at work is no obstacle"


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_files_need_no_log_beside_them(path: Path) -> None:
    """Bytes 18 and 19 of a database are 2 in write-ahead mode, which asks for a folder that can be written."""
    assert path.read_bytes()[18:20] == b"\x01\x01"
