"""The worked example of docs/sharing.md, run as it stands there."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from otgen.cli import otgen
from otgen.families import family
from otgen.gpus import gpu
from otgen.problem import Variant
from otgen.resources import template_hash
from otgen.store import Accuracy, Measurement, Prediction, Store, Trial

PAGE = Path(__file__).parents[1] / "docs" / "sharing.md"


def make(path: Path, trials: list[tuple[Variant, tuple[float, float, float] | None]]) -> None:
    """A database of trials: a variant, and the lowest, middle and highest of its samples, none for a predicted one."""
    problem = family("hvp").problem(4096, 4096, 64)
    with Store.open(path) as store:
        for variant, times in trials:
            low, middle, high = times or (0.0, 0.0, 0.0)
            store.record(
                Trial(problem, "h100", variant, "ok", template_hash("hvp")),
                environment=store.environment({"gpu": "NVIDIA H100"}),
                prediction=Prediction(70.0),
                measurement=Measurement("cold L2", middle, low, high, (low, middle, high)) if times else None,
                accuracy=[Accuracy("out", 0.1, 1.0)],
            )
        store.decide(problem, "h100")


def test_the_worked_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = family("hvp")
    problem = kind.problem(4096, 4096, 64)
    default = kind.default(problem).with_(precision="tf32")
    others = (default.with_(num_warps=warps) for warps in (2, 4, 8) if warps != default["num_warps"])
    other = next(variant for variant in others if not kind.fits(problem, variant, gpu("h100")))
    make(tmp_path / "lab.db", [(default, (60.9, 61.2, 61.5)), (default.with_(precision="ieee"), None)])
    make(tmp_path / "cluster.db", [(other, (58.1, 58.4, 58.8))])
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    steps = re.split(r"^\$ otgen ", example, flags=re.MULTILINE)[1:]
    assert len(steps) == 6
    for step in steps:
        command, _, expected = step.partition("\n")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = CliRunner().invoke(otgen, shlex.split(command), catch_exceptions=False).output
        pattern = re.escape(expected).replace("\\\n…\\\n", "\n(?:.*\n)*").replace("…", ".*")
        assert re.fullmatch(pattern, output), (command, output)
