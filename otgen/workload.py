"""What the launches of a variant cost per tile: FLOP and bytes from its shape, instructions read or guessed.

`launch_costs` describes a compiled variant; `estimate` scores one that was not compiled, to choose which to compile first. Both
speak of tiles of BLOCK_M × BLOCK_N pairs, and of what a family's `work` says is done with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from otgen.families import family
from otgen.families.packed import depths
from otgen.families.tiles import bias_depth, is_by_columns, is_packed
from otgen.gpus import Gpu
from otgen.isa import Mix, average, hot_loops
from otgen.model import ASSUMED, LaunchCost
from otgen.precision import MODES
from otgen.problem import BYTES, Problem, Sweep, Variant, Work


@dataclass(frozen=True, slots=True)
class CompiledLaunch:
    """A compiled launch, whatever n and m are: registers per thread, bytes of shared and columns of tensor memory per program, the
    instructions of one tile.
    """

    name: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    mix: Mix
    tensor_memory: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CompiledLaunch:
        return cls(**{**values, "mix": Mix(**values["mix"])})


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of a variant's tile: m × n pairs, k coordinates a time, w output columns; `products` score products over all d.

    bias_depth    of the bf16 product that adds the biases; 0 without one
    packed_width  16-bit numbers of a packed point, all that its pairs multiply; 0 where operands are as stored
    by_columns    whether the tile is held columns by rows
    ordered       column sums are written, not added by atomics
    added         output columns that atomics add up for each column
    """

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
    bias_depth: int
    packed_width: int
    by_columns: bool
    ordered: bool
    added: int = 0

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
            bias_depth=bias_depth(variant),
            packed_width=sum(depths(problem.d, str(variant["precision"]))) if is_packed(variant) else 0,
            by_columns=is_by_columns(variant),
            ordered=work.ordered,
            added=work.added,
        )

    @property
    def depth(self) -> int:
        """Multiply-adds per pair: padded coordinates and output columns, times the products a precision mode makes of one."""
        stored = (ceil(self.d / self.k) * self.k * self.products + self.w) * MODES[self.precision].products
        return self.packed_width or stored

    def unit(self, gpu: Gpu) -> str:
        """The matrix unit's operand type, or "fma" when products run on the multiply-add pipe. AMD's also takes fp32."""
        unit = MODES[self.precision].unit
        return "fp32" if unit == "fma" and gpu.matrix_fp32 else unit

    def tensor_flops(self, gpu: Gpu) -> dict[str, float]:
        depths = {"bf16": self.bias_depth}
        depths[self.unit(gpu)] = depths.get(self.unit(gpu), 0) + self.depth
        return {unit: 2.0 * self.m * self.n * depth for unit, depth in depths.items() if depth and unit != "fma"}

    @property
    def point(self) -> float:
        """Numbers of `itemsize` bytes that are read of a point."""
        return self.packed_width * BYTES["fp16"] / self.itemsize if self.packed_width else self.d

    @property
    def loaded_bytes(self) -> float:
        """Read from L2 for one tile: column block, row block unless resident, values, vectors, column sums."""
        if not self.products:
            return 0.0
        operands = self.n * self.point if self.resident else (self.m + self.n) * self.d * self.products
        values = 0 if self.shares_values else self.n * (self.w - self.added)
        column_sums = self.n * (BYTES["fp32"] if self.ordered else ASSUMED.sector_bytes) if self.both_sums else 0
        column_sums += self.n * self.added * ASSUMED.sector_bytes
        return float((operands + values) * self.itemsize + 3 * BYTES["fp32"] * self.n + column_sums)

    @property
    def program_bytes(self) -> float:
        """Read and written once per program: its row block, potentials and weights, and the outputs."""
        return float(self.m * (self.products * self.point * self.itemsize + (self.w + 6) * BYTES["fp32"]))


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
    return [launch_cost(variant, gpu, tile, sweep, launch) for sweep, launch in zip(work.launches, launches)]


def launch_cost(variant: Variant, gpu: Gpu, tile: Tile, sweep: Sweep, launch: CompiledLaunch) -> LaunchCost:
    """What the model asks of one launch."""
    return LaunchCost(
        programs=sweep.programs,
        num_warps=launch.num_warps,
        registers=launch.registers,
        shared_bytes=launch.shared_bytes,
        iterations=sweep.tiles,
        mix=launch.mix,
        tensor_flops=tile.tensor_flops(gpu),
        tile_bytes=tile.loaded_bytes,
        program_bytes=tile.program_bytes + sweep.shares * tile.m * BYTES["fp32"],
        cloud_bytes=float(sweep.streamed * tile.d * tile.itemsize),
        pipelined=variant.int("num_stages") > 1,
        cold=sweep.tiles == 0,
        tensor_memory=launch.tensor_memory,
        barriers=sweep.barriers,
    )
