"""benchmarks/sizes.py: flash-sinkhorn is asked the same questions, and every contender leaves a row; no time is looked at."""

from __future__ import annotations

import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """A benchmark as a module; like a script, it finds its neighbours."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


contenders, gpu, questions, sizes = (script(name) for name in ("contenders", "gpu", "questions", "sizes"))
Question = questions.Question


def test_a_dry_run_writes_a_row_for_every_contender(tmp_path: Path, streamed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.main(["--device", "cpu", "--at-most", "20", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "sizes.json").read_text())
    assert written["environment"]["not_reached"] == []
    rows = written["rows"]
    targets = {row["kind"]: row["target"] for row in rows}
    assert targets == {"loss": 5.0, "symmetric": 5.0, "alternating": 5.0, "batch": 20.0, "listed": 1.0, "hvp": 2.0}
    ours = [row for row in rows if row["contender"] == "otgen"]
    assert len(ours) == len({row["question"] for row in rows}) == 10
    for row in ours:
        assert row["status"] == "ok"
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert 0 <= row["error"] < (questions.TOL if row["kind"] == "listed" else 1e-3), row
        assert "ratio" not in row
    assert all(row["sweeps"] == 2 * row["cg_steps"] + 3 for row in ours if row["kind"] == "hvp")
    assert all(row["visited"] == 1.0 for row in ours if row["kind"] == "listed")
    peers = [row["status"] for row in rows if row["contender"] != "otgen"]
    assert set(peers) == {"left out: flash-sinkhorn takes CUDA tensors only"}
    assert "0 of 0 targets met; 10 questions without a ratio; 0 not reached" in capsys.readouterr().out


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, streamed: None) -> pytest.MonkeyPatch:
    """flash-sinkhorn's kernels run in Triton's interpreter; an autotuner would time them. otgen streams."""
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        package = pytest.importorskip("flash_sinkhorn")
        hvp = importlib.import_module("flash_sinkhorn.hvp")
        importlib.import_module("triton.experimental.gluon")  # which launches import
    monkeypatch.setattr(package, "SamplesLoss", partial(package.SamplesLoss, autotune=False))
    product, mat5 = hvp.hvp_x_sqeuclid_from_potentials, hvp.mat5_sqeuclid
    monkeypatch.setattr(hvp, "hvp_x_sqeuclid_from_potentials", partial(product, autotune=False))
    monkeypatch.setattr(hvp, "mat5_sqeuclid", lambda *points, **options: mat5(*points, **options, autotune=False))
    return monkeypatch


@pytest.mark.parametrize(
    ("question", "names"),
    [
        (Question("loss", 20, 3), ["flash"]),
        (Question("symmetric", 20, 3), ["flash"]),
        (Question("alternating", 20, 3), ["flash"]),
        (Question("batch", 20, 3, 2), ["flash", "flash loop"]),
        (Question("hvp", 20, 17), ["flash", "flash equal steps", "flash tf32", "flash dense"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Question) else "",
)
@pytest.mark.filterwarnings("ignore::otgen.errors.ConvergenceWarning")
def test_flash_answers_the_same_question(question: Any, names: list[str], interpreted: pytest.MonkeyPatch) -> None:
    """Its answer is otgen's in float64, but for the rounding of its points: same cost, schedule, number of steps, direction."""
    interpreted.setattr(questions, "ITERATIONS", 10)
    posed = questions.KINDS[question.kind](question, "cpu")
    assert [name for name in posed.contenders if name != "otgen"] == names
    reference, ours = posed.reference(), posed.contenders["otgen"]()
    steps = ours.judged(ours.run(), reference).get("cg_steps")
    for name in names:
        with interpreted.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
            patch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
            ready = posed.contenders[name]()
            said = ready.judged(ready.run(), reference)
        assert said["error"] < 1e-3, name
        assert name != "flash equal steps" or said["cg_steps"] == steps
        assert name not in ("flash", "flash tf32") or steps is None or said["sweeps"] >= 2 * said["cg_steps"] + 11


def test_half_cost_potentials_are_judged_as_those_of_the_whole_cost(monkeypatch: pytest.MonkeyPatch, streamed: None) -> None:
    """A stand-in that answers with otgen's potentials, in the units of the loss, has otgen's marginal error."""
    posed = questions.Listed(Question("listed", 60, 3), "cpu")
    ours = posed.contenders["otgen"]()
    result = ours.run()

    class Loss:
        last_multiscale_info = SimpleNamespace(accepted=True, stop="accepted", fine_updates=0, fine_work=0)

        def __init__(self, **options: Any) -> None:
            assert options["half_cost"]
            assert (options["blur"], options["tol"]) == (posed.blur, questions.TOL)

        def __call__(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return result.potential_a / 2, result.potential_b / 2

    stand_in = SimpleNamespace(SamplesLoss=Loss, preprocess_coordinates=lambda x, y, a, b: (x + 1.0, y + 1.0))
    monkeypatch.setattr(questions, "flash", lambda x, module="": stand_in)
    theirs = posed.contenders["flash multiscale"]()
    said = theirs.judged(theirs.run(), None)
    assert said["error"] == pytest.approx(ours.judged(result, None)["error"])
    assert said["error"] == pytest.approx(result.marginal_error, rel=0.05)
    assert said["error_rounded"] == pytest.approx(said["error"], rel=1e-3)


def posed_of(**seconds: float | str) -> type:
    """A kind of question whose contenders take so long, or fail."""

    def make(worth: float | str) -> Any:
        def run() -> None:
            if isinstance(worth, str):
                raise RuntimeError(worth)
            time.sleep(worth)

        return questions.Ready(run, lambda answer, reference: {"error": 0.0})

    class Posed:
        error, eps = "nothing", 1.0

        def __init__(self, question: Any, device: str) -> None:
            self.contenders = {name.replace("_", " "): partial(make, worth) for name, worth in seconds.items()}

        def reference(self) -> None:
            raise MemoryError("no room")

    return Posed


def answered(monkeypatch: pytest.MonkeyPatch, **seconds: float | str) -> Any:
    monkeypatch.setitem(questions.KINDS, "loss", posed_of(**seconds))
    monkeypatch.setitem(sizes.TARGETS, "loss", 2.0)
    answers = sizes.Answers("cpu", time.monotonic() + 60.0, {"otgen": "1", "flash-sinkhorn": "2"})
    answers.add(Question("loss", 10, 3))
    return answers


def test_ratios_are_against_the_fastest_peer_and_failures_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answered(monkeypatch, otgen=0.005, flash_slow=0.03, flash=0.015, broken="out of memory\nand more")
    ours, slow, quick, broken = answers.rows
    assert [row["version"] for row in answers.rows] == ["1", "2", "2", "2"]
    assert broken["status"] == "failed: RuntimeError: out of memory"
    assert "median_s" not in broken
    assert "ratio" not in broken
    assert ours["ratio"] == quick["ratio"] < slow["ratio"]
    assert all(row["met"] == (row["ratio"] >= 2.0) for row in (ours, slow, quick))
    assert {row["error_absent"] for row in (ours, slow, quick)} == {"failed: MemoryError: no room"}
    assert "out of memory" in sizes.table(answers.rows)


def test_a_failure_of_otgen_leaves_peers_without_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, flash = answered(monkeypatch, otgen="a launch failed", flash=0.0).rows
    assert ours["status"].startswith("failed")
    assert flash["status"] == "ok"
    assert "ratio" not in flash


def test_what_the_budget_does_not_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answered(monkeypatch, otgen=0.01)
    answers.add(Question("loss", 1000, 3))  # a hundred times the points: two minutes and more
    assert answers.rows[1]["status"].startswith("left out: two runs would take")
    answers.deadline = 0.0
    answers.add(Question("loss", 10, 64))
    assert answers.rows[2]["status"] == "left out: the time was up"
    asked = [Question("loss", 10, 2), Question("loss", 11, 2)]
    assert sizes.ask(answers, asked, lambda: None) == asked


def test_an_interruption_keeps_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answered(monkeypatch, otgen=0.0)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "_warm", interrupted)
    asked = [Question("loss", 12, 3)]
    assert sizes.ask(answers, asked, lambda: None) == asked
    assert [row["status"] for row in answers.rows] == ["ok", sizes.NOT_REACHED]


def test_the_part_fits_into_six_minutes_and_beside_tuning() -> None:
    assert gpu.LIMITS["sizes"] + gpu.GRACE <= 360
    assert gpu.LIMITS["tune"] + gpu.LIMITS["sizes"] <= gpu.TOTAL
    assert set(gpu.APART) <= set(gpu.PARTS)


def test_without_a_gpu_it_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sizes.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
