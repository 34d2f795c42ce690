"""Files from strangers, and places that cannot be written: a sentence each, and nothing changed."""

from __future__ import annotations

import json
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from toy_family import HASH, TOY, install, put, variant

from otgen.cli import main, otgen
from otgen.errors import OtgenError, UsageError
from otgen.store import Accuracy, Compiled, Measurement, Prediction, Store, Trial, read_winners

pytestmark = pytest.mark.usefixtures("toy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a database with a measured winner and a predicted one."""
    folder, problem = tmp_path_factory.mktemp("made"), TOY.problem(1024, 2048, 64)
    with pytest.MonkeyPatch.context() as patched:
        install(patched)
        with Store.open(folder / "work.db") as store:
            store.record(
                Trial(problem, "a100", variant("tf32"), "ok", HASH, seed=3),
                environment=store.environment({"gpu": "NVIDIA A100"}),
                compiled=Compiled("key", "source", 128, 0, 49152, {"mufu": 0.1}),
                prediction=Prediction(11.5, {"issue": 9.0}),
                measurement=Measurement("cold", 12.5, 12.0, 13.0, (12.0, 12.5, 13.0), default_us=40.0),
                accuracy=[Accuracy("out", 1e-5, 1e-4)],
            )
            put(store, problem, choice=variant("ieee"), predicted=2.0)
            store.decide(problem, "a100")
            store.snapshot(folder / "plain.db")
    return (folder / "plain.db").read_bytes()


@pytest.fixture
def path(tmp_path: Path, made: bytes) -> Path:
    path = tmp_path / "plain.db"
    path.write_bytes(made)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(otgen, [*map(str, words)], catch_exceptions=False)


def document(path: Path) -> dict[str, Any]:
    return dict(json.loads(run("export", "--format", "json", "--trials", "--db", path).stdout))


HUGE = "x" * 100_000
DELETED = object()
ROWS = [
    ("family", "../../etc/passwd", "expected family as printable text"),
    ("family", "os", "unknown family 'os'"),
    ("gpu", "../a100", "expected gpu as printable text"),
    ("gpu", "a100'; DROP TABLE trial; --", "expected gpu as printable text"),
    ("gpu", "quantum9000", "unknown GPU 'quantum9000'"),
    ("n", 0, "expected n as an integer from 1"),
    ("n", 10**30, "expected n as an integer from 1"),
    ("n", True, "expected n as an integer from 1"),
    ("n", 1.5, "expected n as an integer from 1"),
    ("d", 1 << 20, "expected sizes n, m from 1"),
    ("dtype", "fp8", r"expected dtype as printable text like fp32\|bf16\|fp16"),
    ("flags", {"schedule": "sideways", "width": 1}, "unknown value of toy's flag schedule"),
    ("flags", {"schedule": "symmetric"}, "expected every flag of toy"),
    ("flags", {"__class__": "x y"}, "expected flags as an object of integers and words"),
    ("flags", [1, 2], "expected flags as an object of at most 64"),
    ("variant", {"BLOCK_M": 32, "BLOCK_K": 64}, "expected a variant with a precision"),
    ("variant", {"BLOCK_M": 32, "BLOCK_K": 64, "precision": "tf32", "COLOUR": 1}, "unknown axis of toy 'COLOUR'"),
    ("variant", {"BLOCK_M": 48, "BLOCK_K": 64, "precision": "tf32"}, "expected BLOCK_M among 16, 32, 64; got 48"),
    ("variant", {"BLOCK_M": "{{x}}", "BLOCK_K": 64, "precision": "tf32"}, "an object of integers and words"),
    ("template_hash", "../..", "expected template_hash as printable text"),
    ("status", "fine", "expected status as printable text"),
    ("message", HUGE, "expected message as at most 65536 printable"),
    ("message", "\x1b]0;owned\x07", "expected message as at most 65536 printable"),
    ("message", "\ud800", "expected message as at most 65536 printable"),
    ("seed", 1 << 70, "expected seed as an integer"),
    ("created_at", "yesterday", "expected created_at as printable text"),
    ("created_at", DELETED, "expected a trial with created_at"),
    ("compile_ms", -1.0, "expected compile_ms as a number from 0"),
    ("compile_ms", "1e3", "expected compile_ms as a number from 0"),
    ("environment.driver", HUGE, "expected driver as printable text"),
    ("environment.gpu", "\x1b[31mA100", "expected gpu as printable text"),
    ("environment.cuda", "13", "expected an environment without 'cuda'"),
    ("compile.registers", -1, "expected registers as an integer from 0"),
    ("compile.instructions", {"deep": [HUGE]}, "expected instructions as an object of finite numbers"),
    ("compile.instructions", {"much": float("inf")}, "expected finite numbers; got 'Infinity'"),
    ("prediction.us", float("nan"), "expected finite numbers; got 'NaN'"),
    ("prediction.us", 0, "expected us above zero"),
    ("measurement.median_us", 1e301, "expected median_us as a number"),
    ("measurement.median_us", 1.0, "expected p20_us ≤ median_us ≤ p80_us"),
    ("measurement.samples_us", ["12"], "expected each of samples_us as a number"),
    ("measurement.samples_us", [1.0] * 20_000, "expected samples_us as a list of at most 10000"),
    ("accuracy", [{"metric": "out", "value": 0.1, "budget": 1.0}] * 2, "expected one accuracy per output"),
    ("accuracy", {"metric": "out"}, "expected accuracy as a list"),
    ("hook", "import os", "expected a trial without 'hook'"),
]


@pytest.mark.parametrize(("field", "value", "message"), ROWS, ids=[f"{field}-{str(value)[:20]}" for field, value, _ in ROWS])
def test_every_field_is_checked(path: Path, tmp_path: Path, field: str, value: Any, message: str) -> None:
    sent = document(path)
    place = sent["trials"][0]
    *folders, name = field.split(".")
    for folder in folders:
        place = place[folder]
    place[name] = value
    if value is DELETED:
        del place[name]
    (tmp_path / "sent.json").write_text(json.dumps(sent))
    with pytest.raises(OtgenError, match=message) as caught:
        run("import", tmp_path / "sent.json", "--db", tmp_path / "own.db")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "own.db").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected JSON written by `otgen export`"),
        ("{", "expected JSON written by `otgen export`"),
        ("[" * 200_000, "expected JSON written by `otgen export`"),
        ("[]", "expected a file written by `otgen export --format json` or sqlite"),
        ('{"format": "pickle"}', "expected a file written by `otgen export --format json` or sqlite"),
        ('{"format": "otgen trials", "version": 2, "trials": []}', "expected version 1 of the format.*pip install --upgrade otgen"),
        ('{"format": "otgen trials", "version": 1, "trials": {}}', "expected a list of at most 500000 trials"),
        ('{"format": "otgen trials", "version": 1, "trials": [3]}', r"row 1 of .*: expected a trial as an object; got 3"),
        (b"\xff\xfe\x00", "expected JSON written by `otgen export`"),
    ],
)
def test_a_file_that_is_no_export(tmp_path: Path, content: str | bytes, message: str) -> None:
    sent = tmp_path / "sent.json"
    sent.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OtgenError, match=message):
        run("import", sent, "--db", tmp_path / "own.db")
    assert not (tmp_path / "own.db").exists()


def test_what_is_not_a_file_or_too_large(tmp_path: Path) -> None:
    own = tmp_path / "own.db"
    for place, message in (("/dev/zero", "something else"), (tmp_path, "something else"), (tmp_path / "none", "found none")):
        with pytest.raises(OtgenError, match=message):
            run("import", place, "--db", own)
    for name, start in (("large.json", b"{"), ("large.db", b"SQLite format 3\0")):
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(1 << 31)
        with pytest.raises(OtgenError, match=r"expected at most [\d,]+ bytes of (json|sqlite)"):
            run("import", tmp_path / name, "--db", own)
    assert not own.exists()


def alter(path: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            connection.execute(statement)
    return path


def overwrite(path: Path, index: str) -> None:
    """Overwrite the first page of an index, which nobody who reads whole tables looks at."""
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (index,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = b"\xff" * size
    path.write_bytes(content)


DATABASES = {
    "truncated": (None, "is corrupt"),
    "damaged": (None, "is corrupt"),
    "trigger": (["CREATE TRIGGER evil AFTER INSERT ON trial BEGIN DELETE FROM winner; END"], "holds the trigger 'evil'"),
    "view": (["ALTER TABLE winner RENAME TO w", "CREATE VIEW winner AS SELECT * FROM w"], "holds the view 'winner'"),
    "virtual": (["CREATE VIRTUAL TABLE extra USING fts5(text)"], "holds the virtual table 'extra'"),
    "missing": (["DROP TABLE accuracy"], "holds no table accuracy"),
    "foreign": (["DROP TABLE _sqlite_migrations"], "SQLite file of another program"),
    "newer": (["INSERT INTO _sqlite_migrations VALUES (9, 'otgen', '0099_future', '')"], "0099_future from a newer otgen"),
}


@pytest.mark.parametrize("command", ["import", "merge", "export", "diff"])
@pytest.mark.parametrize("damage", DATABASES)
def test_a_database_that_otgen_did_not_make(path: Path, tmp_path: Path, command: str, damage: str) -> None:
    statements, message = DATABASES[damage]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-6000])
    elif damage == "damaged":
        overwrite(path, "trial_by_key")
    else:
        alter(path, *statements)
    before, out = path.read_bytes(), tmp_path / "out.db"
    words = {
        "import": ("import", path, "--db", out),
        "merge": ("merge", path, path, "-o", out),
        "export": ("export", "--format", "sqlite", "--db", path, "-o", out),
        "diff": ("diff", path, path),
    }
    with pytest.raises(OtgenError, match=message):
        run(*words[command])
    assert path.read_bytes() == before
    assert not out.exists()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE trial SET gpu = '../../root'", "expected gpu as printable text"),
        ("UPDATE trial SET family = 'toy''; --'", "expected family as printable text"),
        ("UPDATE trial SET n = 'many'", "expected n as an integer"),
        ("UPDATE trial SET variant = '{'", "expected variant as an object"),
        ("UPDATE trial SET variant = x'00ff'", "expected variant as an object"),
        ("UPDATE trial SET message = printf('%.*c', 99999, 'x')", "expected message as at most"),
        ("UPDATE trial SET environment = 99", "expected an environment as an object"),
        ("UPDATE measurement SET p20_us = 9e999", "expected p20_us as a number"),
        ("UPDATE measurement SET samples_us = '[1, null]'", "expected each of samples_us as a number"),
        ("UPDATE prediction SET us = -1", "expected us as a number"),
        ("UPDATE accuracy SET budget = 0", "expected budget above zero"),
    ],
)
def test_a_merge_leaves_out_rows_that_are_not_sound_and_says_so(
    path: Path, tmp_path: Path, statement: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = path.with_name("whole.db")
    whole.write_bytes(path.read_bytes())
    alter(path, statement + " WHERE rowid = 1")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(path), "-o", str(tmp_path / "out.db")])
    assert not ended.value.code
    err = capsys.readouterr().err
    assert f"otgen: left out row 1 of {path}: {message}" in err
    assert [winner.precision for winner in read_winners(tmp_path / "out.db")] == ["ieee"]
    with pytest.raises(UsageError, match=f"row 1 of .*{message}"):
        run("import", path, "--db", tmp_path / "own.db")


def test_a_winner_that_is_not_the_trial_it_names(path: Path, tmp_path: Path) -> None:
    alter(path, "UPDATE winner SET trial = 1")
    result = run("merge", path, "-o", tmp_path / "out.db")
    assert "is not the trial 1 it names" in result.stderr
    assert {winner.precision for winner in read_winners(tmp_path / "out.db")} == {"ieee", "tf32"}


@pytest.mark.parametrize("place", ["/proc/nowhere/c.db", "/dev/null/c.db"])
@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_place_that_cannot_be_written(path: Path, place: str, command: str) -> None:
    words = ("merge", path, "-o", place) if command == "merge" else ("export", "--format", "json", "--db", path, "-o", place)
    with pytest.raises(OtgenError, match=f"expected to write {place}; got: .*; name another place with -o"):
        run(*words)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> list[Path]:
    """All files, without the logs that SQLite keeps beside a database while it is read."""
    return [file for file in sorted(folder.rglob("*")) if not file.name.endswith(("-wal", "-shm"))]


@pytest.mark.parametrize("room", [2_000, 40_000])
def test_a_full_disk_leaves_nothing_half_done(path: Path, tmp_path: Path, room: int) -> None:
    run("export", "--format", "json", "--trials", "--db", path, "-o", tmp_path / "sent.json")
    own = tmp_path / "own" / "own.db"
    Store.open(own).close()
    before = files(tmp_path)
    with full_disk(room):
        for words in (("merge", path, "-o", tmp_path / "c.db"), ("import", tmp_path / "sent.json", "--db", own)):
            with pytest.raises(OtgenError, match=r"expected to (read and )?write"):
                run(*words)
    with full_disk(1_000), pytest.raises(OtgenError, match=r"expected to write .*text\.json; got: File too large"):
        run("export", "--format", "json", "--db", path, "-o", tmp_path / "text.json")
    assert files(tmp_path) == before
    assert read_winners(own) == []
    assert "2 trials added" in run("import", tmp_path / "sent.json", "--db", own).stdout
