"""Triton functions that rendered kernels share: operands, products and scores of a tile.

A *tile* is BLOCK_M rows (points of x) by BLOCK_N columns (points of y). Coordinates are row-major with d columns, read BLOCK_K at a
time; with RESIDENT (BLOCK_K ≥ d) one read holds them all and a row block keeps its own for the whole sweep.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

SMALLEST_SUM = tl.constexpr(2.0**-80)
LARGEST_SUM = tl.constexpr(2.0**120)


@triton.jit
def load_points(ptr, points, count, k, D: tl.constexpr, BLOCK_K: tl.constexpr, MASK_K: tl.constexpr):
    """Coordinates k … k+BLOCK_K of a block of points, zero outside the cloud. Offsets are 64-bit: count·d may pass 2³¹."""
    dims = k + tl.arange(0, BLOCK_K)
    inside = (points < count)[:, None]
    if MASK_K:
        inside = inside & (dims < D)[None, :]
    first = points.to(tl.int64)[:, None] * D
    return tl.load(ptr + first + dims[None, :], mask=inside, other=0.0)


@triton.jit
def product(p, q, start, PRECISION: tl.constexpr):
    """start + p·q with fp32 accumulation and the rounding of operands that PRECISION names.

    The interpreter rounds nothing: it multiplies in fp32 whatever the mode (bf16 operands come out wrong there, bf16x3 is refused).
    """
    if INTERPRETED:
        return tl.dot(p.to(tl.float32), q.to(tl.float32), start, input_precision="ieee")
    elif PRECISION == "bf16":
        return tl.dot(p.to(tl.bfloat16), q.to(tl.bfloat16), start)
    elif PRECISION == "fp16":
        return tl.dot(p.to(tl.float16), q.to(tl.float16), start)
    else:
        return tl.dot(p.to(tl.float32), q.to(tl.float32), start, input_precision=PRECISION)


@triton.jit
def operand(ptr, points, count, D: tl.constexpr, BLOCK_K: tl.constexpr, MASK_K: tl.constexpr, RESIDENT: tl.constexpr):
    """What `score` multiplies: the points' coordinates when they fit in one block, else the pointer to read them from."""
    if RESIDENT:
        return load_points(ptr, points, count, 0, D, BLOCK_K, MASK_K)
    else:
        return ptr


@triton.jit
def scaled_operand(ptr, points, count, scale, D: tl.constexpr, BLOCK_K: tl.constexpr, MASK_K: tl.constexpr, RESIDENT: tl.constexpr):
    """The row operand: resident coordinates are multiplied by the scale once, so that no multiply per pair is left."""
    if RESIDENT:
        return load_points(ptr, points, count, 0, D, BLOCK_K, MASK_K).to(tl.float32) * scale
    else:
        return ptr


@triton.jit
def score(
    x,
    rows,
    n,
    y,
    cols,
    m,
    bias,
    scale,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """bias + scale·<x_i, y_j> of one tile, in base 2. `x` comes from `scaled_operand`, `y` from `operand`."""
    if RESIDENT:
        return product(x, tl.trans(y), bias, PRECISION)
    else:
        dots = tl.zeros_like(bias)
        for k in range(0, D, BLOCK_K):
            x_k = load_points(x, rows, n, k, D, BLOCK_K, MASK_K)
            y_k = load_points(y, cols, m, k, D, BLOCK_K, MASK_K)
            dots = product(x_k, tl.trans(y_k), dots, PRECISION)
        return bias + scale * dots


@triton.jit
def out_of_range(sums, inside):
    """Whether some sum of a shifted sweep cannot be trusted: overflow, NaN, or so small that its terms were flushed to zero."""
    trusted = (sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM)
    return tl.max((inside & (trusted == 0)).to(tl.int32), 0) > 0


@triton.jit
def not_finite(sums):
    """Whether a shifted sum overflowed: some entry is inf or NaN."""
    marks = sums * 0.0
    if len(marks.shape) == 2:
        marks = tl.sum(marks, 1)
    # the scan does nothing but keep two reductions apart: for sm_100 the compiler aborts when it folds them into one
    return tl.sum(tl.cumsum(marks, 0), 0) != 0.0


@triton.jit
def row_dots(p_ptr, q_ptr, rows, n, D: tl.constexpr, BLOCK_K: tl.constexpr, MASK_K: tl.constexpr):
    """<p_i, q_i> of a block of rows, in fp32."""
    dots = tl.zeros([rows.shape[0]], tl.float32)
    for k in range(0, D, BLOCK_K):
        p = load_points(p_ptr, rows, n, k, D, BLOCK_K, MASK_K).to(tl.float32)
        q = load_points(q_ptr, rows, n, k, D, BLOCK_K, MASK_K).to(tl.float32)
        dots += tl.sum(p * q, 1)
    return dots
