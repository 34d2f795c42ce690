"""The command line: documented, quick, its mistakes one sentence long and its exit codes as said.

docs/commands.md holds every command's --help; OTGEN_UPDATE_GOLDEN=1 pytest tests/test_commands.py rewrites it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from otgen.candidates import legal_variants
from otgen.carry import digests
from otgen.cli import COMMANDS, main, otgen
from otgen.cli.tune import _report, _Voice
from otgen.compile import compile_key
from otgen.dispatch import Dispatcher
from otgen.families import family
from otgen.gpus import gpu
from otgen.store import Store, StoredTrial, Winner
from otgen.tuner import Summary

ROOT = Path(__file__).parents[1]


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``otgen words…``."""
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_help_is_documented_word_for_word() -> None:
    pages = ["# Commands\n\nWhat `--help` says; checked by the tests.\n"]
    for command in ("", *COMMANDS):
        words = [*([command] if command else []), "--help"]
        text = CliRunner().invoke(otgen, words, prog_name="otgen", terminal_width=110).output
        pages.append(f"## otgen {command}".rstrip() + f"\n\n```text\n{text}```\n")
    path = ROOT / "docs" / "commands.md"
    if os.environ.get("OTGEN_UPDATE_GOLDEN"):
        path.write_text("\n".join(pages), encoding="utf-8")
    assert "\n".join(pages) == path.read_text(encoding="utf-8")


def test_a_space_is_counted_and_every_refusal_has_its_reason() -> None:
    words = ["space", "hvp", "--shape", "64x64x8", "--gpu", "l4"]
    text, facts = CliRunner().invoke(otgen, words).output, json.loads(CliRunner().invoke(otgen, [*words, "--json"]).output)
    problem = family("hvp").problem(64, 64, 8)
    values = family("hvp").axes(problem)
    assert facts["size"] == math.prod(map(len, values.values())) == facts["legal"] + sum(facts["refused"].values())
    assert facts["legal"] == len(legal_variants(problem, gpu("l4")))
    assert facts["default"] == dict(family("hvp").default(problem))
    assert f"{facts['size']:,} variants, {facts['legal']:,} legal" in text
    assert f"[{facts['default']['BLOCK_M']}]" in text
    assert all(reason in text for reason in facts["refused"])


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"^\s*(?:\$ )?otgen (\w+)", text, re.MULTILINE))
    assert used
    assert used <= set(COMMANDS)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["render", "sinkhorn", "--shape", "4096x64"], 2, "expected a shape NxMxD of positive integers; got '4096x64'"),
        (["render", "sinkhorn", "--shape", "4096x0x64"], 2, "expected a shape NxMxD of positive integers"),
        (
            ["render", "sinkorn", "--shape", "8x8x8"],
            2,
            "unknown family 'sinkorn'; known: hvp, loop, sinkhorn, transport. Did you mean 'sinkhorn'?",
        ),
        (["render", "sinkhorn", "--shape", "8x8x8", "--gpu", "a1000"], 2, "unknown GPU 'a1000'"),
        (["render", "sinkhorn", "--shape", "8x8x8", "fusion=all"], 2, "expected fusion among half_step, split_step; got 'all'"),
        (["render", "sinkhorn", "--shape", "8x8x8", "colour=red"], 2, "unknown flag or axis of sinkhorn 'colour'"),
        (["render", "sinkhorn", "--shape", "8x8x8", "colour"], 2, "expected name=value; got 'colour'"),
        (["render", "sinkhorn", "--shape", "8x8x8", "--dtype", "fp8"], 2, "unknown dtype 'fp8'"),
        (
            ["render", "sinkhorn", "--shape", "8x8x8", "BLOCK_M=256", "BLOCK_N=256"],
            3,
            "the score tile needs more than 128 registers",
        ),
        (["render", "sinkhorn"], 2, "Missing option '--shape'"),
        (["tune", "--gpu", "a100", "--budget", "soon"], 2, "expected a time such as 90s, 10m or 2h; got 'soon'"),
        (["tune", "--gpu", "a100", "--sampler", "oracle"], 2, "unknown sampler 'oracle'"),
        (["tune", "--gpu", "a100", "--family", "sinkhorns"], 2, "Did you mean 'sinkhorn'?"),
        (["tune", "--gpu", "a100", "--dtype", "fp32,int8"], 2, "unknown dtype 'int8'"),
        (["tune", "--gpu", "a100", "--shape", "1x2"], 2, "write for example 4096x4096x64"),
        (["tune", "--gpu", "a100", "--flag", "symmetric"], 2, "expected name=value; got 'symmetric'"),
        (["tune", "--gpu", "a100", "--family", "hvp", "--flag", "batch=2"], 2, "unknown flag of hvp 'batch'; known: product"),
        (
            ["tune", "--gpu", "a100", "--family", "sinkhorn", "--flag", "schedule=odd"],
            2,
            "unknown value of sinkhorn's flag schedule",
        ),
        (["tune", "--gpu", "auto"], 1, "torch sees none"),
        (
            ["compile", "--gpu", "h100", "--family", "hvp", "--shape", "8x8x8", "--emit", "hsaco", "--out", "x"],
            2,
            "unknown output of h100's",
        ),
        (["why", "sinkhorn", "8x8x8", "--gpu", "tpu"], 2, "unknown GPU 'tpu'"),
        (["render", "sinkhorn", "--shape", "4294967296x8x8"], 2, "expected sizes n, m from 1 to 2147483647"),
        (["render", "sinkhorn", "--shape", "６４x64x3"], 2, "expected a shape NxMxD"),
        (["tune", "--gpu", "a100", "--shape", "99999999999999999999x4x3"], 2, "expected sizes n, m from 1 to 2147483647"),
        (["why", "sinkhorn", "8x8x8", "--gpu", "a100", "--db", "/nowhere/tuning.db"], 1, "/nowhere/tuning.db"),
        (["render", "sinkhorn", "--shape", "8x8x8", "--out", "/dev/null/kernel.py"], 1, "/dev/null"),
        (["space", "sinkhorn", "fusion=one_sweep"], 2, "unknown flag of sinkhorn 'fusion'; known: batch, listed, schedule"),
        (["fly"], 2, "No such command 'fly'"),
    ],
)
def test_mistakes(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, out, err = run(*words, capsys=capsys)
    assert found == code
    assert message in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("damage", ["corrupt", "newer", "folder"])
def test_a_database_that_cannot_be_used(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuning.db"
    if damage == "corrupt":
        path.write_bytes(b"not a database, but somebody's notes " * 99)
    elif damage == "folder":
        path.mkdir()
    else:
        import sqlite3

        with Store.open(path):
            pass
        with sqlite3.connect(path) as connection:
            connection.execute("INSERT INTO _sqlite_migrations VALUES (99, 'otgen', 'm999_from_the_future', '2099-01-01')")
        connection.close()
    before = path.read_bytes() if path.is_file() else b""
    command = ["tune", "--gpu", "a100", "--family", "sinkhorn", "--shape", "64x64x3", "--max-trials", "1", "--db", str(path)]
    code, _, err = run(*command, capsys=capsys)
    assert code in (1, 2)
    assert str(path) in err
    assert "Traceback" not in err
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.filterwarnings("default::otgen.store.TuningWarning")
def test_a_winner_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--winner never means the default."""
    monkeypatch.setattr("otgen.dispatch.choose", Dispatcher([]).choose)
    code, out, err = run("render", "sinkhorn", "--winner", "--gpu", "a100", "--shape", "64x64x3", capsys=capsys)
    assert (code, out) == (3, "")
    assert "expected a stored winner for sinkhorn[schedule=alternating] 64x64x3 fp32 on a100" in err
    assert "otgen tune --gpu a100 --family sinkhorn --shape 64x64x3" in err


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OTGEN_CACHE", str(tmp_path / "file" / "cache"))
    db = tmp_path / "tuning.db"
    code, _, err = run("tune", "--gpu", "a100", "--family", "hvp", "--shape", "64x64x3", "--db", str(db), capsys=capsys)
    assert code == 1
    assert "set OTGEN_CACHE to another directory" in err
    assert not db.exists()


def test_a_budget_too_short_for_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tune",
        "--gpu",
        "a100",
        "--family",
        "sinkhorn",
        "--shape",
        "64x64x3",
        "--budget",
        "0.001s",
        "--db",
        str(tmp_path / "t.db"),
    ]
    code, out, err = run(*words, capsys=capsys)
    assert code == 1
    assert "0 trials run" in out
    assert "type a longer one" in err


def test_a_flag_chooses_the_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tune",
        "--gpu",
        "a100",
        "--family",
        "sinkhorn",
        "--shape",
        "64x64x3",
        "--budget",
        "0.001s",
        "--db",
        str(tmp_path / "t.db"),
    ]
    _, out, _ = run(*words, capsys=capsys)
    assert "5 problems for a100" in out
    _, out, _ = run(*words, "--flag", "schedule=symmetric", capsys=capsys)
    assert "1 problems for a100" in out
    assert "sinkhorn[schedule=symmetric]" in out


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """SIGINT in the middle of a real run: 130, what was finished is stored, the printed command goes on with the rest."""
    db = tmp_path / "tuning.db"
    words = ["tune", "--gpu", "a100", "--family", "sinkhorn", "--shape", "256x256x16", "--max-trials", "12", "--db", str(db)]
    command = [sys.executable, "-m", "otgen", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listening = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background jobs start deaf to it
    process = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=listening)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and trials(db) < 3:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = trials(db)
    assert kept >= 3
    lines = out.strip().splitlines()
    assert "none is measured" in lines[-1]
    assert lines[-2].strip() == shlex.join(command)
    again = subprocess.run(shlex.split(lines[-2]), capture_output=True, text=True, check=True)
    added = re.search(r"^(\d+) trials run, (\d+) known", again.stdout, re.MULTILINE)
    assert added is not None
    assert int(added[1]) + kept == int(added[2]) == trials(db)


def trials(db: Path) -> int:
    """How many trials a database that is being written holds."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM trial").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_measured_and_predicted_times_share_no_list(capsys: pytest.CaptureFixture[str]) -> None:
    """A prediction that looks better than the measured winner is neither listed with it nor pinned."""
    problem = family("sinkhorn").problem(64, 64, 3)
    variant = family("sinkhorn").default(problem)
    path = Path("tuning.db")

    def trial(number: int, predicted: float, measured: float | None) -> StoredTrial:
        return StoredTrial(number, variant.with_(num_warps=number), "ok", "", predicted, measured, 0.1, 64, 0, 1024)

    def winner(precision: str, predicted: float, measured: float | None) -> Winner:
        evidence = "measured" if measured else "predicted"
        chosen = variant.with_(precision=precision)
        return Winner(problem, "a100", precision, evidence, chosen, predicted, measured, 64, 0, 1024, "hash", 1, path)

    trials = [trial(2, 1.0, None), trial(4, 4.0, 20.0)]
    found = Summary(problem, [winner("bf16", 1.0, None), winner("tf32", 4.0, 20.0)], trials, 1, carried=1)
    _report(_Voice(False), [found], [problem], path)
    out = capsys.readouterr().out
    assert "1 trials run, 2 known for these problems; not ok: none failed.\n  1 of them carried over" in out
    assert "the best 1 of 1 measured" in out
    assert "20.0 µs  100.0 % of best" in out
    assert " 1.0 µs" not in out
    assert "20.0 µs measured (tf32); to pin it" in out


def test_render_writes_a_module_that_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "kernel.py"
    code, text, err = run("render", "transport", "--shape", "64x64x3", "output=gradient", "--out", str(out), capsys=capsys)
    assert (code, text) == (0, "")
    assert f"wrote {out}" in err
    from otgen.render import import_file

    assert callable(import_file(out).launch)


@pytest.mark.parametrize(("gpu", "emit", "suffixes"), [("a100", "ptx,cubin,sass,source", 4), ("mi300x", "hsaco,amdgcn", 2)])
def test_compile_emits(gpu: str, emit: str, suffixes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compile", "--gpu", gpu, "--family", "sinkhorn", "--shape", "256x256x16", "--emit", emit, "--out", str(tmp_path)]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 0
    assert re.search(r"half_step: grid 4, \d+ registers, 0 spilled bytes, \d+ bytes of shared memory", out)
    written = {path.suffix: path for path in tmp_path.iterdir()}
    assert len(written) == suffixes
    if gpu == "a100":
        assert written[".cubin"].read_bytes()[:4] == b"\x7fELF"
        assert ".target sm_80" in written[".ptx"].read_text()
        assert "MUFU.EX2" in written[".sass"].read_text()


def test_tune_show_why_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The main job, small: predicted winners, said so first and last; a second run finds nothing left to do; show and why agree."""
    db = str(tmp_path / "tuning.db")
    tune = ["tune", "--gpu", "a100", "--family", "sinkhorn", "--shape", "256x256x16", "--max-trials", "6", "--db", db]
    code, out, _ = run(*tune, capsys=capsys)
    lines = out.strip().splitlines()
    assert code == 0
    assert "PREDICTED" in lines[0]
    assert "none is measured" in lines[0]
    assert "PREDICTED" in lines[-1]
    assert "% of best" in out
    assert "otgen.pin('sinkhorn', schedule='symmetric', variant={" in out

    code, out, _ = run("show", "--db", db, "--json", capsys=capsys)
    winners = json.loads(out)
    assert {(winner["flags"]["schedule"], winner["precision"]) for winner in winners} >= {
        ("alternating", "tf32"),
        ("symmetric", "bf16"),
    }
    for winner in winners:
        assert winner["evidence"] == "predicted"
        assert winner["measured_us"] is None
        assert winner["predicted_us"] > 0
        assert winner["spills"] == 0

    code, out, _ = run(*tune, "--json", capsys=capsys)
    assert code == 0
    assert sorted(json.loads(out), key=str) == sorted(winners, key=str)
    with Store.open(db, readonly=True) as store:
        alternating = [winner for winner in store.winners() if winner.problem.flag("schedule") == "alternating"]
        assert len(store.trials(alternating[0].problem, "a100")) <= 12
        for winner in alternating:
            binary = store.compiled(compile_key(winner.problem, winner.variant, gpu("a100")))
            assert binary is not None
            assert binary.source_hash in digests(winner.problem, winner.variant)

    code, out, _ = run(
        "why", "sinkhorn", "256x256x16", "schedule=symmetric", "--gpu", "a100", "--precision", "tf32", "--db", db, capsys=capsys
    )
    (tf32,) = [w for w in winners if w["flags"]["schedule"] == "symmetric" and w["precision"] == "tf32"]
    assert code == 0
    assert "answer: predicted" in out
    assert " ".join(f"{axis}={value}" for axis, value in tf32["variant"].items()) in out


def test_why_says_of_a_loop_whether_solvers_take_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    us = {"loop": 8.0 * 12.0 / 1024**2, "sinkhorn": 20.0 / 1024**2}
    monkeypatch.setattr(Dispatcher, "us_per_pair", lambda self, family, *question: us[family])
    asked = ["why", "loop", "1024x1024x3", "schedule=own", "--gpu", "a100"]

    by_steps = "20 µs by steps and the Python that starts them"
    code, out, _ = run(*asked, capsys=capsys)
    assert (code, out.splitlines()[-1]) == (0, f"solvers take it: 12 µs an iteration in the loop, {by_steps}")

    us["loop"] = math.inf
    _, out, _ = run(*asked, capsys=capsys)
    assert out.splitlines()[-1] == f"solvers start single steps instead: an unknown time an iteration in the loop, {by_steps}"
