"""Predicted time of a compiled variant on a GPU, from its machine code, its resources and its tiles. See docs/model.md.

One iteration of the hot loop works on a tile of BLOCK_M × BLOCK_N pairs. Its time on each unit is known from instruction counts and
bytes; units are grouped into the phases a program goes through (`PHASES`), the units of a phase overlap, and phases of one program
overlap with those of the other programs on its SM: iteration = longest phase + (1 − overlap)·(the other phases). Whole waves, a
partial last wave, prologue and launch follow. Nothing is fitted yet: `ASSUMED` holds every number that was not read or looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from otgen.errors import CompileError
from otgen.gpus import Gpu
from otgen.isa import Mix

PHASES: dict[str, tuple[str, ...]] = {
    "load": ("l2", "dram"),
    "multiply": ("tensor", "shared"),
    "elementwise": ("issue", "mufu", "fp32", "alu", "shuffle"),
}
"""What a program does one after the other with a tile, and the units that each phase keeps busy at once."""

UNITS = tuple(unit for units in PHASES.values() for unit in units)

PARTITIONS = 4
"""Quarters of an SM (AMD: SIMDs of a CU): each warp lives in one and uses that quarter's schedulers and units only."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Numbers of the model that come from no datasheet and no compiler.

    overlap          share of the shorter phases hidden behind the longest, by resident programs per SM (the last entry holds
                     beyond). The hypothesis is 1 − 1/resident: while one program multiplies another loads
    launch_us        from one kernel's end to the next one's start, in a stream that is never empty
    prologue_cycles  from a program's start to its first tile, and from its last tile to its end
    latency_cycles   waiting for a tile that was not requested ahead (num_stages = 1)
    sector_bytes     L2 traffic of one atomic addition
    barrier_us       for all programs of a launch to wait for each other once
    evidence         where the numbers come from; replaced when they are fitted to measurements
    """

    overlap: tuple[float, ...] = (0.0, 1 / 2, 2 / 3, 3 / 4, 4 / 5, 5 / 6, 6 / 7, 7 / 8)
    launch_us: float = 3.0
    prologue_cycles: float = 1500.0
    latency_cycles: float = 600.0
    sector_bytes: int = 32
    barrier_us: float = 1.5
    evidence: str = "assumed"


ASSUMED = Assumptions()


@dataclass(frozen=True, slots=True)
class LaunchCost:
    """One kernel launch.

    programs, num_warps, registers (per thread), shared_bytes, tensor_memory (columns; both per program)   its grid and resources
    iterations     tiles one program visits                  mix            warp instructions of one tile, per warp
    tensor_flops   FLOP of one tile on tensor cores, by operand type
    tile_bytes     read from L2 for one tile                 program_bytes  read and written by one program besides
    cloud_bytes    what every program streams; it comes from DRAM once per wave when L2 cannot hold it
    pipelined      whether the next tile is requested before this one is done
    cold           its loop normally does not run: only launch and prologue are counted
    barriers       times that all programs wait for each other
    """

    programs: int
    num_warps: int
    registers: int
    shared_bytes: int
    iterations: float
    mix: Mix
    tensor_flops: Mapping[str, float] = field(default_factory=dict)
    tile_bytes: float = 0.0
    program_bytes: float = 0.0
    cloud_bytes: float = 0.0
    pipelined: bool = True
    cold: bool = False
    tensor_memory: int = 0
    barriers: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted time in microseconds and what it is made of.

    terms  µs each of `UNITS` alone would be busy; µs of launch, of barriers, of prologue, and of tail (lost to a partial last
           wave); bound, the longest of these but for prologue and tail; of the longest launch: waves, occupancy (resident programs
           per SM), limit (what limits it) and overlap; assumptions, where the assumed numbers come from. JSON-able
    """

    microseconds: float
    terms: dict[str, float | str]


def occupancy(gpu: Gpu, num_warps: int, registers: int, shared_bytes: int, tensor_memory: int = 0) -> tuple[int, str]:
    """Programs resident on one SM, and the resource that limits them; 0 when not even one fits."""
    warps = -(-num_warps // PARTITIONS) * PARTITIONS
    per_warp = -(-max(1, registers) * gpu.warp_size // gpu.register_unit) * gpu.register_unit
    shared = -(-(shared_bytes + gpu.shared_reserved) // 128) * 128
    limits = {
        "registers": gpu.registers_per_sm // PARTITIONS // per_warp * PARTITIONS // warps
        if registers <= gpu.registers_per_thread
        else 0,
        "shared memory": gpu.shared_per_sm // max(1, shared) if shared_bytes <= gpu.shared_per_block else 0,
        "threads": gpu.threads_per_sm // (num_warps * gpu.warp_size),
        "blocks": gpu.blocks_per_sm,
    }
    if tensor_memory:
        limits["tensor memory"] = gpu.tensor_memory // max(32, 1 << (tensor_memory - 1).bit_length())
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def predict(gpu: Gpu, launches: Sequence[LaunchCost], assumptions: Assumptions = ASSUMED) -> Prediction:
    """The time of `launches` one after the other.

    Raises CompileError (status ``resource``) when a program does not fit on an SM.
    """
    parts = [_predict_launch(gpu, cost, assumptions) for cost in launches]
    total = {name: sum(float(part[name]) for part in parts) for name in (*UNITS, "launch", "barriers", "prologue", "tail", "total")}
    longest = max(parts, key=lambda part: float(part["total"]))
    rest = {name: longest[name] for name in ("waves", "occupancy", "limit", "overlap")}
    busy = {name: total[name] for name in (*UNITS, "launch", "barriers")}
    microseconds = total.pop("total")
    bound = max(busy, key=lambda name: busy[name])
    return Prediction(microseconds, {**total, **rest, "bound": bound, "assumptions": assumptions.evidence})


def _predict_launch(gpu: Gpu, cost: LaunchCost, assumptions: Assumptions) -> dict[str, float | str]:
    resident, limit = occupancy(gpu, cost.num_warps, cost.registers, cost.shared_bytes, cost.tensor_memory)
    if not resident:
        raise CompileError(
            f"expected at least one program per SM of {gpu.slug}; {cost.num_warps} warps of {cost.registers} registers with "
            f"{cost.shared_bytes} bytes of shared memory exceed its {limit}; use smaller tiles",
            "resource",
        )
    full, rest = divmod(cost.programs, resident * gpu.sms)
    waves = full + rest / (resident * gpu.sms)
    iterations = 0.0 if cost.cold else cost.iterations
    whole = _round_cycles(gpu, cost, resident, waves, assumptions)
    last = _round_cycles(gpu, cost, -(-rest // gpu.sms), waves, assumptions) if rest else 0.0
    cycles = iterations * (full * whole + last)
    ideal = iterations * whole * waves if full else cycles * cost.programs / (gpu.sms * -(-rest // gpu.sms))
    moved = cost.program_bytes * cost.programs / gpu.sms / gpu.l2_bytes_per_cycle
    prologue = (full + bool(rest)) * assumptions.prologue_cycles + moved
    units = _unit_cycles(gpu, cost, resident, waves)
    waiting = cost.barriers * assumptions.barrier_us
    share = iterations * cost.programs / gpu.sms / gpu.clock_mhz
    return {
        **{unit: share * busy for unit, busy in units.items()},
        "launch": assumptions.launch_us,
        "barriers": waiting,
        "prologue": prologue / gpu.clock_mhz,
        "tail": max(0.0, cycles - ideal) / gpu.clock_mhz,
        "waves": waves,
        "occupancy": resident,
        "limit": limit,
        "overlap": _overlap(resident, assumptions),
        "total": assumptions.launch_us + waiting + (cycles + prologue) / gpu.clock_mhz,
    }


def _overlap(resident: int, assumptions: Assumptions) -> float:
    return assumptions.overlap[min(resident, len(assumptions.overlap)) - 1]


def _round_cycles(gpu: Gpu, cost: LaunchCost, resident: int, waves: float, assumptions: Assumptions) -> float:
    """Cycles in which each of `resident` programs of an SM does one iteration."""
    units = _unit_cycles(gpu, cost, resident, waves)
    phases = [max(units[unit] for unit in members) for members in PHASES.values()]
    longest = max(phases)
    cycles = resident * (longest + (1.0 - _overlap(resident, assumptions)) * (sum(phases) - longest))
    return cycles if cost.pipelined else max(cycles, sum(phases) + assumptions.latency_cycles)


def _unit_cycles(gpu: Gpu, cost: LaunchCost, resident: int, waves: float) -> dict[str, float]:
    """Cycles one iteration of one program keeps each unit of its SM busy, while `resident` programs share the SM."""
    lanes = cost.num_warps * gpu.warp_size
    reachable = min(1.0, resident * cost.num_warps / PARTITIONS)
    mix = cost.mix
    tile_bytes = cost.tile_bytes + 4 * lanes * mix.spills
    streamed = cost.cloud_bytes * (max(1.0, waves) if cost.cloud_bytes > gpu.l2_bytes else 1.0)
    dram_bytes = (streamed + cost.programs * cost.program_bytes) / max(1.0, cost.programs * cost.iterations)
    return {
        "l2": tile_bytes / gpu.l2_bytes_per_cycle,
        "dram": dram_bytes * gpu.sms * gpu.clock_mhz * 1e6 / gpu.dram_bandwidth,
        "tensor": sum(flops / gpu.tensor_flops(unit) for unit, flops in cost.tensor_flops.items()) / reachable,
        "shared": 128 * cost.num_warps * mix.shared / gpu.shared_bytes_per_cycle,
        "issue": cost.num_warps * mix.slots / gpu.schedulers / reachable,
        "mufu": lanes * mix.mufu / gpu.mufu_lanes / reachable,
        "fp32": lanes * mix.fp32 / gpu.fp32_lanes / reachable,
        "alu": lanes * mix.alu / gpu.alu_lanes / reachable,
        "shuffle": lanes * mix.shuffle / gpu.shuffle_lanes,
    }
