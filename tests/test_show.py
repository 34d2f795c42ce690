"""`otgen show` and `otgen why`."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click import Command
from click.testing import CliRunner, Result
from toy_family import TOY, install, put, variant

from otgen.cli import otgen
from otgen.cli.show import show
from otgen.cli.why import why
from otgen.errors import StoreError, UsageError
from otgen.store import Store

FIELDS = [
    *("family", "gpu", "n", "m", "d", "flags", "dtype", "precision", "evidence", "variant", "predicted_us", "measured_us"),
    *("registers", "spills", "shared_bytes", "template_hash"),
]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    monkeypatch.setenv("OTGEN_DB", str(tmp_path / "own.db"))
    monkeypatch.setattr("otgen.store.winners.resource", lambda folder: tmp_path / "shipped")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Predicted winners of two precision modes for a100, a measured one for h100."""
    path = tmp_path / "some.db"
    tune(path, "a100", choice=variant("ieee"), predicted=12.0)
    tune(path, "a100", choice=variant("tf32"), predicted=3.0)
    tune(path, "h100", choice=variant("bf16"), predicted=2.5, measured=2.25)
    return path


def tune(path: Path, gpu: str, **options: object) -> None:
    problem = TOY.problem(1024, 1024, 64)
    with Store.open(path) as store:
        put(store, problem, gpu, **options)
        store.decide(problem, gpu)


def run(command: Command, *words: object) -> Result:
    return CliRunner().invoke(otgen, [str(command.name), *map(str, words)], catch_exceptions=False)


def test_show_json_is_a_list_of_winners_with_the_promised_fields(path: Path) -> None:
    winners = json.loads(run(show, "--db", path, "--json").stdout)
    assert [list(winner) for winner in winners] == [FIELDS] * 3
    assert [(w["gpu"], w["precision"], w["evidence"], w["measured_us"]) for w in winners] == [
        ("a100", "tf32", "predicted", None),
        ("a100", "ieee", "predicted", None),
        ("h100", "bf16", "measured", 2.25),
    ]
    assert winners[0]["variant"] == {"BLOCK_K": 64, "BLOCK_M": 32, "precision": "tf32"}


def test_show_filters(path: Path) -> None:
    assert len(json.loads(run(show, "--db", path, "--json", "--gpu", "H100").stdout)) == 1
    assert len(json.loads(run(show, "--db", path, "--json", "--family", "toy").stdout)) == 3
    assert json.loads(run(show, "--db", path, "--json", "--family", "hvp").stdout) == []
    with pytest.raises(UsageError, match=r"unknown GPU 'a1000'.*Did you mean 'a100'"):
        run(show, "--gpu", "a1000")
    with pytest.raises(UsageError, match="unknown family 'tory'"):
        run(show, "--family", "tory")


def test_show_prints_a_table_that_names_the_evidence(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE winner SET template_hash = 'old' WHERE precision = 'ieee'")
    lines = run(show, "--db", path).stdout.splitlines()
    assert lines[0].split()[:6] == ["family", "gpu", "shape", "dtype", "precision", "evidence"]
    rows = {line.split()[5]: line for line in lines[1:]}
    assert "predicted " in rows["tf32"]
    assert " 3 " in rows["tf32"]
    assert "predicted, stale" in rows["ieee"]
    assert "measured" in rows["bf16"]
    assert "2.25" in rows["bf16"]
    assert "BLOCK_K=64 BLOCK_M=32" in rows["bf16"]


def test_show_without_a_database_overlays_the_users_on_the_shipped(tmp_path: Path) -> None:
    assert "run `otgen tune --gpu a100`" in run(show, "--gpu", "a100").stdout
    assert json.loads(run(show, "--json").stdout) == []
    tune(tmp_path / "shipped" / "a100.db", "a100", predicted=1.0)
    tune(tmp_path / "own.db", "a100", measured=9.0)
    (winner,) = json.loads(run(show, "--json").stdout)
    assert (winner["evidence"], winner["measured_us"]) == ("measured", 9.0)


def test_show_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="found no file"):
        run(show, "--db", tmp_path / "none.db")


def test_why_names_the_key_the_files_the_rows_and_the_cure(path: Path) -> None:
    text = run(why, "toy", "1000x1100x64", "--gpu", "a100", "--db", path).stdout
    assert text.splitlines() == [
        "toy[schedule=alternating,width=1] 1000x1100x64 fp32 on a100, "
        "precision ieee, tf32x3, fp16x3, bf16x6, bf16x3, fp16, tf32, bf16",
        "computes out = x",
        "looked up as 1024x1024x64: n and m rounded to powers of two",
        "databases, the last one first to be believed:",
        f"  {path}: 2 rows for this family and architecture",
        "rows considered, best first:",
        "  predicted 1024x1024x64 a100 tf32 predicted 3 µs: taken",
        "answer: predicted; the winner predicted for 1024x1024x64 on a100 is used, which was never timed",
        "variant: BLOCK_K=64 BLOCK_M=32 precision=tf32",
        "to have it tuned, and measured where this GPU is: otgen tune --gpu a100 --family toy --shape 1000x1100x64",
    ]


def test_why_lists_what_was_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE winner SET template_hash = 'old' WHERE precision = 'ieee'")
    text = run(why, "toy", "1024x1024x64", "--gpu", "a100", "--precision", "fp32", "--db", path).stdout
    assert "tf32 predicted 3 µs: refused, precision tf32 is not admissible here (ieee)" in text
    assert "ieee predicted 12 µs: refused, stale: tuned on template old" in text
    assert "answer: default; nothing tuned" in text


def test_why_of_an_exact_answer_and_of_none(path: Path) -> None:
    assert "answer: exact; the winner measured for" in run(why, "toy", "1024x1024x64", "--gpu", "h100", "--db", path).stdout
    text = run(why, "toy", "64x64x64", "schedule=symmetric", "width=3", "--gpu", "a100").stdout
    assert "toy[schedule=symmetric,width=3] 64x64x64" in text
    assert "rows considered: none" in text


def test_why_shows_the_rows_and_files_it_could_not_use(path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("""UPDATE winner SET variant = '{"precision":"tf32"}' WHERE precision = 'tf32'""")
    assert "skipped the row toy" in run(why, "toy", "64x64x64", "--gpu", "a100", "--db", path).stdout
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(StoreError, match="is corrupt"):
        run(why, "toy", "64x64x64", "--gpu", "a100", "--db", broken)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toy", "64x64", "--gpu", "a100"), "expected a shape NxMxD"),
        (("tory", "64x64x64", "--gpu", "a100"), "unknown family 'tory'"),
        (("toy", "64x64x64", "--gpu", "a1000"), "unknown GPU"),
        (("toy", "64x64x64", "schedule", "--gpu", "a100"), "expected name=value; got 'schedule'"),
        (("toy", "64x64x64", "n=3", "--gpu", "a100"), "unknown flag or axis of toy 'n'"),
        (("toy", "64x64x64", "BLOCK_M=32", "--gpu", "a100"), "got the axis BLOCK_M"),
        (("toy", "64x64x64", "--precision", "fp8", "--gpu", "a100"), "unknown precision 'fp8'"),
        (("toy", "64x64x64", "--dtype", "fp8", "--gpu", "a100"), "unknown dtype 'fp8'"),
    ],
)
def test_why_refuses_bad_words(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(why, *words)
