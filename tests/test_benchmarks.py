"""What the benchmarks compute and how they fail, on a CPU; none of their times is looked at."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from otgen.families import family
from otgen.problem import Problem, Variant
from otgen.resources import template_hash
from otgen.store import Accuracy, Compiled, Measurement, Prediction, Store, Trial

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """A benchmark as a module; like a script, it finds its neighbours."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


contenders, gpu, peers, prediction, skipping = (script(name) for name in ("contenders", "gpu", "peers", "prediction", "skipping"))


# --- peers


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("schedule", contenders.SCHEDULES)
@pytest.mark.parametrize("iterations", [1, 7])
def test_contenders_compute_the_same_potentials(schedule: str, iterations: int, streamed: None) -> None:
    """Equal work: the same steps from the same start, so the same potentials, converged or not."""
    task = contenders.Task.uniform(60, 3, schedule, iterations, "cpu")
    exact = contenders.dense(task.double()).run()
    for name, make in contenders.CONTENDERS["cpu"].items():
        if (name, schedule) != ("geomloss tensorized", "alternating"):
            assert peers.potential_error(task, make(task).run(), exact) < 1e-4, name


def test_a_step_is_the_softmin_of_its_formula() -> None:
    task = contenders.Task.uniform(20, 2, "alternating", 1, "cpu").double()
    cost = (task.x[:, None] - task.y).square().sum(2)
    f = -task.eps * torch.log((task.b * torch.exp(-cost / task.eps)).sum(1))
    found, _ = contenders.dense(task).run()
    torch.testing.assert_close(found, f)


def test_eps_is_a_share_of_the_mean_cost() -> None:
    task = contenders.Task.uniform(50, 3, "symmetric", 1, "cpu", share=0.25)
    assert task.eps == pytest.approx(0.25 * float(torch.cdist(task.x, task.y).square().mean()), rel=1e-5)


def test_errors_ignore_the_constant_that_potentials_may_trade() -> None:
    task = contenders.Task.uniform(30, 2, "alternating", 30, "cpu")
    f, g = contenders.dense(task.double()).run()
    assert peers.potential_error(task, (f + 3.0, g - 3.0), (f, g)) < 1e-12
    assert peers.marginal_error(task, f + 3.0, g - 3.0) == pytest.approx(peers.marginal_error(task, f, g))
    off = f.clone()
    off[4] += 0.5 * task.eps
    assert peers.potential_error(task, (off, g), (f, g)) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(("schedule", "fused"), [("alternating", None), ("symmetric", True), ("symmetric", False)])
def test_flash_is_given_the_same_problem(schedule: str, fused: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs its kernels, once they believe their tensors to be on a GPU."""
    pytest.importorskip("flash_sinkhorn")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    task = contenders.Task.uniform(40, 3, schedule, 2, "cpu")
    found = contenders.flash(task, autotune=False, fused=fused).run()
    monkeypatch.undo()
    assert peers.potential_error(task, found, contenders.dense(task.double()).run()) < 1e-4


def test_geomloss_online_says_what_is_missing() -> None:
    from geomloss._legacy import sinkhorn_samples

    if sinkhorn_samples.keops_available:
        pytest.skip("pykeops is installed")
    with pytest.raises(contenders.Unfit, match="pykeops"):
        contenders.geomloss(contenders.Task.uniform(8, 2, "symmetric", 1, "cpu"), online=True)


def test_dense_is_left_out_when_its_matrices_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CPU_BYTES", 1000)
    with pytest.raises(contenders.Unfit, match="dense matrices take"):
        contenders.dense(contenders.Task.uniform(50, 2, "symmetric", 1, "cpu"))


def test_a_comparison_on_the_cpu_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], streamed: None) -> None:
    code = peers.main(["--device", "cpu", "--sizes", "40", "--dims", "3", "--iterations", "2", "--out", str(tmp_path)])
    assert code == 0
    written = json.loads((tmp_path / "peers.json").read_text())
    assert (
        written["environment"]["torch"] == torch.__version__.split("+")[0] or written["environment"]["torch"] == torch.__version__
    )
    rows = {(row["schedule"], row["contender"]): row for row in written["rows"]}
    assert len(rows) == len(contenders.SCHEDULES) * len(contenders.CONTENDERS["cpu"])
    otgen = rows["symmetric", "otgen"]
    assert otgen["steps"] == 4
    assert otgen["precision"] == "fp32"
    assert otgen["ms_per_step"] > 0
    assert len(otgen["solves_s"]) >= peers.FEWEST
    assert otgen["marginal_error"] == pytest.approx(otgen["marginal_error_float64"], rel=1e-3)
    assert rows["alternating", "geomloss tensorized"]["status"] == "left out: GeomLoss has no alternating schedule"
    assert "ms per step" in capsys.readouterr().out


def test_without_a_gpu_a_comparison_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def fake(seconds: float = 0.0, fails: str = "") -> Any:
    def make(task: Any) -> Any:
        def run() -> Any:
            if fails:
                raise RuntimeError(fails)
            time.sleep(seconds)
            return torch.zeros(len(task.x)), torch.zeros(len(task.y))

        return contenders.Contender(run, "ieee")

    return make


def test_failures_slow_solves_and_the_end_of_the_budget_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    field = {"slow": fake(0.02), "broken": fake(fails="out of memory\nand more"), "quick": fake()}
    monkeypatch.setitem(peers.CONTENDERS, "cpu", field)
    monkeypatch.setattr(peers, "SLOW_S", 0.01)
    monkeypatch.setattr(peers, "LONGEST_S", 0.1)
    comparison = peers.Comparison("cpu", time.monotonic() + 60)
    comparison.add(10, 2, "symmetric", 1)
    slow, broken, quick = comparison.rows
    assert len(slow["solves_s"]) == 1
    assert broken["status"] == "failed: RuntimeError: out of memory"
    assert "ms_per_step" not in broken
    assert len(quick["solves_s"]) >= peers.FEWEST

    comparison.add(100, 2, "symmetric", 1)
    assert comparison.rows[3]["status"].startswith("left out: a solve would take")
    comparison.deadline = 0.0
    comparison.add(10, 3, "symmetric", 1)
    assert {row["status"] for row in comparison.rows[6:]} == {"left out: the time was up"}
    assert "failed" in peers.table(comparison.rows)


def test_a_plot_is_drawn_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"schedule": s, "d": 3, "n": n, "contender": "otgen", "ms_per_step": 1.0 * n} for s in peers.SCHEDULES for n in (2, 4)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not peers.plot(rows, tmp_path / "peers.png", "a GPU")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert peers.plot(rows, tmp_path / "peers.png", "a GPU")
    assert (tmp_path / "peers.png").stat().st_size > 1000


# --- prediction


def test_ranks_share_the_mean_of_equal_values() -> None:
    assert prediction.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 10), (2, 20), (3, 30), (4, 400)], 1.0),
        ([(1, 3), (2, 2), (3, 1)], -1.0),
        ([(1, 1), (2, 3), (3, 2), (4, 4)], 0.8),
        ([(1, 1), (2, 2)], None),
        ([(1, 1), (1, 2), (1, 3)], None),
    ],
)
def test_spearman(pairs: list[tuple[float, float]], expected: float | None) -> None:
    found = prediction.spearman(pairs)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_regret_is_what_trusting_the_favourites_costs() -> None:
    pairs = [(1.0, 15.0), (2.0, 11.0), (3.0, 10.0)]
    assert [prediction.regret(pairs, k) for k in (1, 2, 3)] == pytest.approx([0.5, 0.1, 0.0])


def database(path: Path, times: list[tuple[float, float | None]]) -> Problem:
    """Trials of one problem, predicted and, unless None, measured."""
    problem = family("sinkhorn").problem(4096, 4096, 64)
    with Store.open(path) as store:
        environment = store.environment({"gpu": "NVIDIA H200"})
        for number, (predicted, measured) in enumerate(times):
            variant = Variant(family("sinkhorn").default(problem), BLOCK_M=16 << number % 5, num_stages=1 + number // 5)
            store.record(
                Trial(problem, "h200", variant, "ok", template_hash("sinkhorn")),
                environment=environment,
                compiled=Compiled(f"key{number}", "hash", 64, 0, 1024),
                prediction=Prediction(predicted),
                measurement=None if measured is None else Measurement("events", measured, measured, measured),
                accuracy=[Accuracy("rho", 0.0, 1.0)],
            )
        store.decide(problem, "h200")
    return problem


def test_predictions_are_compared_with_the_measurements_of_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "tuning.db", tmp_path / "new" / "prediction.json"
    problem = database(path, [(10.0, 30.0), (20.0, 40.0), (30.0, 24.0), (40.0, 80.0), (50.0, None)])
    assert prediction.main([str(path), "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert row["problem"] == str(problem)
    assert row["variants"] == 4
    assert row["spearman"] == pytest.approx(0.4)
    assert row["regret_1"] == pytest.approx(0.25)
    assert row["regret_8"] == 0.0
    assert row["ratio"] == pytest.approx(2.0)
    assert str(problem) in capsys.readouterr().out


def test_a_database_without_measurements_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database(tmp_path / "tuning.db", [(10.0, None)])
    assert prediction.main([str(tmp_path / "tuning.db")]) == 1
    assert "otgen tune --gpu auto" in capsys.readouterr().err
    assert prediction.main([str(tmp_path / "absent.db")]) == 1


# --- the GPU's one command


def python(code: str) -> Any:
    return lambda out, seconds: [sys.executable, "-c", code]


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu, "LIMITS", {"hangs": 1.0, "deaf": 1.0})
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    parts = {
        "fails": python("print('so far'); raise SystemExit(3)"),
        "hangs": python("import time; time.sleep(60)"),
        "deaf": python(deaf),
        "fine": python("import os; print(os.environ['TRITON_INTERPRET'], os.environ['OTGEN_DB'])"),
    }
    results = gpu.run(list(parts), parts, tmp_path, 30.0, python("print('ahead')"))
    outcomes = {result.part: (result.outcome, result.last_line) for result in results}
    assert outcomes["fails"] == ("failed (3)", "so far")
    assert outcomes["hangs"][0] == "out of time"
    assert outcomes["deaf"] == ("out of time", "deaf")
    assert outcomes["fine"] == ("ok", f"0 {tmp_path / 'tuning.db'}")
    assert outcomes["prepare"] == ("ok", "ahead")
    assert "so far" in (tmp_path / "log.txt").read_text()
    assert gpu.table(results).count("\n") == 5


def test_parts_for_which_no_time_is_left_are_not_begun(tmp_path: Path) -> None:
    (result,) = gpu.run(["fine"], {"fine": python("")}, tmp_path, 0.0, None)
    assert result.outcome == "not begun"


def test_the_parts_fit_into_nine_minutes_and_name_what_exists(tmp_path: Path) -> None:
    assert gpu.TOTAL + 2 * gpu.GRACE <= 540  # the last part's interruption, and this process's own start
    assert list(gpu.LIMITS) == list(gpu.PARTS)
    for part in gpu.PARTS.values():
        command = part(tmp_path, 100.0)
        assert all((gpu.ROOT / word).exists() for word in command if word.startswith(("benchmarks/", "tests/")))


def test_the_set_that_is_tuned_is_understood_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the point where the GPU is looked for."""
    from click.testing import CliRunner

    from otgen.cli import otgen

    def absent() -> None:
        raise LookupError("looked for the GPU")

    monkeypatch.setattr(importlib.import_module("otgen.cli.tune"), "detect", absent)
    command = gpu.tune(tmp_path, 100.0)
    result = CliRunner().invoke(otgen, command[command.index("otgen") + 1 :])
    assert isinstance(result.exception, LookupError), result.output


# --- skipping


@pytest.mark.parametrize("pair", skipping.PAIRS)
def test_what_is_skipped_is_counted(pair: str, streamed: None) -> None:
    """The error of a sample of rows is about the error reported, and smaller blocks let fewer pairs through."""
    result, row = skipping.solved(pair, 2000, 0.05, 1e-3, "listed")
    assert row["stop"] == "tol"
    assert 0.2 * row["marginal_error"] < row["wrong"] < 5 * row["marginal_error"]
    shares = [row["visited"] for row in skipping.by_width(result, pair, 2000)]
    assert shares == sorted(shares)
    assert shares[0] < 0.8
