"""The wheel, built and installed where nothing of the checkout is in sight: its templates render and its winners are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from otgen.gpus import GPUS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_templates_and_databases(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for template in (ROOT / "templates").glob("*.jinja"):
        assert f"otgen/templates/{template.name}" in names
    for slug in GPUS:
        assert f"otgen/tuning_db/{slug}.db" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]


def test_an_installed_wheel_renders_and_shows(wheel: Path, tmp_path: Path) -> None:
    """A clean environment that borrows the dependencies of this one, but not the checkout."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    target = Path(site.stdout.strip())
    zipfile.ZipFile(wheel).extractall(target)
    import click

    (target / "borrowed.pth").write_text(f"import site; site.addsitedir({str(Path(click.__file__).parents[1])!r})\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OTGEN_DB")}
    environment |= {"OTGEN_CACHE": str(tmp_path / "cache"), "XDG_DATA_HOME": str(tmp_path / "data")}

    def otgen(*words: str) -> str:
        command = [python, "-m", "otgen", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout

    where = subprocess.run(
        [python, "-c", "import otgen; print(otgen.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert Path(where.stdout.strip()).is_relative_to(venv)
    assert "def launch(" in otgen(
        "render", "sinkhorn", "--gpu", "h100", "--winner", "--shape", "4096x4096x64", "schedule=symmetric"
    )
    winners = json.loads(otgen("show", "--gpu", "h100", "--json"))
    assert winners
    assert {winner["evidence"] for winner in winners} <= {"predicted", "measured"}
    assert len({(winner["n"], winner["d"]) for winner in winners if "batch" not in winner["flags"]}) == 20
