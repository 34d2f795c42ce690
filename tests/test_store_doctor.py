"""`otgen diff` and `otgen doctor`."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from toy_family import install, put, variant

from otgen.cli import main, otgen
from otgen.cli.doctor import _tools
from otgen.errors import UsageError
from otgen.problem import Problem
from otgen.store import Store
from otgen.store.health import NETWORK, file_system_of

TOOLS = _tools()


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The toy family, its own databases, and versions that need not be asked for again."""
    install(monkeypatch)
    monkeypatch.setenv("OTGEN_DB", str(tmp_path / "own.db"))
    monkeypatch.setattr("otgen.store.winners.resource", lambda folder: tmp_path / "shipped")
    monkeypatch.setattr("otgen.cli.doctor._tools", lambda: TOOLS)


def run(*words: object) -> Result:
    return CliRunner().invoke(otgen, [*map(str, words)], catch_exceptions=False)


def database(path: Path, problem: Problem, **trials: float | dict[str, float]) -> Path:
    """A database with one trial per precision mode, predicted unless it says otherwise."""
    with Store.open(path) as store:
        for precision, how in trials.items():
            options = how if isinstance(how, dict) else {"predicted": how}
            put(store, problem, choice=variant(precision, BLOCK_M=int(options.pop("block", 32))), **options)
        store.decide(problem, "a100")
    return path


def test_databases_that_agree(tmp_path: Path, problem: Problem) -> None:
    a = database(tmp_path / "a.db", problem, ieee=2.0, tf32=1.0)
    result = run("diff", a, a)
    assert (result.exit_code, result.stdout) == (0, "0 added, 0 removed, 0 changed, 2 the same\n")


def test_what_was_added_removed_and_changed(tmp_path: Path, problem: Problem) -> None:
    a = database(tmp_path / "a.db", problem, ieee=4.0, tf32=2.0)
    b = database(tmp_path / "b.db", problem, ieee={"measured": 3.0, "block": 16}, bf16=1.0)
    with closing(sqlite3.connect(b)) as connection, connection:
        connection.execute("UPDATE winner SET template_hash = 'old' WHERE precision = 'ieee'")
    before = [path.read_bytes() for path in (a, b)]
    result = run("diff", a, b)
    title = "toy[schedule=alternating,width=1] 1024x2048x64 fp32 a100"
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"- {title} tf32: 2 µs predicted, BLOCK_K=64 BLOCK_M=32 precision=tf32",
        f"+ {title} bf16: 1 µs predicted, BLOCK_K=64 BLOCK_M=32 precision=bf16",
        f"~ {title} ieee: BLOCK_M 32 → 16; 4 µs predicted → 3 µs measured; template 0123456789ab → old",
        "1 added, 1 removed, 1 changed, 0 the same",
    ]
    result = run("diff", a, b, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [winner["precision"] for winner in found["added"] + found["removed"]] == ["bf16", "tf32"]
    (changed,) = found["changed"]
    assert changed["fields"] == ["variant", "evidence", "measured_us", "predicted_us", "template_hash"]
    assert (changed["before"]["predicted_us"], changed["after"]["measured_us"]) == (4.0, 3.0)
    assert [path.read_bytes() for path in (a, b)] == before


def test_a_file_that_cannot_be_read_is_not_a_difference(tmp_path: Path, problem: Problem) -> None:
    a = database(tmp_path / "a.db", problem, ieee=1.0)
    with pytest.raises(UsageError, match="found no file") as caught:
        run("diff", a, tmp_path / "none.db")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("diff", "a.db", "a.db"), 0),
        (("diff", "a.db", "b.db"), 1),
        (("diff", "a.db", "none.db"), 2),
        (("merge", "a.db", "none.db", "-o", "c.db"), 1),
        (("merge", "a.db", "b.db", "-o", "b.db"), 2),
        (("export", "--format", "json", "--db", "none.db"), 1),
        (("import", "c.json", "--db", "c.db"), 2),
        (("doctor", "--db", "a.db"), 0),
        (("doctor", "--db", "none.db"), 1),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    problem: Problem,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    database(tmp_path / "a.db", problem, ieee=1.0)
    database(tmp_path / "b.db", problem, ieee=2.0)
    (tmp_path / "c.json").write_text('{"format": "otgen trials", "version": 1, "trials": [{}]}')
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert (ended.value.code or 0) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") <= 1


def report(*words: object) -> tuple[int, dict[str, object]]:
    result = run("doctor", "--json", *words)
    return result.exit_code, json.loads(result.stdout)


def test_a_healthy_database_and_the_place_it_was_looked_for(tmp_path: Path, problem: Problem) -> None:
    own = database(tmp_path / "own.db", problem, ieee=1.0, tf32={"measured": 2.0})
    with Store.open(own) as store:
        store.snapshot(tmp_path / "shipped" / "a100.db")
        result = run("doctor")
    assert result.exit_code == 0
    assert f"$OTGEN_DB       {own}  <- used" in result.stdout
    assert f"{own}: 2 trials, 2 winners, 1 measured; " in result.stdout
    lines = [line for line in result.stdout.splitlines() if "integrity ok" in line]
    assert [" wal journal" in line for line in lines] == [True, False]
    code, found = report()
    assert (code, found["used"], found["gpus"]) == (0, str(own), [])
    assert [database["path"] for database in found["databases"]] == [str(own), str(tmp_path / "shipped" / "a100.db")]


def test_no_database_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTGEN_DB")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    text = run("doctor").stdout
    assert "$OTGEN_DB       not set" in text
    assert f"{tmp_path}/otgen/tuning.db  <- used" in text
    assert "is not there yet; `otgen tune` makes it" in text
    assert "GPU: no GPU here" in text
    assert "0 databases: 0 broken, 0 with warnings." in text


def test_stale_rows_and_other_versions_are_warnings(tmp_path: Path, problem: Problem) -> None:
    own = database(tmp_path / "own.db", problem, ieee=1.0, tf32=1.0)
    with closing(sqlite3.connect(own)) as connection, connection:
        connection.execute("UPDATE winner SET template_hash = 'old' WHERE precision = 'ieee'")
        connection.execute("UPDATE environment SET triton = '2.0.0', ptxas = '', otgen = ?", (TOOLS["otgen"],))
    code, found = report()
    (health,) = found["databases"]
    assert code == 0
    assert len(health["warnings"]) == 2
    assert "1 of 2 winners are stale" in health["warnings"][0]
    assert f"2 winners were found with triton 2.0.0; here it is {TOOLS['triton']}" in health["warnings"][1]
    assert (health["stale"], health["broken"]) == (1, [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"notes" * 1000), "is corrupt"),
        (lambda path: path.write_bytes(path.read_bytes()[:-6000]), "is corrupt|integrity check fails"),
        (lambda path: execute(path, "CREATE TRIGGER t AFTER INSERT ON trial BEGIN SELECT 1; END"), "holds the trigger 't'"),
        (lambda path: execute(path, "INSERT INTO _sqlite_migrations VALUES (9, 'otgen', '0099', '')"), "from a newer otgen"),
        (lambda path: execute(path, "DELETE FROM _sqlite_migrations"), "of another program"),
        (lambda path: path.unlink(), "found no file"),
    ],
)
def test_a_broken_database_is_an_exit_code(
    tmp_path: Path, problem: Problem, damage: Callable[[Path], object], message: str
) -> None:
    with Store.open(database(tmp_path / "own.db", problem, ieee=1.0)) as store:
        store.snapshot(tmp_path / "plain.db")
    damage(tmp_path / "plain.db")
    before = sorted(tmp_path.iterdir())
    result = run("doctor", "--db", tmp_path / "plain.db")
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "broken: " in line]
    assert re.search(message, line)
    assert "1 databases: 1 broken" in result.stdout
    assert sorted(tmp_path.iterdir()) == before


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def test_a_network_file_system_is_warned_about(tmp_path: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"23 22 0:50 / {tmp_path} rw,relatime shared:2 - nfs4 server:/home rw\n"
        f"24 22 0:51 / {tmp_path}/with\\040space rw - tmpfs tmpfs rw\n"
        "a line of another kind\n"
    )
    monkeypatch.setattr("otgen.store.health.MOUNTS", mounts)
    assert file_system_of(Path("/etc/x")) == "ext4"
    assert file_system_of(tmp_path / "not" / "there.db") == "nfs4"
    assert file_system_of(tmp_path / "with space" / "a.db") == "tmpfs"
    assert not "ext4".startswith(NETWORK)
    database(tmp_path / "own.db", problem, ieee=1.0)
    assert "warning: it lies on a network file system (nfs4)" in run("doctor").stdout
    monkeypatch.setattr("otgen.store.health.MOUNTS", tmp_path / "none")
    assert "unknown file system" in run("doctor").stdout


def test_the_state_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("not supported")

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"NVIDIA H200",
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlDeviceGetClockInfo=lambda handle, clock: 1980,
        NVML_CLOCK_SM=1,
        nvmlDeviceGetTemperature=lambda handle, sensor: 34,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetPowerUsage=lambda handle: 76_500,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 << 30),
        nvmlDeviceGetUtilizationRates=missing,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert "GPU: name NVIDIA H200, driver 570.1, sm_clock_mhz 1980, temperature_c 34, power_w 76.5" in run("doctor").stdout
    _, found = report()
    assert found["gpus"][0]["memory_used_mib"] == 3072
    assert found["gpus"][0]["busy_percent"] is None
    nvml.nvmlInit = missing
    assert "GPU: no GPU here" in run("doctor").stdout


def test_the_versions_here() -> None:
    from importlib.metadata import version

    assert TOOLS["triton"] == version("triton")
    assert TOOLS["ptxas"][0].isdigit()
