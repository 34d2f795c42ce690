"""Spaces to their ends: corners meet the compiler of every GPU, values and pairs of them the interpreter, at awkward shapes.

A sample drawn with a fixed seed; with --wide everything besides.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import triton
from kinds import standard
from sampling import Chosen, ends, nearest, pair, values, walk

from otgen.compile import compile_key, inspect_variants
from otgen.errors import CompileError
from otgen.families import FAMILIES, batches, family, loop
from otgen.gpus import GPUS, Gpu, gpu
from otgen.offline import launches_of
from otgen.pool import Outcome, Pool, Role
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.verify import failures, interpret
from otgen.workload import CompiledLaunch

EVERYTHING = pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(4 * 3600)], id="everything")
AMOUNTS = [pytest.param(False, id="sample"), EVERYTHING]

CORNERS = 12
"""Kernels of each architecture in the sample."""

PAIRS = 16
"""Pairs of values in the sample of each kind of launch, before legality; of everything, thirty times as many."""

LARGE = 4096
SETTINGS = [
    (1, "fp32", 1),
    (3, "fp32", 3),
    (8, "bf16", 1),
    (17, "fp16", 1),
    (31, "fp32", 1),
    (64, "bf16", 3),
    (65, "fp32", 1),
    (129, "fp32", 1),
]
"""Dimension, storage and batch of the problems that values are tried on. The second of three in a batch rests."""

SOME_GPUS = [GPUS["h100"], GPUS["a100"]]
"""Between them they allow every value of every axis."""

GPUS_OF = {entry.arch: [other for other in GPUS.values() if other.arch == entry.arch] for entry in GPUS.values()}


def problems(d: int, dtype: str, batch: int) -> list[Problem]:
    """One of every kind of launch; of families without batches a single one."""
    return [
        problem
        for kind in FAMILIES.values()
        for problem in standard(kind, LARGE, LARGE, d, dtype, **({"batch": batch} if "batch" in kind.flags else {}))
    ]


KINDS: dict[str, list[Problem]] = {}
"""Kind of launch → a problem of it in each setting where it is one."""

for _problem in (one for setting in SETTINGS for one in problems(*setting)):
    KINDS.setdefault(f"{_problem.family}-{batches.one_of(_problem).flag_text}", []).append(_problem)


ELSEWHERE = {("fusion", "resident"), *(("PROGRAMS", number) for number in loop.PROGRAMS if number > GPUS["h100"].sms)}
"""Values of smaller problems and of larger GPUs (tests/test_loop.py)."""


ALIKE = {("PROGRAMS", number) for number in loop.PROGRAMS if number > 2}
"""Values that are one to an interpreter, which has one program do what they share."""


@pytest.mark.parametrize("name", FAMILIES)
def test_every_value_is_legal_somewhere(name: str) -> None:
    alike = [problem for kind in KINDS.values() for problem in kind if problem.family == name]
    listed = {value for problem in alike for (value,) in values(problem)}
    passed = {value for problem in alike for entry in SOME_GPUS for variant in walk(problem, entry) for value in variant.items()}
    assert listed - ELSEWHERE <= passed


def corners(gpus: list[Gpu], random: Random) -> Iterator[tuple[Problem, Variant, str]]:
    """Extreme variants that a GPU of an architecture allows, each kernel once, in random order.

    The other axes are near the default's, but for fp32 products, which are unrolled and take a compiler seconds.
    """
    settings = (3, "fp32", 1), (64, "fp32", 1), (64, "fp16", 3), (200, "fp32", 1)
    every = [problem for setting in settings for problem in problems(*setting)]
    cases = [(problem, order, entry) for problem in every for order in ends(problem) for entry in gpus]
    seen = set()
    for problem, order, entry in random.sample(cases, len(cases)):
        default = family(problem.family).default(problem)
        base = default.with_(precision="bf16") if default["precision"] == "ieee" else default
        legal = filter(None, (nearest(problem, entry, base, chosen) for chosen in order))
        for variant in islice(legal, 1):
            key = compile_key(problem, variant, entry)
            if key not in seen:
                yield problem, variant, entry.slug
            seen.add(key)


def built(problem: Problem, variant: Variant, slug: str) -> list[tuple[CompiledLaunch, int]]:
    """A variant's launches as the tuner reads them, each with its bytes of local memory a thread. Runs in a compiler's process."""
    (inspection,) = inspect_variants(problem, [variant], slug)
    if inspection.error:
        raise inspection.error
    again = launches_of(load(problem, variant), problem, gpu(slug))
    return [(launch, local_memory(own.compiled.asm)) for launch, own in zip(inspection.launches, again)]


def local_memory(asm: Mapping[str, Any]) -> int:
    """As the compiler reports it; otgen counts instructions."""
    report = asm.get("amdgcn")
    if report is None:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (size,) = re.findall(r"(?:STACK|\.private_segment_fixed_size): *(\d+)", report)
    return int(size)


def objections(outcome: Outcome) -> Iterator[str]:
    """What must not become of a legal variant. That it needs more than the GPU has is said well in time, and allowed."""
    limits = gpu(outcome.key[-1])
    if outcome.status == "ok":
        for launch, local in outcome.value:
            if launch.registers > limits.registers_per_thread or launch.shared_bytes > limits.shared_per_block:
                yield f"{launch.name} exceeds the limits of {limits.slug}"
            if local and not launch.spills:
                yield f"{launch.name} has {local} bytes of local memory a thread, and no spill was counted"
    elif not isinstance(outcome.error, CompileError) or outcome.error.status != "resource":
        yield f"{outcome.status}: {outcome.message}"


@pytest.mark.parametrize("everything", AMOUNTS)
@pytest.mark.parametrize("arch", GPUS_OF)
def test_corners_compile_or_are_refused_for_what_they_need(arch: int | str, everything: bool) -> None:
    found = {}
    with tempfile.TemporaryDirectory(prefix="otgen-triton-") as cache:
        environment = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": cache}
        with Pool(compile=Role(1, limit=300.0, environment=environment)) as pool:
            for task in islice(corners(GPUS_OF[arch], Random(0)), None if everything else CORNERS):
                pool.submit("compile", task, built, *task)
            for outcome in pool.outcomes():
                found[outcome.key] = list(objections(outcome))
    assert {key: texts for key, texts in found.items() if texts} == {}
    assert len(found) >= CORNERS


def awkward(problem: Problem, variant: Variant) -> list[Problem]:
    """Sizes of one, primes, one off whole tiles, few rows under many columns. A measure with itself has one size: the larger.

    The first shows most: several tiles for each program, and a second block of rows. In the first block sinkhorn's input makes a
    shifted sweep start again, which mends whatever it did.
    """
    rows, columns = variant.int("BLOCK_M"), variant.int("BLOCK_N")
    sizes = [(rows + 3, 131), (1, 1), (1, 131), (37, 1), (61, 67), (rows + 1, 2 * columns + 1), (2 * rows - 1, columns - 1)]
    return [replace(problem, n=max(size) if problem.own else size[0], m=max(size) if problem.own else size[1]) for size in sizes]


def cases(alike: Sequence[Problem], everything: bool, random: Random) -> Iterator[tuple[Problem, Variant]]:
    """Of problems of one kind, every value alone (of everything: in every setting, at three shapes), then random pairs.

    Values that are not legal together are left out.
    """
    alone = [(problem, chosen) for problem in alike for chosen in values(problem) if everything or chosen[0] not in ALIKE]
    pairs = [(problem, pair(problem, random)) for problem in random.choices(alike, k=PAIRS * (30 if everything else 1))]
    reached: set[Chosen] = set()
    for problem, chosen in [*random.sample(alone, len(alone)), *pairs]:
        if everything or chosen not in reached:
            base = family(problem.family).default(problem)
            variant = next(filter(None, (nearest(problem, entry, base, chosen) for entry in SOME_GPUS)), None)
            if variant:
                reached.add(chosen)
                shapes = awkward(problem, variant)
                picked = random.sample(shapes, 3 if everything else 1) if everything or len(chosen) == 2 else shapes[:1]
                yield from ((shape, variant) for shape in picked)


@pytest.mark.parametrize("everything", AMOUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_alone_and_in_pairs_agree_with_float64(kind: str, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otgen.verify.small", lambda problem, variant: problem)
    wrong = {case: list(failures(interpret(*case))) for case in cases(KINDS[kind], everything, Random(kind))}
    assert {case: texts for case, texts in wrong.items() if texts} == {}
