"""Half steps over listed columns: the kernel against float64, and the compilers of every GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_compile import ARCHITECTURES, compile_all

from otgen.compile import compile_key
from otgen.families import family, lists
from otgen.families.tiles import across_warps
from otgen.gpus import gpu
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.verify import call_arguments, failures, verify

SINKHORN = family("sinkhorn")
WIDTH = 32

WAYS = [
    {"BLOCK_M": 32, "BLOCK_N": 32},
    {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 2, "exp2_by_fma": 4},
    {"BLOCK_M": 32, "BLOCK_N": 16, "bias": "mma", "precision": "tf32x3"},
    {"BLOCK_M": 32, "BLOCK_N": 16, "bias": "mma", "precision": "bf16", "num_stages": 1, "eviction": "last", "exp2_by_fma": 1},
]


def problem_of(n: int, m: int, d: int, width: int = WIDTH) -> Problem:
    return SINKHORN.problem(n, m, d, listed=width)


def variant_of(problem: Problem, **axes: int | str) -> Variant:
    return SINKHORN.default(problem).with_(**axes)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 1, 3), (1, 131, 8), (32, 64, 3), (96, 131, 8), (131, 96, 1)], ids=str)
def test_a_half_step_agrees_with_float64(shape: tuple[int, int, int], way: dict[str, int | str]) -> None:
    """One block or several, the last one full or not; zero weights, a block without a list, floors above and below sums."""
    problem = problem_of(*shape)
    assert SINKHORN.fits(problem, variant_of(problem, **way), gpu("a100")) == ""
    launch, judged = load(problem, variant_of(problem, **way)).launch, variant_of(problem, **way).with_(precision="ieee")
    assert not list(failures(verify(problem, judged, launch, "cpu")))


def test_only_listed_columns_are_visited_and_only_rows_below_their_floor_get_all() -> None:
    """Columns that no list names weigh 2^60 times as much: a row that visits one of them shows it."""
    problem = problem_of(3 * WIDTH, 4 * WIDTH, 3)
    given = SINKHORN.inputs(problem, 0)
    given |= {"starts": torch.tensor([0, 1, 3, 4]), "columns": torch.tensor([2, 0, 2, 0]), "floor": torch.zeros(problem.n)}
    given["u"][0] += 100.0
    given["v"].view(4, WIDTH)[1::2] += 60.0
    given["floor"][40:42] = 2.0**30
    expected = torch.zeros(problem.n, dtype=torch.bool)
    expected[40:42] = True
    for way in WAYS[:3]:
        found = call_arguments(problem, given, "cpu")
        load(problem, variant_of(problem, **way)).launch(**found)
        assert torch.equal(found["rho"] > 2.0**30, expected), way


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("last = tl.maximum(first, last - 1)", '    #: if bias == "added"\n    rho = listed_row_sums('),
        ("floor = tl.zeros_like(floor)", "    rho = tl.where(rho > floor, rho, 0.0)\n"),
        ("trusted = tl.zeros_like(trusted)", "    if out_of_range(rho, inside):\n"),
    ],
    ids=["forgets an entry", "ignores floors", "completes rows beside those that need it"],
)
def test_a_kernel_that_takes_lists_lightly_is_told_from_a_right_one(line: str, place: str, edit: Callable[..., None]) -> None:
    problem = problem_of(3 * WIDTH, 4 * WIDTH, 3)
    right, wrong = (variant_of(problem, **WAYS[0], num_stages=stages) for stages in (2, 1))
    edit(f"    #: if num_stages == 1\n    {line}\n    #: endif\n", ahead_of=place)
    assert not list(failures(verify(problem, right, load(problem, right).launch, "cpu")))
    assert list(failures(verify(problem, wrong, load(problem, wrong).launch, "cpu")))


def test_what_cannot_have_lists_is_refused() -> None:
    problem = problem_of(4096, 4096, 3, 128)
    default = SINKHORN.default(problem)
    assert SINKHORN.fits(problem, default, gpu("h100")) == ""
    refused = {
        "at most 8 dimensions": (replace(problem, d=9), default),
        "power of two": (problem_of(4096, 4096, 3, 96), default),
        "32 at least": (problem_of(4096, 4096, 3, 16), default.with_(BLOCK_M=16)),
        "of one problem": (SINKHORN.problem(4096, 4096, 3, listed=128, schedule="symmetric"), default.with_(fusion="one_sweep")),
        "under a common shift": (problem, default.with_(stabiliser="running")),
        "part of a block": (problem_of(4096, 4096, 3, 32), default),
        "has one part": (problem, default.with_(GROUP=8)),
        "packed operands": (problem, default.with_(operands="packed", bias="mma", precision="bf16")),
    }
    for said, (other, variant) in refused.items():
        assert said in SINKHORN.fits(other, variant, gpu("h100"))
    assert "of one problem" in SINKHORN.fits(SINKHORN.problem(64, 64, 3, listed=32, batch=4), default, gpu("h100"))


def test_the_model_takes_a_tenth_of_the_columns_to_be_listed() -> None:
    problem, variant = problem_of(4096, 4096, 3, 128), SINKHORN.default(problem_of(4096, 4096, 3, 128))
    listed_work, whole = (SINKHORN.work(one, variant).launches[0] for one in (problem, replace(problem, flags=problem.flags[1:])))
    assert (listed_work.programs, listed_work.tiles) == (whole.programs, pytest.approx(lists.ASSUMED_VISITED * whole.tiles))


def test_a_last_block_that_is_not_full_is_another_kernel() -> None:
    keys = [compile_key(problem_of(4096, m, 3, 128), variant_of(problem_of(1, 1, 3, 128)), gpu("a100")) for m in (4096, 8192, 4112)]
    assert keys[0] == keys[1] != keys[2]


def test_compiles_for_every_architecture() -> None:
    problem, tasks = problem_of(4096, 4096, 3, 128), {}
    for arch, slug in ARCHITECTURES.items():
        for axes in ({}, {"BLOCK_M": 128, "BLOCK_N": 64, "precision": "bf16"}, {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3}):
            variant = variant_of(problem, **{"precision": "bf16x3", **axes})
            for bias in ("added", "wgmma" if across_warps(gpu(slug), 64, 4) or arch == "gfx942" else "mma"):
                if not SINKHORN.fits(problem, variant.with_(bias=bias), gpu(slug)):
                    tasks[arch, bias, variant] = problem, variant.with_(bias=bias), slug
    tasks["one", "mma", None] = problem_of(1, 1, 1, 128), variant_of(problem, precision="tf32x3", bias="mma"), "a100"
    outcomes = compile_all(tasks)
    assert {key: outcome.message for key, outcome in outcomes.items() if outcome.status != "ok"} == {}
    assert {key[:2] for key in tasks if key[0] in ARCHITECTURES and key[1] == "added"} == {
        (arch, "added") for arch in ARCHITECTURES
    }
    assert {key[0] for key in tasks if key[1] != "added"} >= set(ARCHITECTURES)
    for outcome in outcomes.values():
        assert [kernel.name for kernel in outcome.value] == ["half_step"]
