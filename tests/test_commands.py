"""The command line: documented, quick, its mistakes one sentence long and its exit codes as said.

docs/commands.md holds every command's --help; OTGEN_UPDATE_GOLDEN=1 pytest tests/test_commands.py rewrites it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from otgen.cli import COMMANDS, main, otgen
from otgen.store import Store

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
            "unknown family 'sinkorn'; known: hvp, sinkhorn, transport. Did you mean 'sinkhorn'?",
        ),
        (["render", "sinkhorn", "--shape", "8x8x8", "--gpu", "a1000"], 2, "unknown GPU 'a1000'"),
        (["render", "sinkhorn", "--shape", "8x8x8", "fusion=all"], 2, "expected fusion among half_step; got 'all'"),
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
        (["tune", "--gpu", "auto"], 1, "torch sees none"),
        (
            ["compile", "--gpu", "h100", "--family", "hvp", "--shape", "8x8x8", "--emit", "hsaco", "--out", "x"],
            2,
            "unknown output of h100's",
        ),
        (["why", "sinkhorn", "8x8x8", "--gpu", "tpu"], 2, "unknown GPU 'tpu'"),
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
        problem = store.winners()[0].problem
        assert len(store.trials(problem, "a100")) <= 12

    code, out, _ = run(
        "why", "sinkhorn", "256x256x16", "schedule=symmetric", "--gpu", "a100", "--precision", "tf32", "--db", db, capsys=capsys
    )
    (tf32,) = [w for w in winners if w["flags"]["schedule"] == "symmetric" and w["precision"] == "tf32"]
    assert code == 0
    assert "answer: predicted" in out
    assert " ".join(f"{axis}={value}" for axis, value in tf32["variant"].items()) in out
