"""Sweeps that another launch finishes: sums in a fixed order, to the last bit, and a debiased step's three problems at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from otgen.families import family, sinkhorn, tiles
from otgen.gpus import gpu
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.verify import call_arguments, failures, verify

KIND = family("sinkhorn")
SWEEPS = {"symmetric": "one_sweep", "own": "half_sweep", "debiased": "three_sweeps"}
SHAPES = [(1, 1, 1), (1, 37, 5), (37, 1, 16), (70, 45, 17), (130, 31, 3)]

Launch = Callable[..., None]


def problem_of(schedule: str, n: int, m: int, d: int, batch: int = 1) -> Problem:
    return KIND.problem(n, n if schedule == "own" else m, d, schedule=schedule, batch=batch)


def swept(problem: Problem, **axes: int | str) -> Variant:
    tile = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": tiles.power_of_two(problem.d), "stabiliser": "shifted", "SPLITS": 4}
    return KIND.default(problem).with_(**{**tile, "fusion": SWEEPS[str(problem.flag("schedule"))], **axes})


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bias", ["added", "mma"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("schedule", SWEEPS)
def test_sums_agree_with_float64(schedule: str, batch: int, bias: str) -> None:
    """Sides of one block and of several, whole tiles and rests, problems of different sizes, with a row that is redone."""
    for shape, splits, sums in product(SHAPES, (1, 4), ("atomic", "ordered")):
        problem = problem_of(schedule, *shape, batch)
        variant = swept(problem, bias=bias, SPLITS=splits, sums=sums)
        assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), (shape, variant)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("schedule", SWEEPS)
def test_sums_of_tiles_held_by_columns_across_warps(schedule: str) -> None:
    problem = problem_of(schedule, 70, 133, 20)
    for sums in ("atomic", "ordered"):
        variant = swept(problem, bias="wgmma", BLOCK_N=64, SPLITS=2, sums=sums)
        assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), variant


@pytest.mark.parametrize("bias", ["added", "mma"])
@pytest.mark.parametrize("schedule", SWEEPS)
def test_ordered_sums_do_not_depend_on_the_order_of_programs(schedule: str, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit; atomic ones do, and are not said not to."""
    problem = problem_of(schedule, 150, 170, 5)
    given = KIND.inputs(problem, 0)
    forwards, at = {}, interpreter.interpreter_builder.set_grid_idx
    for sums in ("ordered", "atomic"):
        forwards[sums] = launched(problem, swept(problem, sums=sums, bias=bias), given)

    def backwards(*place: int) -> None:
        at(*(last - 1 - i for last, i in zip(interpreter.interpreter_builder.grid_dim, place)))

    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", backwards)
    for sums, found in forwards.items():
        again = launched(problem, swept(problem, sums=sums, bias=bias), given)
        assert all(torch.equal(again[name], found[name]) for name in found) == (sums == "ordered")
    docs = Path(__file__).parents[1] / "docs" / "variants.md"
    assert "with *atomic*, the last bits change from run to run" in docs.read_text(encoding="utf-8")


def launched(problem: Problem, variant: Variant, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    call = call_arguments(problem, given, "cpu")
    load(problem, variant).launch(**call)
    return {name: call[name] for name in KIND.reference(problem, given)}


@pytest.mark.parametrize("sums", ["atomic", "ordered"])
@pytest.mark.parametrize("offset", [-3000.0, 130.0])
def test_a_debiased_shift_out_of_range_is_redone(sums: str, offset: float) -> None:
    """The new u* does not depend on u; an own potential's depends on all of itself, so that only its rows of no weight may move."""
    problem = KIND.problem(70, 45, 5, schedule="debiased")
    given = {**sinkhorn.inputs(problem, 1), "damping_a": 1.0, "damping_b": 1.0, "step": 1.0}
    expected = sinkhorn.reference(problem, given)
    given["u"][::7] += offset
    for own, weights in (("p", "a"), ("q", "b")):
        given[own][given[weights] == 0] += offset
    found = launched(problem, swept(problem, sums=sums), given)
    for name in ("u_out", "p_out", "q_out"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=1e-3)


def test_a_debiased_step_is_the_three_steps() -> None:
    """The same tile, in three launches or in one: sums to the last bit. Compilers may round the damping in another order."""
    problem = KIND.problem(150, 100, 5, schedule="debiased")
    given = KIND.inputs(problem, 0)
    together = launched(problem, swept(problem, sums="ordered"), given)
    pair = KIND.problem(150, 100, 5, schedule="symmetric")
    own = {"x": "x", "u": "p", "a": "a", "x_sq": "x_sq"}, {"x": "y", "u": "q", "a": "b", "x_sq": "y_sq"}
    alone = launched(pair, swept(pair, sums="ordered"), given)
    for side, names in zip(own, ((150, "p", "damping_a"), (100, "q", "damping_b"))):
        size, name, damping = names
        measure = KIND.problem(size, size, 5, schedule="own")
        tensors = {ours: given[theirs] for ours, theirs in side.items()}
        numbers = {"scale": given["scale"], "damping": given[damping], "step": given["step"]}
        call = call_arguments(measure, {**tensors, **numbers, "y": tensors["x"]}, "cpu")
        load(measure, swept(measure, sums="ordered")).launch(**call)
        alone |= {f"{name}_out": call["u_out"], f"rho_{name}": call["rho"]}
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        near = 1e-6 if name.endswith("_out") else 0.0
        torch.testing.assert_close(together[name], value, rtol=near, atol=near)


@pytest.mark.parametrize(
    ("n", "axes", "reason"),
    [
        (4096, {}, ""),
        (4096, {"fusion": "one_launch", "SPLITS": 1}, "has no order to keep"),
        (4096, {"fusion": "two_launches", "SPLITS": 1}, "has no order to keep"),
        (185_000, {}, ""),
        (190_000, {}, "the shares of its sums exceed 1073741824 bytes"),
        (190_000, {"sums": "atomic"}, ""),
    ],
)
def test_where_sums_may_be_ordered(n: int, axes: dict[str, int | str], reason: str) -> None:
    problem = KIND.problem(n, n, 64, schedule="symmetric")
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "precision": "tf32", "sums": "ordered"}
    found = KIND.fits(problem, swept(problem, **{**tile, **axes}), gpu("a100"))
    assert (reason in found) if reason else (found == "")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("schedule", SWEEPS)
def test_scratch_is_what_a_launch_takes(schedule: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(schedule, 150, 70, 5, batch)
    variant, taken, whole = swept(problem, sums="ordered"), [], torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        new = whole(self, *args, **options)
        taken.append(new.numel() * new.element_size())
        return new

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    launched(problem, variant, KIND.inputs(problem, 0))
    assert sum(taken) == sinkhorn.scratch_bytes(problem, variant)


def test_a_debiased_step_visits_two_sweeps() -> None:
    """All pairs of x and y once; of each cloud with itself half, and the other half of the diagonal's blocks."""
    problem = KIND.problem(4096, 4096, 64, schedule="debiased")
    for splits in (1, 4):
        sweep, update = KIND.work(problem, swept(problem, BLOCK_M=128, BLOCK_N=64, SPLITS=splits)).launches
        assert sweep.programs * sweep.tiles * 128 * 64 / 4096**2 == 1 + 2 * (0.5 + 0.5 * 128 / 4096)
        assert (sweep.programs, update.programs, update.tiles, update.shares) == (96 * splits, 128, 0, 0)
    *_, update = KIND.work(problem, swept(problem, BLOCK_M=128, SPLITS=4, sums="ordered")).launches
    assert update.shares == (4 + 32 + 2 * (4 + 31 / 2)) / 4
