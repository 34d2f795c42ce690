"""What the launches of a variant cost per tile: FLOP and bytes from its shape, instructions read or guessed.

`launch_costs` describes a compiled variant; `estimate` scores one that was not compiled, to choose which to compile first. Both
speak of tiles of BLOCK_M × BLOCK_N pairs, and of what a family's `work` says is done with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, inf
from typing import Any

from otgen.errors import CompileError
from otgen.families import family
from otgen.gpus import Gpu
from otgen.isa import Mix, average, hot_loops
from otgen.model import ASSUMED, LaunchCost, predict
from otgen.precision import MODES
from otgen.problem import BYTES, Problem, Sweep, Variant, Work


@dataclass(frozen=True, slots=True)
class CompiledLaunch:
    """A compiled launch, whatever n and m are: registers per thread, bytes per program, instructions of one tile."""

    name: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    mix: Mix

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CompiledLaunch:
        return cls(**{**values, "mix": Mix(**values["mix"])})


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of a variant's tile: m × n pairs, k coordinates a time, w output columns; `products` score products over all d."""

    m: int
    n: int
    k: int
    w: int
    d: int
    products: int
    itemsize: int
    precision: str
    resident: bool
    both_sums: bool
    shares_values: bool

    @classmethod
    def of(cls, problem: Problem, variant: Variant, work: Work) -> Tile:
        m, n, k = (variant.int(axis) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return cls(
            m=m,
            n=n,
            k=k,
            w=work.width,
            d=problem.d,
            products=work.products,
            itemsize=BYTES[problem.dtype],
            precision=str(variant["precision"]),
            resident=k >= problem.d,
            both_sums=work.both_sums,
            shares_values=work.own_values,
        )

    @property
    def depth(self) -> int:
        """Multiply-adds per pair: padded coordinates and output columns, times the products a precision mode makes of one."""
        return (ceil(self.d / self.k) * self.k * self.products + self.w) * MODES[self.precision].products

    def unit(self, gpu: Gpu) -> str:
        """The matrix unit's operand type, or "fma" when products run on the multiply-add pipe. AMD's also takes fp32."""
        unit = MODES[self.precision].unit
        return "fp32" if unit == "fma" and gpu.matrix_fp32 else unit

    def tensor_flops(self, gpu: Gpu) -> dict[str, float]:
        unit = self.unit(gpu)
        return {} if unit == "fma" else {unit: 2.0 * self.m * self.n * self.depth}

    @property
    def loaded_bytes(self) -> float:
        """Read from L2 for one tile: column block, row block unless resident, values, vectors, atomic column sums."""
        operands = self.n * self.d if self.resident else (self.m + self.n) * self.d * self.products
        values = 0 if self.shares_values else self.n * self.w
        atomics = ASSUMED.sector_bytes * self.n if self.both_sums else 0
        return float((operands + values) * self.itemsize + 3 * BYTES["fp32"] * self.n + atomics)

    @property
    def program_bytes(self) -> float:
        """Read and written once per program: its row block, potentials and weights, and the outputs."""
        return float(self.m * (self.products * self.d * self.itemsize + (self.w + 6) * BYTES["fp32"]))


def tile_mix(problem: Problem, variant: Variant, gpu: Gpu, code: str) -> Mix:
    """The instructions of one tile in a kernel's machine code. Raises CompileError when it holds no pair loop."""
    block_m, block_n = variant.int("BLOCK_M"), variant.int("BLOCK_N")
    pairs_per_lane = block_m * block_n / (gpu.warp_size * variant.int("num_warps"))
    trips = (ceil(problem.d / variant.int("BLOCK_K")),)
    return average(hot_loops(code, pairs_per_lane=pairs_per_lane, inner_trips=trips))


def launch_costs(problem: Problem, variant: Variant, gpu: Gpu, launches: Sequence[CompiledLaunch]) -> list[LaunchCost]:
    """The launches of a compiled variant, in order."""
    work = family(problem.family).work(problem, variant)
    tile = Tile.of(problem, variant, work)
    return [_launch(variant, gpu, tile, sweep, launch) for sweep, launch in zip(work.launches, launches)]


def estimate(problem: Problem, variant: Variant, gpu: Gpu) -> float:
    """A score in predicted microseconds, without compiling: instructions, registers and shared memory are guessed from the tile.

    Infinite when the guess does not fit on the GPU. Meant for ordering variants, not for showing.
    """
    work = family(problem.family).work(problem, variant)
    tile = Tile.of(problem, variant, work)
    mix, registers = _guess(tile, variant, gpu)
    warps = variant.int("num_warps")
    guess = CompiledLaunch("", warps, registers, 0, _guess_shared(tile, variant, warps), mix)
    try:
        return predict(gpu, [_launch(variant, gpu, tile, sweep, guess) for sweep in work.launches]).microseconds
    except CompileError:
        return inf


def _launch(variant: Variant, gpu: Gpu, tile: Tile, sweep: Sweep, launch: CompiledLaunch) -> LaunchCost:
    return LaunchCost(
        programs=sweep.programs,
        num_warps=launch.num_warps,
        registers=launch.registers,
        shared_bytes=launch.shared_bytes,
        iterations=sweep.tiles,
        mix=launch.mix,
        tensor_flops=tile.tensor_flops(gpu),
        tile_bytes=tile.loaded_bytes,
        program_bytes=tile.program_bytes,
        cloud_bytes=float(sweep.streamed * tile.d * tile.itemsize),
        pipelined=variant.int("num_stages") > 1,
        cold=sweep.tiles == 0,
    )


def _guess(tile: Tile, variant: Variant, gpu: Gpu) -> tuple[Mix, int]:
    """Warp instructions of one tile and registers of a thread, by rules of thumb read off compiled kernels."""
    warps = variant.int("num_warps")
    pairs = tile.m * tile.n / (gpu.warp_size * warps)
    rows = max(16.0, tile.m / warps)
    columns = max(8.0, tile.m * tile.n / warps / rows)
    running = variant["stabiliser"] == "running"
    unit, split = tile.unit(gpu), MODES[tile.precision].products > 1
    asynchronous = gpu.arch in (90, 100) and tile.m >= 64 and warps >= 4

    fp32 = 2.0 + running + 2.0 * tile.both_sums + 2.0 * (tile.products - 1)
    alu = 0.4 + 1.5 * running
    shuffle = 8.0 * (1 + running) / columns + (24.0 / rows if tile.both_sums else 0.0)
    shared = 8.0 / rows + tile.n * tile.d * tile.itemsize / 128 / warps / pairs
    accumulators = tile.m * (tile.n + tile.w) / (gpu.warp_size * warps) + (pairs / 2 if tile.w else 0.0)
    copies = 2.0 if gpu.arch == 100 else 1.25
    if unit == "fma":
        fp32 += tile.depth
        multiply = shared_operands = tile.depth / 8
        operands = pairs**0.5 * tile.k
    else:
        itemsize = 4 if unit in ("tf32", "fp32") else 2
        fragments = tile.depth * itemsize / 128
        multiply = (0.3 if asynchronous else 2.0 * fragments) + (2.0 * tile.depth / rows if split else 0.0)
        shared_operands = 0.0 if asynchronous else tile.depth * itemsize * (1 / rows + 1 / columns) / 4
        operands = rows * tile.k * itemsize / (8 * gpu.warp_size)
        if split:
            operands = 1.5 * (rows + columns) * tile.k / gpu.warp_size
    slots = 3.0 + 0.5 * running + fp32 + alu + shuffle + multiply

    registers = ceil(copies * accumulators + operands + rows / 4) + 40
    spilled = max(0, registers - gpu.registers_per_thread)
    mix = Mix(
        slots=slots * pairs + 2 * spilled + 80,
        mufu=pairs,
        fp32=fp32 * pairs,
        alu=alu * pairs,
        shared=(shared + shared_operands) * pairs,
        shuffle=shuffle * pairs,
        spills=2.0 * spilled,
    )
    return mix, min(registers, gpu.registers_per_thread)


def _guess_shared(tile: Tile, variant: Variant, warps: int) -> int:
    """Shared memory of the pipelined operands, the resident row block and the scratch of reductions, in bytes."""
    streamed = tile.n * tile.k if tile.resident else (tile.m + tile.n) * tile.k
    values = 0 if tile.shares_values else tile.n * tile.w
    buffers = max(1, variant.int("num_stages") - 1)
    own = tile.m * tile.k * BYTES["fp32"] if tile.resident else 0
    return (streamed + values) * buffers * tile.itemsize + own + 4 * warps * tile.m
