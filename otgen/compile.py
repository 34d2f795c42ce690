"""A rendered module → machine code for any GPU of the table, with no GPU and no driver; its resources and launches.

`launch()` itself is run on stand-ins for tensors, with every kernel's launch turned into a compilation: what is compiled is exactly
what would run, specialised as it would be, and the launches and grids are known too.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from otgen.errors import CompileError
from otgen.families import family
from otgen.gpus import Gpu, gpu, triton_target
from otgen.isa import Mix
from otgen.problem import BYTES, Problem, Spec, Variant
from otgen.resources import template_hash
from otgen.workload import CompiledLaunch, tile_mix

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch of a compiled variant.

    grid          programs along each axis             registers     per thread
    spills        bytes of local memory the kernel stores to, as instructions count them
    shared_bytes  per program                          code          "sass", or "amdgcn" on AMD
    binary        cubin or hsaco                       ptx           "" on AMD
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

    @property
    def programs(self) -> int:
        result = 1
        for size in self.grid:
            result *= size
        return result


def compile_key(problem: Problem, variant: Variant, target: Gpu) -> str:
    """What decides the machine code besides the toolchain: equal keys compile to equal kernels, whatever n and m.

    Sizes enter only by what Triton specialises on: d, and whether n, m and the output's width are one or divisible by 16.
    """
    shared = {axis: min(variant.int(axis), 2) for axis in family(problem.family).grid_axes if axis in variant}
    kinds = ["one" if size == 1 else "16" if size % 16 == 0 else "any" for size in (problem.n, problem.m)]
    parts = [
        problem.family,
        template_hash(problem.family),
        problem.flag_text,
        f"d={problem.d}",
        problem.dtype,
        *kinds,
        variant.with_(**shared).json,
        str(target.arch),
        _toolchain(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _toolchain() -> str:
    from importlib.metadata import version

    return f"triton {version('triton')}"


def compile_variant(problem: Problem, variant: Variant, slug: str) -> list[Kernel]:
    """Renders and compiles `variant` for the GPU called `slug`; one entry per launch, in launch order.

    Runs in a process whose TRITON_INTERPRET is unset.
    Raises CompileError when the compiler refuses it (status compile_error) or it exceeds the GPU's shared memory (resource).
    """
    from otgen.render import load

    target = gpu(slug)
    try:
        compiled = _compile_launches(load(problem, variant), problem, target)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"{type(error).__name__}: {first[-1][:200]}") from None
    kernels = [_inspect(name, grid, kernel, target) for name, grid, kernel in compiled]
    for kernel in kernels:
        if kernel.shared_bytes > target.shared_per_block:
            raise CompileError(
                f"{kernel.name} needs {kernel.shared_bytes} bytes of shared memory; {slug} has {target.shared_per_block}",
                "resource",
            )
    return kernels


def inspect_variant(problem: Problem, variant: Variant, slug: str) -> list[CompiledLaunch]:
    """`compile_variant`, read: each launch's resources and instructions per tile. A launch that normally idles has no mix."""
    sweeps = family(problem.family).work(problem, variant).launches
    return [
        CompiledLaunch(
            kernel.name,
            kernel.num_warps,
            kernel.registers,
            kernel.spills,
            kernel.shared_bytes,
            tile_mix(problem, variant, gpu(slug), kernel.code) if sweep.tiles else Mix(),
        )
        for kernel, sweep in zip(compile_variant(problem, variant, slug), sweeps)
    ]


class _Stub:
    """Stands in for a contiguous tensor at an aligned address: what `launch()` and Triton's specialisation look at."""

    def __init__(self, spec: Spec) -> None:
        self.shape = spec.shape
        self.dtype = DTYPE_NAMES[spec.dtype]
        self.bytes = BYTES[spec.dtype]

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.bytes

    def zero_(self) -> _Stub:
        return self


class _OfflineDriver:
    """As much of a Triton driver as compiling asks for. The device number keeps targets apart in Triton's caches."""

    def __init__(self, target: Gpu) -> None:
        self._target = triton_target(target)
        self._device = int(re.sub(r"\D", "", str(target.arch)))

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """Takes a kernel's place in its module: ``kernel[grid](…)`` compiles and is written down."""

    def __init__(self, kernel: Any, log: list[tuple[str, tuple[int, ...], Any]]) -> None:
        self._kernel, self._log = kernel, log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            self._log.append((self._kernel.__name__, tuple(grid), self._kernel.warmup(*args, grid=grid, **kwargs)))

        return compile_it


def _compile_launches(module: ModuleType, problem: Problem, target: Gpu) -> list[tuple[str, tuple[int, ...], Any]]:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    log: list[tuple[str, tuple[int, ...], Any]] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    launched = {name: kernels[name] for name in module.launch.__code__.co_names if name in kernels}
    stubs = {name: _Stub(a) if isinstance(a, Spec) else a for name, a in family(problem.family).arguments(problem).items()}
    driver.set_active(_OfflineDriver(target))
    vars(module).update({name: _Recorder(kernel, log) for name, kernel in launched.items()})
    try:
        module.launch(**stubs)
    finally:
        vars(module).update(launched)
    return log


def _inspect(name: str, grid: tuple[int, ...], compiled: Any, target: Gpu) -> Kernel:
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        registers, spills = _number(code, r"\.vgpr_count:\s*(\d+)"), 4 * _number(code, r"\.vgpr_spill_count:\s*(\d+)")
        return Kernel(name, grid, warps, registers, spills, shared, code, compiled.asm["hsaco"], "")
    text = cuobjdump(compiled.asm["cubin"], "-res-usage", "-sass")
    stored = sum(int(width or 32) // 8 for width in re.findall(r"\bSTL(?:\.(\d+))?\b", text))
    return Kernel(name, grid, warps, _number(text, r"REG:(\d+)"), stored, shared, text, compiled.asm["cubin"], compiled.asm["ptx"])


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise CompileError(f"expected {pattern} in the compiler's report; found none", "crashed")
    return int(match[1])


def ptxas_version() -> str:
    """The release of the assembler in Triton's wheel, for instance ``12.8.93``."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d[\d.]*)", text)
    return match[1] if match else ""


def cuobjdump(cubin: bytes, *options: str) -> str:
    """What the disassembler of Triton's wheel says of `cubin`."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
