"""What every family promises: a space that is legal, kernels that compute the formula, on awkward shapes first."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod

import pytest
import torch
from kinds import every, standard
from triton.runtime.interpreter import InterpretedFunction

from otgen.candidates import Refinements, legal_variants
from otgen.errors import UsageError
from otgen.families import FAMILIES, family
from otgen.families.tiles import is_whole
from otgen.gpus import GPUS
from otgen.problem import Problem, Variant
from otgen.render import load, source
from otgen.verify import call_arguments, failures, interpret, verify

PROBLEMS = [problem for kind in FAMILIES.values() for d in (3, 64, 100) for problem in standard(kind, 4096, 4096, d)]

BATCHES = [
    problem
    for kind in FAMILIES.values()
    if "batch" in kind.flags
    for d in (3, 64)
    for problem in standard(kind, 256, 200, d, batch=64)
]
"""Of every family that has batches; `otgen.verify.interpret` takes three of the 64, of different sizes, one of them resting."""


def legal(problem: Problem, gpu: str = "a100") -> list[Variant]:
    """The plain ones."""
    return legal_variants(problem, GPUS[gpu])


def spread(problem: Problem, count: int) -> list[Variant]:
    """`count` legal variants: every combination of structural axes turns up before a tile repeats one; some are refined."""
    groups: dict[tuple[object, ...], list[Variant]] = {}
    variants = legal(problem)
    for variant in variants:
        resident = variant.int("BLOCK_K") >= problem.d
        groups.setdefault(
            (*(variant.get(axis) for axis in ("fusion", "bias", "operands")), variant["stabiliser"], resident), []
        ).append(variant)
    chooser = random.Random(str(problem))
    order = [chooser.choice(group) for _, group in sorted(groups.items(), key=str)]
    chosen = [*order, *(chooser.choice(variants) for _ in range(count - len(order)))]
    refined = [Refinements(problem, GPUS["a100"]).near(variant) for variant in chosen[1::2]]
    chosen[1::2] = [chooser.choice([*others, variant]) for others, variant in zip(refined, chosen[1::2])]
    return chosen


@pytest.mark.parametrize("problem", PROBLEMS + BATCHES, ids=str)
def test_interpreted_kernels_agree_with_float64(problem: Problem) -> None:
    for variant in [family(problem.family).default(problem), *spread(problem, 6)]:
        assert not list(failures(interpret(problem, variant))), variant


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 37, 5), (37, 1, 16), (63, 65, 17), (64, 64, 64), (129, 31, 1), (2, 300, 33)], ids=str
)
@pytest.mark.parametrize("name", FAMILIES)
def test_awkward_shapes(name: str, shape: tuple[int, int, int]) -> None:
    kind = family(name)
    for problem in every(kind, *shape):
        for fusion in kind.axes(problem).get("fusion", ("",)):
            variant = kind.default(problem).with_(stabiliser="shifted", BLOCK_M=32, **({"fusion": fusion} if fusion else {}))
            if is_whole(variant):
                if max(problem.n, problem.m) > variant.int("BLOCK_N"):
                    continue
                variant = variant.with_(PROGRAMS=1)
            results = verify(problem, variant, load(problem, variant).launch, "cpu")
            assert not list(failures(results)), variant


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sixteen_bit_storage(name: str, dtype: str) -> None:
    kind = family(name)
    for problem in every(kind, 70, 50, 40, dtype):
        assert not list(failures(interpret(problem, kind.default(problem)))), problem


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_is_legal_everywhere(name: str, gpu: str) -> None:
    kind = family(name)
    for d in (1, 3, 64, 1025):
        for dtype in ("fp32", "bf16", "fp16"):
            for problem in standard(kind, 1000, 10, d, dtype):
                assert kind.check(problem, kind.default(problem)) == kind.default(problem)
                assert kind.fits(problem, kind.default(problem), GPUS[gpu]) == ""


def test_every_refusal_names_a_reason_and_every_reason_refuses() -> None:
    reasons = set()
    for problem in [*PROBLEMS, *(replace(p, dtype="bf16") for p in PROBLEMS[:2])]:
        kind = family(problem.family)
        draw, axes = random.Random(0), kind.listed_axes(problem)
        variants = [Variant({axis: draw.choice(values) for axis, values in axes.items()}) for _ in range(2000)]
        reasons |= {kind.fits(problem, variant, GPUS[gpu]) for gpu in ("l4", "mi300x") for variant in variants}
    text = "\n".join(sorted(reasons))
    for word in (
        "product uses",
        "NVIDIA's",
        "subnormal",
        "fragment",
        "score tile",
        "output tiles",
        "unrolled",
        "starves",
        "shared memory",
        "at once",
    ):
        assert word in text


@pytest.mark.parametrize("name", FAMILIES)
def test_the_work_of_a_variant_has_the_grid_of_its_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model believes of each launch is what `launch()` does, on uneven shapes."""
    kind = family(name)
    for problem in every(kind, 150, 70, 40):
        for variant in spread(problem, 4):
            module = load(problem, variant)
            grids: list[tuple[int, ...]] = []
            given = call_arguments(problem, kind.inputs(problem, 0), "cpu")
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))  # what waits for others would be alone
                patch.setattr(InterpretedFunction, "__getitem__", lambda _, grid, seen=grids: lambda *a, **k: seen.append(grid))
                module.launch(**given)
            assert [prod(grid) for grid in grids] == [sweep.programs for sweep in kind.work(problem, variant).launches]


def test_a_wrong_kernel_is_told_from_a_right_one() -> None:
    kind = family("sinkhorn")
    problem = kind.problem(64, 64, 8)
    variant = kind.default(problem)

    def forgets_the_last_row(**arguments: object) -> None:
        load(problem, variant).launch(**arguments)
        arguments["u_out"][-1] = float("nan")  # type: ignore[index]

    wrong = list(failures(verify(problem, variant, forgets_the_last_row, "cpu")))
    assert len(wrong) == 1
    assert wrong[0].startswith("u_out: error inf exceeds the budget")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shedule": "symmetric"}, "Did you mean 'schedule'"),
        ({"schedule": "jacobi"}, "known: alternating, debiased, own, symmetric"),
    ],
)
def test_unknown_flags(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        family("sinkhorn").problem(1, 1, 1, **flags)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"BLOCK_M": 48}, "expected BLOCK_M among"),
        ({"BLOCK_M": "64"}, "expected BLOCK_M among"),
        ({"num_warps": True}, "expected num_warps among"),
        ({"BLOCK_Q": 64}, "unknown axis"),
        ({"precision": "__import__('os')"}, "expected precision among"),
    ],
)
def test_values_outside_the_space_are_refused(axes: dict[str, object], message: str) -> None:
    kind = family("sinkhorn")
    problem = kind.problem(64, 64, 64)
    with pytest.raises(UsageError, match=message):
        kind.check(problem, {**kind.default(problem), **axes})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="missing BLOCK_M"):
        kind.check(problem, {"BLOCK_N": 64})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_variant_from_before_an_axis_was_added_has_the_default_of_it(name: str) -> None:
    kind = family(name)
    problem = standard(kind, 64, 64, 64)[-1]
    default = kind.default(problem)
    old = {axis: value for axis, value in default.items() if axis not in kind.later_axes}
    assert kind.check(problem, old) == Variant(old)
    assert kind.complete(problem, old) == default
    assert source(problem, Variant(old)) == source(problem, default)
    for axis in [axis for axis in kind.later_axes if axis in default]:
        chosen = kind.axes(problem)[axis][-1]
        assert kind.complete(problem, {**old, axis: chosen})[axis] == chosen
