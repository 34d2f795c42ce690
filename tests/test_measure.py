"""Timing without a GPU: the statistics, the rounds, the input that is timed, and a tuner whose measurements are made up."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import standard

from otgen import measure, run, tuner
from otgen.compile import Inspection
from otgen.families import FAMILIES, batches, family
from otgen.gpus import gpu
from otgen.isa import Mix
from otgen.measure import Points, Timing, interleave, quantile
from otgen.pool import Outcome, Role
from otgen.problem import Problem, Variant
from otgen.store import Store
from otgen.tuner import Settings, tune
from otgen.verify import Accuracy, call_arguments
from otgen.workload import CompiledLaunch

PROBLEMS = [problem for kind in FAMILIES.values() for problem in standard(kind, 1500, 1100, 7)]
BATCHES = [problem for kind in FAMILIES.values() if "batch" in kind.flags for problem in standard(kind, 150, 110, 7, batch=3)]


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.5, 2.5), (0.2, 1.6), (1.0, 4.0)])
def test_quantile_interpolates(q: float, expected: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(expected)
    assert quantile([7.0], q) == 7.0


class FakeTimer:
    """Calls return their own time; the first look at each takes a compiler's second."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, call: Any) -> float:
        name, us = call()
        self.seen.append(name)
        return 1e6 if self.seen.count(name) == 1 else us


def test_calls_take_turns_in_rotated_order_and_a_compiling_run_does_not_count() -> None:
    timer = FakeTimer()
    samples = interleave([lambda: ("a", 500.0), lambda: ("b", 1000.0)], timer)
    rounds = int(measure.BUDGET_MS * 1000 / 1000)
    assert samples == [[500.0] * rounds, [1000.0] * rounds]
    timed = timer.seen[-2 * rounds :]
    assert timed[:4] == ["a", "b", "b", "a"]


@pytest.mark.parametrize(("us", "rounds"), [(1.0, measure.MOST), (1e6, measure.FEWEST)])
def test_the_number_of_rounds_has_bounds(us: float, rounds: int) -> None:
    assert [len(s) for s in interleave([lambda: ("a", us)], FakeTimer())] == [rounds]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_input_of_any_size_has_its_shapes_and_known_outputs(problem: Problem) -> None:
    """The sample's reference is the dense one's: `compare` accepts it, and sees an element that is wrong or was not written."""
    kind = family(problem.family)
    points = Points.of(problem)
    given = points.given()
    expected = kind.reference(problem, given)
    call = call_arguments(problem, given, "cpu")
    variant = kind.default(problem)
    for name, value in expected.items():
        call[name].copy_(value)
    checks = points.compare(variant, call)
    assert {check.output for check in checks} == set(expected)
    assert all(check.ok for check in checks)

    name = checks[-1].output
    call[name][1] = torch.nan
    assert not points.compare(variant, call)[-1].ok
    call[name].copy_(expected[name])
    call[name][-1] += 1.0 + call[name].abs().max()
    assert [check.output for check in points.compare(variant, call) if not check.ok] == [name]


@pytest.mark.parametrize("problem", BATCHES, ids=str)
def test_a_batch_is_one_problem_repeated_and_its_ends_are_compared(problem: Problem) -> None:
    kind = family(problem.family)
    points = Points.of(problem)
    given = points.given()
    assert given["x"].shape == (3, 150, 7)
    assert given["y"].shape == (3, 150 if problem.own else 110, 7)
    one = batches.one_of(problem)
    expected = kind.reference(one, Points.of(one).given())
    call = call_arguments(problem, given, "cpu")
    for name, value in expected.items():
        call[name].copy_(value.expand(call[name].shape))
    assert all(check.ok for check in points.compare(kind.default(problem), call))
    name = next(iter(expected))
    call[name][-1] += 1.0 + call[name].abs().max()
    assert [check.output for check in points.compare(kind.default(problem), call) if not check.ok] == [name]


@pytest.mark.parametrize("size", [1, 17, 4096, 65536])
def test_what_is_timed_never_redoes_a_shifted_sweep(size: int) -> None:
    """A redo takes as long as the sweep: one block of the test input would double the time of a small problem."""
    problem = family("sinkhorn").problem(size, size, 3, schedule="symmetric")
    points = Points.of(problem)
    part = replace(points, rows=points.rows[:64])
    sums = family("sinkhorn").reference(replace(problem, n=len(part.rows)), part.given())["rho"]
    assert float(sums.min()) > 2.0**-80
    assert float(sums.max()) < 2.0**120


class InlinePool:
    """Runs tasks in this process, in the order they were submitted."""

    def __init__(self, **roles: Role) -> None:
        self.roles = roles
        self._tasks: deque[tuple[Any, Any, tuple[Any, ...]]] = deque()

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __len__(self) -> int:
        return len(self._tasks)

    def submit(self, role: str, key: Any, function: Any, *arguments: Any) -> None:
        assert role in self.roles
        self._tasks.append((key, function, arguments))

    def next(self) -> Outcome:
        key, function, arguments = self._tasks.popleft()
        try:
            return Outcome(key, "ok", value=function(*arguments), seconds=0.01)
        except RuntimeError as error:
            return Outcome(key, "error", error=error, message=f"RuntimeError: {error}", seconds=0.01)


def compiled(problem: Problem, variant: Variant, slug: str) -> list[CompiledLaunch]:
    mix = Mix(slots=64.0, mufu=8.0, fp32=16.0, alu=4.0, shared=4.0, shuffle=1.0)
    launches = family(problem.family).work(problem, variant).launches
    return [CompiledLaunch("k", variant.int("num_warps"), 64, 0, 4096, mix) for _ in launches]


def microseconds(variant: Variant) -> float:
    return 1000.0 / variant.int("BLOCK_M") + variant.int("BLOCK_N")


def measured(problem: Problem, variant: Variant) -> tuple[list[Accuracy], Timing | None]:
    """bf16 is wrong, fp16 reads where it must not, all others take a time that only the tile decides."""
    if variant["precision"] == "fp16":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if variant["precision"] == "bf16":
        return [Accuracy("rho", 0.1, 0.01), Accuracy("u_out", 0.0, 0.01)], None
    us = microseconds(variant)
    return [Accuracy("rho", 0.001, 0.01)], Timing((us - 1, us, us + 1), (300.0, 400.0, 500.0), 1700.0, 45.0, None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuner, "Pool", InlinePool)
    monkeypatch.setattr(
        run, "inspect_variants", lambda p, variants, slug: [Inspection(compiled(p, v, slug), None, 0.1) for v in variants]
    )
    monkeypatch.setattr(run, "measure", measured)
    with Store.open(tmp_path / "tuning.db") as opened:
        yield opened


def test_a_measuring_run_stores_what_it_measured(store: Store) -> None:
    problem = family("sinkhorn").problem(4096, 4096, 16)
    (summary,) = tune([problem], gpu("h200"), store, Settings(max_trials=24, jobs=2, measured=True), lambda progress: None)

    assert {w.precision for w in summary.winners} == {"ieee", "tf32x3", "bf16x3", "bf16x6", "fp16x3", "tf32"}
    good = [trial for trial in summary.trials if trial.status == "ok"]
    for winner in summary.winners:
        assert winner.evidence == "measured"
        rivals = [trial.measured_us for trial in good if trial.variant["precision"] == winner.precision]
        assert winner.measured_us == min(rivals) == microseconds(winner.variant)
        assert winner.predicted_us is not None
    assert summary.failures.keys() == {"wrong_result", "illegal_access"}
    wrong = next(trial for trial in summary.trials if trial.status == "wrong_result")
    assert wrong.measured_us is None
    assert wrong.error == pytest.approx(10.0)
    assert wrong.message == "rho: error 0.1 exceeds the budget 0.01"


def test_a_measurement_keeps_the_default_and_the_state_of_the_gpu(store: Store) -> None:
    import sqlite3

    problem = family("sinkhorn").problem(4096, 4096, 16)
    list(tune([problem], gpu("h200"), store, Settings(max_trials=6, jobs=1, measured=True), lambda progress: None))
    with sqlite3.connect(store.path) as connection:
        columns = "protocol, default_us, p20_us <= median_us, sm_clock_mhz, temperature_c, power_w"
        rows = set(connection.execute(f"SELECT {columns} FROM measurement"))
        assert rows == {(measure.PROTOCOL, 400.0, 1, 1700.0, 45.0, None)}
        ((named,),) = connection.execute("SELECT gpu FROM environment").fetchall()
    assert named == "NVIDIA H200"


def test_a_measurement_replaces_a_prediction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the predicted time, a measured variant comes before it."""
    problem = family("sinkhorn").problem(4096, 4096, 16)
    fine = [Accuracy("rho", 0.001, 0.01)]
    monkeypatch.setattr(run, "interpret", lambda problem, variant: fine)
    (before,) = tune([problem], gpu("h200"), store, Settings(max_trials=6, jobs=1), lambda progress: None)
    (after,) = tune([problem], gpu("h200"), store, Settings(max_trials=12, jobs=1, measured=True), lambda progress: None)
    assert {winner.evidence for winner in before.winners} == {"predicted"}
    assert {winner.evidence for winner in after.winners if winner.precision == "tf32"} == {"measured"}
