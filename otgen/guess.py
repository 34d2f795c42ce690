"""What a variant would cost, without compiling it: good enough to choose which to compile first.

Instructions per pair and registers per thread are sums over features of the tile, with coefficients that benchmarks/guess.py fitted
to compiled kernels, not to times, and wrote to guess.json. There are three kinds of kernel: products on warp-wide matrix
instructions (mma), on asynchronous ones that read shared memory themselves (async), and on the multiply-add pipe (fma); the first
two differ again where the tile is held by columns, with the biases in the product, and where operands are packed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from math import ceil, inf
from pathlib import Path

from otgen.errors import CompileError
from otgen.families import family
from otgen.families.tiles import across_warps, exp2_by_fma, is_described
from otgen.gpus import Gpu
from otgen.isa import Mix
from otgen.model import predict
from otgen.precision import MODES
from otgen.problem import BYTES, Problem, Variant
from otgen.workload import CompiledLaunch, Tile, launch_cost

COEFFICIENTS = Path(__file__).with_name("guess.json")
"""slots per pair, shared-memory accesses (of 128 bytes) per pair, registers per thread → kind of kernel → feature → weight."""

DOUBT = 20
"""Registers a guess may lie beyond the GPU's and still be worth compiling. Of 40 kernels for an A100 that lay further, 39 spilled,
and a kernel that spills takes the compiler three times as long."""


def estimate(problem: Problem, variant: Variant, gpu: Gpu) -> float:
    """A score in predicted microseconds, to order variants by, not to show; infinite for one that cannot fit, or would spill."""
    work = family(problem.family).work(problem, variant)
    tile = Tile.of(problem, variant, work)
    mix, needed = guess(tile, variant, gpu)
    if needed > gpu.registers_per_thread + DOUBT:
        return inf
    registers = min(needed, gpu.registers_per_thread)
    launch = CompiledLaunch("", variant.int("num_warps"), registers, 0, _shared_bytes(tile, variant), mix)
    try:
        return predict(gpu, [launch_cost(variant, gpu, tile, sweep, launch) for sweep in work.launches]).microseconds
    except CompileError:
        return inf


def guess(tile: Tile, variant: Variant, gpu: Gpu) -> tuple[Mix, int]:
    """Warp instructions of one tile, and the registers a thread needs: those beyond the GPU's spill, and cost instructions."""
    kind = kernel_kind(tile, variant, gpu)
    features = tile_features(tile, variant, gpu)
    pairs = tile.m * tile.n / (gpu.warp_size * variant.int("num_warps"))
    slots, shared = (pairs * _weighted(what, kind, features) for what in ("slots", "shared"))
    if is_described(variant):
        shared = max(0.0, shared - pairs * features["loads"] * tile.itemsize / 4)  # what threads would store, 128 bytes a warp
    needed = ceil(_weighted("registers", kind, features))
    spilled = max(0, needed - gpu.registers_per_thread)
    running = features["running"]
    sums = 1.25 + 1.1 * tile.both_sums if tile.by_columns else 2.0 + running + 2.0 * tile.both_sums
    polynomials = pairs * exp2_by_fma(variant) / 4
    mix = Mix(
        slots=slots + 2 * spilled + 10 * polynomials,
        mufu=pairs - polynomials,
        fp32=pairs * (sums + 2.0 * max(0, tile.products - 1) + (tile.depth if kind == "fma" else 0)) + 8 * polynomials,
        alu=pairs * (0.4 + 1.5 * running) + 3 * polynomials,
        shared=shared,
        shuffle=pairs * _shuffles(tile, features),
        spills=2.0 * spilled,
    )
    return mix, needed


def _shuffles(tile: Tile, features: Mapping[str, float]) -> float:
    """Warp shuffles per pair: sums cross lanes, 8 along a column of the tile, 4 along a row."""
    if tile.by_columns:
        return 8.0 * features["both sums over columns"]
    return 8.0 * (1 + features["running"]) * features["one over columns"] + 24.0 * features["both sums over rows"]


def kernel_kind(tile: Tile, variant: Variant, gpu: Gpu) -> str:
    if tile.unit(gpu) == "fma":
        return "fma"
    kind = "async" if across_warps(gpu, tile.n if tile.by_columns else tile.m, variant.int("num_warps")) else "mma"
    if tile.packed_width:
        return f"{kind} packed"
    return f"{kind} by columns" if tile.by_columns else kind


def tile_features(tile: Tile, variant: Variant, gpu: Gpu) -> dict[str, float]:
    """What instructions and registers are counted from. A warp's part of the tile is `rows` × `columns` pairs."""
    warps = variant.int("num_warps")
    lanes = gpu.warp_size * warps
    pairs = tile.m * tile.n / lanes
    rows = max(16.0, tile.m / warps)
    columns = max(8.0, tile.m * tile.n / warps / rows)
    if tile.by_columns:
        rows = float(tile.n if variant["bias"] == "mma" else tile.n // warps)
        columns = tile.m * tile.n / warps / rows
    running = float(variant["stabiliser"] == "running")
    itemsize = 4 if tile.unit(gpu) in ("tf32", "fp32", "fma") else 2
    split = MODES[tile.precision].products > 1 and not tile.packed_width
    streamed, values = (
        tile.n * (tile.point if tile.packed_width else tile.k) / lanes,
        0.0 if tile.shares_values else tile.n * tile.w / lanes,
    )
    return {
        "one": 1.0,
        "running": running,
        "both sums": float(tile.both_sums),
        "second product": float(max(0, tile.products - 1)),
        "output": float(tile.w > 0),
        "looped": float(not tile.resident),
        "depth": tile.depth * itemsize / 128,
        "depth over rows": tile.depth * itemsize / rows / 4,
        "depth over columns": tile.depth * itemsize / columns / 4,
        "split over rows": split * tile.depth / rows,
        "loads": tile.n * tile.point / lanes / pairs,
        "row loads": (not tile.resident) * tile.m * tile.d / lanes / pairs,
        "value loads": values / pairs,
        "one over columns": 1.0 / columns,
        "running over columns": running / columns,
        "both sums over rows": tile.both_sums / rows,
        "both sums over columns": tile.both_sums / columns,
        "one over pairs": 1.0 / pairs,
        "pairs": pairs,
        "running pairs": running * pairs,
        "weighted pairs": pairs * (tile.w > 0),
        "outputs": tile.m * tile.w / lanes,
        "row operand": (not split) * rows * tile.k * itemsize / 256,
        "split operands": split * (rows + columns) * tile.k / 32,
        "streamed at once": streamed * (variant.int("num_stages") == 1),
        "streamed ahead": streamed * (variant.int("num_stages") > 1),
        "row block": tile.m * tile.k / lanes,
        "values": values,
        "rows": rows / 4,
        "columns": columns / 4,
        "both sums of columns": tile.both_sums * columns / 4,
    }


PER_PAIR = (
    "one",
    "running",
    "both sums",
    "second product",
    "output",
    "looped",
    "depth",
    "depth over rows",
    "depth over columns",
    "split over rows",
    "loads",
    "row loads",
    "value loads",
    "one over columns",
    "running over columns",
    "both sums over rows",
    "both sums over columns",
    "one over pairs",
)
"""Features that instructions per pair are counted from."""

PER_THREAD = (
    "one",
    "second product",
    "pairs",
    "running pairs",
    "weighted pairs",
    "outputs",
    "row operand",
    "split operands",
    "streamed at once",
    "streamed ahead",
    "row block",
    "values",
    "rows",
    "columns",
    "both sums of columns",
)
"""Features that registers are counted from."""


def _weighted(what: str, kind: str, features: Mapping[str, float]) -> float:
    return sum(weight * features[name] for name, weight in _coefficients()[what][kind].items())


@lru_cache
def _coefficients() -> dict[str, dict[str, dict[str, float]]]:
    loaded: dict[str, dict[str, dict[str, float]]] = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    return loaded


def _shared_bytes(tile: Tile, variant: Variant) -> int:
    """Shared memory of the pipelined operands, the resident row block and the scratch of reductions."""
    if tile.packed_width:
        buffers = max(1, variant.int("num_stages") - 1)
        return (tile.m + tile.n * buffers) * tile.packed_width * BYTES["fp16"] + 4 * variant.int("num_warps") * tile.m
    streamed = tile.n * tile.k if tile.resident else (tile.m + tile.n) * tile.k
    values = 0 if tile.shares_values else tile.n * tile.w
    buffers = max(1, variant.int("num_stages") - 1)
    own = tile.m * tile.k * BYTES["fp32"] if tile.resident else 0
    return (streamed + values) * buffers * tile.itemsize + own + 4 * variant.int("num_warps") * tile.m
