"""A prepared launch starts what Triton's own way starts: the same binaries, grids and arguments, for whatever comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from otgen import prepared as remembering
from otgen.families import family
from otgen.gpus import gpu
from otgen.offline import IdleDriver
from otgen.pool import Pool, Role
from otgen.problem import Problem, Spec, Variant
from otgen.render import load

H100 = gpu("h100")
SINKHORN, TRANSPORT = family("sinkhorn"), family("transport")
SIZES = (100, 1, 16, 48, 100)
"""Triton compiles anew for 1 and for multiples of 16."""

Call = tuple[Problem, dict[str, Any]]
"""A problem, and what is unusual about its arguments (`given`)."""

Started = tuple[str, tuple[int, ...], tuple[Any, ...]]
"""Name and hash of a binary, its grid, and its arguments: tensors by their shapes."""


@contextmanager
def recorded() -> Iterator[list[Started]]:
    """What is started meanwhile, on a GPU that does nothing."""
    from triton.runtime.driver import driver

    log: list[Started] = []

    class Recording(IdleDriver):
        @staticmethod
        def launcher_cls(source: Any, metadata: Any) -> Any:
            def start(*given: Any) -> None:
                arguments = tuple(tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in given[9:])
                log.append((f"{metadata.name} {metadata.hash}", given[:3], arguments))
                if given[7] is not None:  # a launcher calls the hook itself
                    given[7](given[6])

            return start

    driver.set_active(Recording(H100))
    yield log


def given(problem: Problem, dtype: torch.dtype = torch.float32, offset: int = 0) -> dict[str, Any]:
    """Arguments of a launch; points of a dtype, each cloud that many elements into its memory."""

    def tensor(name: str, spec: Spec) -> torch.Tensor:
        shift = offset if name in "xy" else 0
        size = torch.Size(spec.shape).numel()
        kind = torch.int32 if spec.dtype == "int32" else dtype if name in "xy" else torch.float32
        return torch.zeros(size + shift, dtype=kind)[shift:].view(spec.shape)

    arguments = family(problem.family).arguments(problem)
    return {name: tensor(name, value) if isinstance(value, Spec) else value for name, value in arguments.items()}


def both_ways(calls: list[Call], variant: Variant) -> tuple[list[Started], list[Started]]:
    """What a module's launches start, Triton's own way and then, twice over, prepared. Runs in a worker."""
    module = load(calls[0][0], variant)
    launch = remembering.prepared(module)
    with recorded() as log:
        for problem, options in calls:
            module.launch(**given(problem, **options))
        own, log[:] = list(log), []
        for problem, options in 2 * calls:
            launch(**given(problem, **options))
    return own, log


def hooked(problem: Problem, variant: Variant) -> int:
    """How many prepared launches Triton's hook hears of, of three. Runs in a worker."""
    from triton import knobs

    heard: list[Any] = []
    launch = remembering.prepared(load(problem, variant))
    with recorded():
        launch(**given(problem))
        knobs.runtime.launch_enter_hook = heard.append
        for _ in range(3):
            launch(**given(problem))
    return len(heard)


def forgotten(problems: list[Problem], variant: Variant) -> list[int]:
    """How many binaries the sweep is remembered with after each problem, of two at most. Runs in a worker."""
    remembering.MOST = 2
    launch: Any = remembering.prepared(load(problems[0], variant))
    counts = []
    with recorded():
        for problem in problems:
            launch(**given(problem))
            (copy,) = launch._copies.values()
            counts.append(len(copy.__globals__["sweep"]._binaries))
    return counts


def in_worker(function: Any, *arguments: Any) -> Any:
    with Pool(run=Role(1, limit=300.0, environment={"TRITON_INTERPRET": None})) as pool:
        pool.submit("run", None, function, *arguments)
        outcome = pool.next()
    assert outcome.status == "ok", outcome.message
    return outcome.value


def symmetric(n: int, m: int, d: int = 3, **flags: Any) -> Problem:
    return SINKHORN.problem(n, m, d, schedule="symmetric", **flags)


def variant_of(problem: Problem, **axes: Any) -> Variant:
    return family(problem.family).default(problem).with_(BLOCK_M=16, BLOCK_N=16, stabiliser="shifted", **axes)


def calls(*problems: Problem, **options: Any) -> list[Call]:
    return [(problem, options) for problem in problems]


SWEPT = {"fusion": "one_sweep", "SPLITS": 2}
SQUARE = symmetric(64, 64)
CASES: dict[str, tuple[list[Call], dict[str, Any]]] = {
    "each side by itself": (calls(*(symmetric(n, m) for n in SIZES for m in (1, 32))), {"fusion": "two_launches"}),
    "a sweep and its update": (calls(*(symmetric(n, 50) for n in SIZES)), SWEPT),
    "another dimension": (calls(*(symmetric(64, 64, d) for d in (3, 5, 3))), SWEPT),
    "packed by a third launch": (calls(symmetric(99, 64)), {**SWEPT, "bias": "mma", "operands": "packed", "precision": "fp16x3"}),
    "a batch": (calls(*(symmetric(n, 64, batch=4) for n in (64, 50))), {**SWEPT, "sums": "ordered"}),
    "half precision": (calls(SQUARE) + calls(SQUARE, dtype=torch.bfloat16), {**SWEPT, "precision": "bf16"}),
    "a cloud that begins anywhere": (calls(SQUARE) + calls(SQUARE, offset=1), SWEPT),
    "an argument left out": (calls(TRANSPORT.problem(64, 64, 3, output="vector", width=1)), {"SPLITS": 2}),
    "by descriptors": (calls(symmetric(64, 64, 16)), {**SWEPT, "loads": "descriptor"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_binaries_are_started_with_the_same_arguments(name: str) -> None:
    asked, axes = CASES[name]

    own, again = in_worker(both_ways, asked, variant_of(asked[0][0], **axes))

    assert len(own) >= len(asked)
    assert again == 2 * own


def test_binaries_differ_where_triton_compiles_anew() -> None:
    asked = calls(*(symmetric(n, 50) for n in (100, 1, 16))) + calls(symmetric(100, 50), offset=1)

    own, _ = in_worker(both_ways, asked, variant_of(asked[0][0], **SWEPT))

    assert len({name for name, *_ in own}) == 2 * len(asked)


def test_a_hook_hears_of_every_launch() -> None:
    assert in_worker(hooked, SQUARE, variant_of(SQUARE, fusion="two_launches")) == 6


def test_sizes_beyond_the_most_are_forgotten_together() -> None:
    started = in_worker(forgotten, [symmetric(n, 50) for n in (20, 21, 22, 20)], variant_of(SQUARE, **SWEPT))

    assert started == [1, 2, 1, 2]


def test_interpreted_kernels_are_launched_as_they_are() -> None:
    module = load(SQUARE, variant_of(SQUARE, **SWEPT))

    assert remembering.prepared(module) is module.launch
