"""Instruction counts of the static benchmark: flash-sinkhorn's own kernels, ours beside them, and the tables made of both."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from otgen.families import family
from otgen.gpus import gpu
from otgen.pool import Pool, Role
from otgen.precision import MODES

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A benchmark as a module; like a script, it finds its neighbours."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module(name)


static, slots, report, debiased = (script(name) for name in ("static", "slots", "slots_report", "debiased"))


@pytest.fixture(scope="module")
def flash() -> ModuleType:
    pytest.importorskip("flash_sinkhorn")
    return script("flash_kernels")


@pytest.fixture(scope="module")
def compiling() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process whose Triton compiles."""
    with Pool(compile=Role(1, 120.0, {"TRITON_INTERPRET": None})) as pool:

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            pool.submit("compile", None, function, *arguments)
            outcome = pool.next()
            assert outcome.status == "ok", outcome.message
            return outcome.value

        yield call


def question(name: str) -> Any:
    """The one whose name begins so."""
    return next(q for q in static.QUESTIONS if q.name.startswith(name))


# --- flash-sinkhorn's kernels


LEANEST = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
"""Of all its configurations the one of fewest issue slots at d = 64 in TF32 (benchmarks/results/static/slots.json)."""


@pytest.mark.parametrize(
    ("name", "slug", "known", "sweeps"),
    [("HALF_STEP", "h100", 8.7, 1), ("SYMMETRIC", "h100", 24.4, 2), ("HALF_STEP", "a100", 11.8, 1), ("SYMMETRIC", "a100", 26.9, 2)],
)
def test_their_kernels_cost_what_is_known_of_them(
    compiling: Callable[..., Any], flash: ModuleType, name: str, slug: str, known: float, sweeps: int
) -> None:
    """Known: earlier counts of the same kernels at d = 64 in TF32, issue slots per pair, made without this counter."""
    (count,) = compiling(flash.counts, getattr(flash, name), 64, True, [LEANEST], slug)
    assert count.units["slots"] == pytest.approx(known, rel=0.03)
    assert count.sweeps == sweeps
    assert 1.0 <= count.units["mufu"] / sweeps < 1.2


def test_a_rolled_loop_is_counted_as_often_as_it_runs(compiling: Callable[..., Any], flash: ModuleType) -> None:
    """512 coordinates are too many to unroll; the multiplications of fp32 kernels give the number away: one per coordinate."""
    small = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    (count,) = compiling(flash.counts, flash.HALF_STEP, 512, False, [small], "h100")
    assert count.units["fp32"] == pytest.approx(512, rel=0.05)


def test_what_does_not_fit_into_shared_memory_is_left_out(compiling: Callable[..., Any], flash: ModuleType) -> None:
    large = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 8}
    assert compiling(flash.counts, flash.HALF_STEP, 512, True, [large], "a100") == []


@pytest.mark.parametrize(("name", "tried"), [("SYMMETRIC", 56), ("SYMMETRIC_LARGE", 44), ("HALF_STEP", 44)])
def test_all_their_configurations_are_found(flash: ModuleType, name: str, tried: int) -> None:
    found, plain = flash.configurations(getattr(flash, name), 64, tf32=True)
    assert len({tuple(config.items()) for config in found}) == tried
    assert LEANEST in found[: static.FEW]
    assert set(plain) == set(LEANEST)


def test_a_step_of_several_launches_costs_them_all(compiling: Callable[..., Any], flash: ModuleType) -> None:
    step = flash.SYMMETRIC_LARGE
    once, twice = (compiling(flash.counts, s, 64, True, [LEANEST], "h100")[0] for s in (replace(step, launches=1), step))
    assert twice.units == {unit: 2 * number for unit, number in once.units.items()}
    assert twice.sweeps == 2.0


def test_what_their_module_launches_is_restored(flash: ModuleType) -> None:
    before = dict(vars(flash.kernels))
    flash.configurations(flash.HALF_STEP, 64, tf32=True)
    assert dict(vars(flash.kernels)) == before


def test_their_debiased_iteration_takes_six_sweeps(compiling: Callable[..., Any], flash: ModuleType) -> None:
    """Three problems, each with a launch of two sweeps."""
    assert compiling(flash.debiased_sweeps, "h100") == 6.0


# --- ours


def test_sweeps_follow_the_fusion() -> None:
    problem = family("sinkhorn").problem(4096, 4096, 64, schedule="symmetric")
    default = family("sinkhorn").default(problem).with_(stabiliser="shifted")
    assert slots.sweeps(problem, default.with_(fusion="one_sweep")) == 1.0
    assert slots.sweeps(problem, default.with_(fusion="two_launches")) == 2.0


def test_our_debiased_iteration_is_counted_in_what_the_solver_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem between two clouds with both sums, and half of each side's own: one kernel sweeps, one updates."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sweeps, launches = debiased.debiased_iteration("h100")
    assert 2.0 <= sweeps <= static.DEBIASED
    assert launches == 2


def test_winners_round_no_more_than_asked() -> None:
    problem = family("sinkhorn").problem(65536, 65536, 3)
    found = debiased.winners(problem, "h100", "ieee")
    assert {winner.precision for winner in found} == {mode for mode in MODES if MODES[mode].floor == MODES["ieee"].floor}
    assert [winner.us for winner in found] == sorted(winner.us for winner in found)


# --- rows


def count(slots_per_pair: float, mufu: float = 1.0, spills: int = 0) -> Any:
    return slots.Count({}, 1.0, dict.fromkeys(slots.UNITS, 0.0) | {"slots": slots_per_pair, "mufu": mufu}, 128, spills)


@pytest.mark.parametrize(("slots_per_pair", "mufu", "bound"), [(9.5, 1.0, 9.5), (3.0, 1.0, 8.0), (9.5, 2.0, 16.0)])
def test_the_bound_is_the_issue_rate_or_the_exponentials(slots_per_pair: float, mufu: float, bound: float) -> None:
    assert count(slots_per_pair, mufu).bound(gpu("h100")) == bound


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (count(6.2, 1.02), True),
        (count(6.21, 1.0), False),
        (count(6.0, 1.03), False),
        (count(6.0, 1.0, spills=8), False),
    ],
)
def test_a_target_is_met_by_numbers_and_without_spills(found: Any, met: bool) -> None:
    task = static.Task(question("symmetric"), "h100", "otgen", "one_sweep", "tf32", "winner")
    assert static.row(task, [found])["met"] is met


def test_fewest_slots_of_theirs_may_spill_and_of_ours_may_not() -> None:
    counts = [count(5.0, spills=4), count(6.0)]
    theirs = static.Task(question("symmetric"), "h100", "flash-sinkhorn", "lse", "tf32", "fewest")
    ours = replace(theirs, library="otgen")
    assert static.row(theirs, counts)["slots"] == 5.0
    assert static.row(ours, counts)["slots"] == 6.0
    assert "met" not in static.row(theirs, counts)


def test_a_small_survey_counts_both_libraries(flash: ModuleType) -> None:
    """One step on one GPU, of both: every row was compiled, and says of what it is the count."""
    small = replace(question("half-step, d = 64"), accuracy="ieee", theirs=(static.Peer("HALF_STEP", few=True),))
    result = static.survey([small], ["h100"], theirs=True)
    rows = {(row["library"], row["pick"]): row for row in result["rows"]}
    assert set(rows) == {("otgen", "winner"), ("flash-sinkhorn", "fewest of 4"), ("flash-sinkhorn", "default")}
    for row in rows.values():
        assert row["slots"] > row["mufu"] >= row["sweeps"] == 1.0
        assert row["registers"] > 32
        assert row["config"]["BLOCK_M"] >= 16
    assert rows["flash-sinkhorn", "fewest of 4"]["slots"] <= rows["flash-sinkhorn", "default"]["slots"]
    assert result["debiased"]["h100"]["flash-sinkhorn"] == 6.0
    for text in (report.table(result), report.summary(result)):
        assert all(line.startswith("|") and line.count("|") > 4 for line in text.splitlines() if line)


def test_without_flash_sinkhorn_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "flash_kernels", None)
    assert static.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_shows_what_was_counted() -> None:
    """The last tables that benchmarks/static.py printed when it wrote its result, word for word."""
    result = json.loads(static.RESULT.read_text(encoding="utf-8"))
    assert report.summary(result) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert {(row["step"], row["gpu"]) for row in result["rows"]} == {
        (q.name, slug) for q in static.QUESTIONS for slug in static.GPUS
    }
