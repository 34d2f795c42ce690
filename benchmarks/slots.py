"""What a pair of points costs in compiled kernels: instructions per pair and unit; of otgen's variants, and of anyone's kernels.

A *pair* is one (i, j); all launches of a step are added up. A lane's instructions for one pair are a warp's for 32, so issue slots
per pair are also the cycles that a scheduler needs to issue 32 pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from otgen.compile import Kernel, inspect_variants
from otgen.families import family
from otgen.gpus import Gpu, gpu
from otgen.isa import Mix, hot_loops
from otgen.model import PARTITIONS
from otgen.problem import Problem, Sweep, Variant

UNITS = ("slots", "mufu", "fp32", "alu", "shuffle", "shared", "tensor")
"""Of `otgen.isa.Mix`: what is counted per pair."""


@dataclass(frozen=True)
class Count:
    """A compiled step.

    config     the variant or configuration that was compiled
    sweeps     how often it visits all n × m pairs
    units      instructions per pair of `UNITS`
    registers  per thread, of the launch that takes most;  spills  bytes of them kept in local memory, of all launches
    """

    config: Mapping[str, Any]
    sweeps: float
    units: Mapping[str, float]
    registers: int
    spills: int

    def bound(self, target: Gpu) -> float:
        """Cycles a scheduler needs for 32 pairs, at least: to issue their instructions, or for their exp2, whichever is more."""
        lanes = target.mufu_lanes / PARTITIONS
        return max(self.units["slots"], target.warp_size / lanes * self.units["mufu"])


def fewest(counts: Iterable[Count], *, spills: bool) -> Count:
    """The one of fewest issue slots, those that spill registers left out unless `spills`."""
    return min((count for count in counts if spills or not count.spills), key=lambda count: count.units["slots"])


def of_variants(problem: Problem, variants: Sequence[Variant], slug: str) -> list[Count]:
    """Each of otgen's variants, compiled for the GPU called `slug`; those it refuses are left out."""
    counts = []
    for variant, found in zip(variants, inspect_variants(problem, variants, slug)):
        if found.error is None:
            shares = [_share(problem, variant, sweep) for sweep in family(problem.family).work(problem, variant).launches]
            registers, spills = max(launch.registers for launch in found.launches), sum(launch.spills for launch in found.launches)
            lanes = gpu(slug).warp_size * variant.int("num_warps")
            tile = variant.int("BLOCK_M") * variant.int("BLOCK_N")
            units = _per_pair([launch.mix for launch in found.launches], shares, tile / lanes)
            counts.append(Count(dict(variant), sum(shares), units, registers, spills))
    return counts


def of_kernel(kernel: Kernel, config: Mapping[str, Any], d: int) -> Count:
    """Of an NVIDIA kernel, each of whose pair loops visits every pair of points once, in tiles that `config` names."""
    pairs_per_lane = config["BLOCK_M"] * config["BLOCK_N"] / (32 * kernel.num_warps)
    loops = hot_loops(kernel.code, pairs_per_lane=pairs_per_lane, inner_trips=(ceil(d / config["BLOCK_K"]),))
    return Count(config, float(len(loops)), _per_pair(loops, [1.0] * len(loops), pairs_per_lane), kernel.registers, kernel.spills)


def sweeps(problem: Problem, variant: Variant) -> float:
    """How often a step visits all pairs."""
    return sum(_share(problem, variant, sweep) for sweep in family(problem.family).work(problem, variant).launches)


def _share(problem: Problem, variant: Variant, sweep: Sweep) -> float:
    """The pairs a launch visits, the padding of its last tiles among them, of the n·m there are."""
    tile = variant.int("BLOCK_M") * variant.int("BLOCK_N")
    return sweep.programs * sweep.tiles * tile / (problem.n * problem.m * problem.batch)


def _per_pair(mixes: Sequence[Mix], shares: Sequence[float], pairs_per_lane: float) -> dict[str, float]:
    each = [mix.per_pair(pairs_per_lane) for mix in mixes]
    return {unit: sum(share * units[unit] for share, units in zip(shares, each)) for unit in UNITS}
