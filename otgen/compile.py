"""A variant → machine code for any GPU of the table, its resources, and its instructions per tile."""

from __future__ import annotations

import gc
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from otgen.errors import CompileError
from otgen.families import family
from otgen.gpus import Gpu, gpu
from otgen.isa import Mix
from otgen.offline import Launch, launches_of
from otgen.problem import Problem, Variant
from otgen.resources import template_hash
from otgen.toolchain import listings, registers
from otgen.workload import CompiledLaunch, tile_mix


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch of a compiled variant.

    grid          programs along each axis             registers     per thread
    spills        bytes of local memory the kernel stores to, as instructions count them
    shared_bytes  per program                          code          its instructions: SASS, or amdgcn on AMD
    binary        cubin or hsaco                       ptx           "" on AMD
    tensor_memory columns of it per program, 0 where it uses none
    """

    name: str
    grid: tuple[int, ...]
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    code: str
    binary: bytes
    ptx: str
    tensor_memory: int = 0

    @property
    def programs(self) -> int:
        result = 1
        for size in self.grid:
            result *= size
        return result


def compile_key(problem: Problem, variant: Variant, target: Gpu) -> str:
    """What decides the machine code besides the toolchain: equal keys compile to equal kernels, whatever n and m.

    Sizes enter only by what Triton specialises on: d, whether n, m and the output's width are one or divisible by 16, and whether
    listed blocks of columns are all full.
    """
    kinds = ["one" if size == 1 else "16" if size % 16 == 0 else "any" for size in (problem.n, problem.m)]
    if problem.listed > 1 and problem.m % problem.listed == 0:
        kinds.append("full")
    parts = [
        problem.family,
        template_hash(problem.family),
        problem.flag_text,
        f"d={problem.d}",
        problem.dtype,
        *kinds,
        family(problem.family).same_kernels(variant).json,
        str(target.arch),
        _toolchain(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _toolchain() -> str:
    from importlib.metadata import version

    return f"triton {version('triton')}"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the compiler made of a variant: its launches, or the error that says why there are none; and the seconds it took.

    source_hash  `otgen.render.kernels_digest` of what was compiled; "" beside an error
    """

    launches: list[CompiledLaunch]
    error: CompileError | None
    seconds: float
    source_hash: str = ""


def compile_variant(problem: Problem, variant: Variant, slug: str) -> list[Kernel]:
    """Renders and compiles `variant` for the GPU called `slug`; one entry per launch, in launch order.

    Runs in a process whose TRITON_INTERPRET is unset.
    Raises CompileError when the compiler refuses it (status compile_error) or it exceeds the GPU's shared memory or tensor
    memory (resource).
    """
    return read_kernels(_build(problem, variant, gpu(slug)), gpu(slug))


def inspect_variants(problem: Problem, variants: Sequence[Variant], slug: str) -> list[Inspection]:
    """Each of a few variants, compiled and read: resources, and instructions per tile (none of a launch that normally idles).

    They share one start of the disassembler, and Python's garbage collector stays out of the compiler's way.
    """
    from otgen.render import kernels_digest, source

    target = gpu(slug)
    built: list[list[Launch] | CompileError] = []
    seconds = []
    gc.disable()
    try:
        for variant in variants:
            began = time.perf_counter()
            try:
                built.append(_build(problem, variant, target))
            except CompileError as error:
                built.append(error)
            seconds.append(time.perf_counter() - began)
    finally:
        gc.enable()
    kernels = iter(read_kernels([build for builds in built if isinstance(builds, list) for build in builds], target))
    found = []
    for variant, builds, took in zip(variants, built, seconds):
        if isinstance(builds, CompileError):
            found.append(Inspection([], builds, took))
            continue
        own = [next(kernels) for _ in builds]
        try:
            launches = _launches(problem, variant, target, own)
            found.append(Inspection(launches, None, took, kernels_digest(source(problem, variant))))
        except CompileError as error:
            found.append(Inspection([], error, took))
    return found


def _launches(problem: Problem, variant: Variant, target: Gpu, kernels: Sequence[Kernel]) -> list[CompiledLaunch]:
    sweeps = family(problem.family).work(problem, variant).launches
    return [
        CompiledLaunch(
            kernel.name,
            kernel.num_warps,
            kernel.registers,
            kernel.spills,
            kernel.shared_bytes,
            tile_mix(problem, variant, target, kernel.code) if sweep.tiles else Mix(),
            kernel.tensor_memory,
        )
        for kernel, sweep in zip(kernels, sweeps)
    ]


def _reason(error: BaseException) -> str:
    """The last line of the innermost error: those around it say only where it passed through."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:200]


def _build(problem: Problem, variant: Variant, target: Gpu) -> list[Launch]:
    """The launches of a variant, compiled. Raises CompileError (see `compile_variant`)."""
    from otgen.render import load

    try:
        builds = launches_of(load(problem, variant), problem, target)
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {_reason(error)}") from None
    for name, _, compiled in builds:
        if compiled.metadata.shared > target.shared_per_block:
            raise CompileError(
                f"{name} needs {compiled.metadata.shared} bytes of shared memory; {target.slug} has {target.shared_per_block}",
                "resource",
            )
        if _tensor_memory(compiled) > target.tensor_memory:
            raise CompileError(
                f"{name} needs {_tensor_memory(compiled)} columns of tensor memory; {target.slug} has {target.tensor_memory}",
                "resource",
            )
    return builds


def _tensor_memory(compiled: Any) -> int:
    """Columns of tensor memory a program takes. Where they are too many, the compiler's code is a trap and no error."""
    return getattr(compiled.metadata, "tmem_size", None) or 0


def read_kernels(builds: Sequence[Launch], target: Gpu) -> list[Kernel]:
    """What the compiler made of each launch, read from its machine code; one start of the disassembler for all."""
    if target.backend == "hip":
        return [_amd_kernel(build) for build in builds]
    codes = listings([build.compiled.asm["cubin"] for build in builds], target.arch)
    return [_nvidia_kernel(build, code) for build, code in zip(builds, codes)]


def _nvidia_kernel(build: Launch, code: str) -> Kernel:
    meta, asm = build.compiled.metadata, build.compiled.asm
    spills = sum(int(width or 32) // 8 for width in re.findall(r"\bSTL(?:\.(\d+))?\b", code))
    needed = registers(asm["cubin"])
    resources = needed, spills, meta.shared
    return Kernel(
        build.name, build.grid, meta.num_warps, *resources, code, asm["cubin"], asm["ptx"], _tensor_memory(build.compiled)
    )


def _amd_kernel(build: Launch) -> Kernel:
    meta, code = build.compiled.metadata, build.compiled.asm["amdgcn"]
    needed, spilled = (_reported(code, rf"\.vgpr_{what}:\s*(\d+)") for what in ("count", "spill_count"))
    return Kernel(build.name, build.grid, meta.num_warps, needed, 4 * spilled, meta.shared, code, build.compiled.asm["hsaco"], "")


def _reported(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise CompileError(f"expected {pattern} in the compiler's report; found none", "crashed")
    return int(match[1])
