"""Packed operands: a score, biases and all, as one product of depth K of 16-bit numbers, which a first launch of O(n + m) prepares.

The scale's root is multiplied into both clouds' coordinates. Each coordinate is split into parts, numbers of the mode's type whose
sum is the coordinate; a column of the operands stands for each pair of parts that a mode multiplies, and for each part of a bias:

    S_ij = <[x_h  x_h  x_l │ u_h  u_l  1  1], [y_h  y_l  y_h │ 1  1  v_h  v_l]>                 fp16x3: 3d + 4 columns

so three dimensions at fp32 accuracy take one matrix instruction of depth 16. Nothing per pair is left but the exponential and the
sums, and nothing in the loop is split, scaled or masked: operands are filled up to whole tiles.
Source: the augmented product of FlashSinkhorn's biased dot products, arXiv 2602.03067, with split operands (Ootomo & Yokota 2022).
"""

from __future__ import annotations

from math import ceil
from typing import Any

from otgen.families.tiles import across_warps, is_by_columns, is_packed, is_resident, power_of_two
from otgen.gpus import Gpu
from otgen.precision import MODES
from otgen.problem import Problem, Sweep, Variant

BIAS_PARTS = {"fp16": 2, "bf16": 3}
"""Numbers of a type that hold an fp32 bias to its last bit: 11 and a sign each, or 8."""

LARGEST_DEPTH = 512
"""Columns of a packed point at most."""

PACKED_POINTS = 16
"""Points a program of the first launch packs."""


def depths(d: int, precision: str) -> tuple[int, int]:
    """Depths of the two products whose sum is a score, powers of two from 16 on: one alone, and 0, or a smaller one behind it,
    whichever are less and hold all columns.
    """
    mode = MODES[precision]
    columns = len(mode.packed) * d + 2 * BIAS_PARTS[mode.unit]
    whole = power_of_two(columns)
    rest = power_of_two(columns - whole // 2)
    return (whole // 2, rest) if whole > 16 and rest < whole // 2 else (whole, 0)


def constants(problem: Problem, variant: Variant) -> dict[str, Any]:
    """What a template writes as constants of a packed variant; nothing of another one."""
    if not is_packed(variant):
        return {}
    mode = MODES[str(variant["precision"])]
    depth, rest = depths(problem.d, mode.name)
    fill, spare = filling(variant)
    return {
        "element": mode.unit,
        "x_parts": tuple(x for x, _ in mode.packed),
        "y_parts": tuple(y for _, y in mode.packed),
        "bias_parts": BIAS_PARTS[mode.unit],
        "depth": depth,
        "rest": rest,
        "reach": depth * (2 if rest else 1),
        "fill": fill,
        "spare": spare,
        "points": PACKED_POINTS,
    }


def stored_precision(variant: Variant) -> str:
    """The mode of products of coordinates as they are stored, which redo what a packed product could not hold."""
    mode = MODES[str(variant["precision"])]
    return "ieee" if mode.only_packed else mode.name


def filling(variant: Variant) -> tuple[int, int]:
    """Packed clouds are filled up to a multiple of the first number, whole tiles, and have as many of these to spare as the second.

    From the diagonal on tiles begin anywhere, and the last may reach beyond.
    """
    return max(variant.int("BLOCK_M"), variant.int("BLOCK_N")), int(variant["fusion"] == "half_sweep")


def packing(n: int, m: int, variant: Variant, batch: int) -> Sweep:
    """The launch that packs both clouds."""
    fill, spare = filling(variant)
    blocks = sum(ceil(size / fill) + spare for size in (n, m))
    return Sweep(blocks * (fill // PACKED_POINTS) * batch, 0, (n + m) * batch)


def packed_misfit(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    """Why operands cannot be packed, or must be, for the variant's mode, or ""."""
    mode = MODES[str(variant["precision"])]
    if not is_packed(variant):
        return f"{mode.name} products are of packed operands" if mode.only_packed else ""
    if problem.dtype != "fp32":
        return f"the scale's root would round {problem.dtype} coordinates, which are exact as they are stored"
    if not mode.packed:
        return f"{mode.name} operands are not of 16 bits"
    if not is_by_columns(variant):
        return "packed operands hold the biases: bias=mma or wgmma"
    if not is_resident(problem, variant):
        return "operands are packed from all coordinates at once"
    width = sum(depths(problem.d, mode.name))
    if width > LARGEST_DEPTH:
        return f"a packed operand would have more than {LARGEST_DEPTH} columns"
    block_m, block_n = variant.int("BLOCK_M"), variant.int("BLOCK_N")
    buffers = max(1, variant.int("num_stages") - 1)
    row_block = block_m if across_warps(gpu, block_n, variant.int("num_warps")) else 0
    if (row_block + block_n * buffers) * width * 2 > gpu.shared_per_block:
        return f"the operands exceed {gpu.shared_per_block} bytes of shared memory"
    return ""
