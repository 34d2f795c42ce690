"""Columns shared out among programs: every split of a sweep gives the sums of the whole, wherever its largest scores lie."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from kinds import every
from triton.runtime import interpreter

from otgen.families import family, hvp, splits, tiles, transport
from otgen.gpus import gpu
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.verify import call_arguments, failures, verify

FAMILIES = ("transport", "hvp")
SPLITS = (2, 4, 8, 16)
SHAPES = [(1, 1, 1), (1, 37, 5), (37, 1, 16), (3, 257, 3), (33, 255, 17), (70, 45, 33)]
"""One point, primes, one more and one less than sixteen tiles of 16, few rows and many columns, parts without any column."""


def problems(name: str, n: int, m: int, d: int) -> list[Problem]:
    """Of every kind that divides its rows' sums alone: both products, which divide those of columns too, have their own test."""
    return [problem for problem in every(family(name), n, m, d) if ("output", "both") not in problem.flags]


def variant_of(problem: Problem, **axes: int | str) -> Variant:
    return family(problem.family).default(problem).with_(**{"BLOCK_M": 32, "BLOCK_N": 16, **axes})


def launched(problem: Problem, variant: Variant, given: dict[str, Any]) -> torch.Tensor:
    call = call_arguments(problem, given, "cpu")
    load(problem, variant).launch(**call)
    return call["out"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("stabiliser", ["running", "shifted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_split_agrees_with_float64(name: str, stabiliser: str) -> None:
    """At awkward shapes, of batches too; some weights are zero, and a column that would overflow weighs nothing."""
    for i, shape in enumerate(SHAPES):
        for j, problem in enumerate(problems(name, *shape)):
            variant = variant_of(problem, stabiliser=stabiliser, SPLITS=SPLITS[(i + j) % 4])
            assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), (problem, variant)


@pytest.mark.parametrize("stabiliser", ["running", "shifted"])
@pytest.mark.parametrize("count", SPLITS)
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("transport", {"output": "vector"}),
        ("transport", {"output": "matrix", "width": 20}),
        ("transport", {"output": "gradient"}),
        ("hvp", {"product": "assembly"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_the_largest_score_may_lie_in_any_part(name: str, flags: dict[str, Any], count: int, stabiliser: str) -> None:
    """There 2^S overflows in that part's share alone; tiny weights a bring P back, if the merge looks at the maximum of all."""
    problem = family(name).problem(20, 256, 3, **flags)
    for place in (0, 100, 255):
        given = family(name).inputs(problem, 4)
        given["a"] = torch.full_like(given["a"], 1e-30).float().double()
        given["v"][place] += 150.0
        if "marginal" in given:
            given["marginal"] = tiles.plan(given).sum(1).float().double()
        expected = family(name).reference(problem, given)["out"]
        found = launched(problem, variant_of(problem, stabiliser=stabiliser, SPLITS=count), given).double()
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max()), place


@pytest.mark.parametrize("stabiliser", ["running", "shifted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sums_do_not_depend_on_the_order_of_programs(name: str, stabiliser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit."""
    chosen = problems(name, 40, 70, 5)
    variants = [variant_of(problem, SPLITS=4, stabiliser=stabiliser) for problem in chosen]
    given = [family(name).inputs(problem, 0) for problem in chosen]
    forwards = [launched(*one) for one in zip(chosen, variants, given)]
    at = interpreter.interpreter_builder.set_grid_idx

    def backwards(*place: int) -> None:
        at(*(last - 1 - i for last, i in zip(interpreter.interpreter_builder.grid_dim, place)))

    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", backwards)
    assert all(torch.equal(launched(*one), found) for one, found in zip(zip(chosen, variants, given), forwards))


@pytest.mark.parametrize("name", FAMILIES)
def test_scratch_is_what_a_launch_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.Tensor.new_empty
    for problem, stabiliser in product(problems(name, 40, 70, 5), ("running", "shifted")):
        variant, taken = variant_of(problem, SPLITS=4, stabiliser=stabiliser), []

        def new_empty(self: torch.Tensor, *args: Any, seen: list[int] = taken, **options: Any) -> torch.Tensor:
            new = whole(self, *args, **options)
            seen.append(new.numel() * new.element_size())
            return new

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", new_empty)
            launched(problem, variant, family(name).inputs(problem, 0))
        sums = hvp.sums(problem) if name == "hvp" else transport.width(problem)
        assert sum(taken) == splits.scratch_bytes(problem, variant, sums)


@pytest.mark.parametrize(
    ("n", "m", "axes", "reason"),
    [
        (256, 65536, {"SPLITS": 16}, ""),
        (256, 512, {"SPLITS": 16}, ""),
        (256, 511, {"SPLITS": 16}, "a program would have no columns"),
        (1 << 18, 1 << 18, {"SPLITS": 16}, ""),
        ((1 << 18) + 1, 1 << 18, {"SPLITS": 16}, "the shares of its sums exceed 1073741824 bytes"),
        (1 << 18, 1 << 18, {"SPLITS": 16, "stabiliser": "running"}, "the shares of its sums exceed"),
        ((1 << 18) + 1, 16, {"SPLITS": 1}, ""),
    ],
)
def test_where_columns_may_be_shared_out(n: int, m: int, axes: dict[str, int | str], reason: str) -> None:
    problem = family("transport").problem(n, m, 64, output="matrix", width=64)
    variant = family("transport").default(problem).with_(**{"stabiliser": "shifted", **axes})
    found = family("transport").fits(problem, variant, gpu("a100"))
    assert (reason in found) if reason else (found == "")


@pytest.mark.parametrize("stabiliser", ["running", "shifted"])
def test_the_work_of_parts_is_that_of_the_whole(stabiliser: str) -> None:
    """As many tiles in all; the merge reads its shares, and their peaks."""
    problem = family("transport").problem(256, 4096, 64, output="matrix", width=256)
    variant = variant_of(problem, BLOCK_W=64, stabiliser=stabiliser)
    (whole,) = family("transport").work(problem, variant).launches
    sweep, merge = family("transport").work(problem, variant.with_(SPLITS=8)).launches
    assert (sweep.programs, sweep.programs * sweep.tiles) == (8 * whole.programs, whole.programs * whole.tiles)
    assert (merge.programs, merge.tiles, merge.shares) == (whole.programs, 0, 8 * (64 + (stabiliser == "running")))
