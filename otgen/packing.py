"""Triton functions of packed operands: how a cloud and its biases are written, and how a tile's scores come out of one product.

A packed cloud is a matrix of 16-bit numbers, (points, WIDTH), filled up to whole tiles; see `otgen.families.packed`.
"""

import triton
import triton.language as tl

from otgen.blocks import load_points, product

BEYOND = tl.constexpr(-6e4)
"""The bias of what fills a cloud up: its exponentials are zero, and finite whatever the other cloud's biases are."""

HALF_UNIT = tl.constexpr(1 << 15)
UPPER_BITS = tl.constexpr(16)


@triton.jit
def nearest(v, ELEMENT: tl.constexpr):
    """The nearest number of type ELEMENT."""
    if ELEMENT == "fp16":
        return v.to(tl.float16)
    else:
        return ((v.to(tl.int32, bitcast=True) + HALF_UNIT) >> UPPER_BITS).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def part(v, NUMBER: tl.constexpr, ELEMENT: tl.constexpr):
    """Of the numbers of type ELEMENT whose sum is fp32 `v`, the largest first, the NUMBER-th."""
    for _ in tl.static_range(NUMBER):
        v -= nearest(v, ELEMENT).to(tl.float32)
    return nearest(v, ELEMENT)


@triton.jit
def pack_points(
    packed_ptr,
    x_ptr,
    u_ptr,
    points,
    count,
    root,
    PARTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SECOND: tl.constexpr,
    BIAS_PARTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    REACH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """Writes a block of points: the PRODUCTS parts of root·x that PARTS names, the parts of the biases, ones for the other cloud's.

    SECOND: the points are y's, and the ones come first. REACH is a power of two that is no less than WIDTH. Points from `count` on
    have no coordinates, and the bias BEYOND.
    """
    x = load_points(x_ptr, points, count, 0, D, BLOCK_K, MASK_K).to(tl.float32) * root
    place = packed_ptr + points.to(tl.int64)[:, None] * WIDTH
    dims = tl.arange(0, BLOCK_K)[None, :]
    for k in tl.static_range(PRODUCTS):
        tl.store(place + k * D + dims, part(x, PARTS[k], ELEMENT), mask=dims < D)
    u = tl.load(u_ptr + points, mask=points < count, other=BEYOND)
    column = tl.arange(0, REACH)[None, :]
    own = PRODUCTS * D + (BIAS_PARTS if SECOND else 0)
    rest = tl.where((column >= PRODUCTS * D) & (column < PRODUCTS * D + 2 * BIAS_PARTS), 1.0, 0.0) + tl.zeros_like(u)[:, None]
    for k in tl.static_range(BIAS_PARTS):
        rest = tl.where(column == own + k, part(u, k, ELEMENT).to(tl.float32)[:, None], rest)
    tl.store(place + column, nearest(rest, ELEMENT), mask=(column >= PRODUCTS * D) & (column < WIDTH))


@triton.jit
def described_packed(packed_ptr, count, BLOCK: tl.constexpr, DEPTH: tl.constexpr, REST: tl.constexpr):
    """What `load_packed` reads BLOCK packed points from by one request: descriptors of their first DEPTH and last REST columns."""
    points, width = tl.cdiv(count, BLOCK) * BLOCK, DEPTH + REST
    first = tl.make_tensor_descriptor(packed_ptr, shape=[points, width], strides=[width, 1], block_shape=[BLOCK, DEPTH])
    if REST == 0:
        return first, first
    else:
        return first, tl.make_tensor_descriptor(packed_ptr, shape=[points, width], strides=[width, 1], block_shape=[BLOCK, REST])


@triton.jit
def load_packed(
    packed_ptr,
    first,
    BLOCK: tl.constexpr,
    COLUMN: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """Columns COLUMN … COLUMN+DEPTH of BLOCK packed points from `first` on; all exist.

    packed_ptr  a pointer, or descriptors of blocks: of their first columns, of their last
    EVICTION    whether L2 shall keep them longest, "evict_last"
    """
    if isinstance(packed_ptr, tl.tensor):
        points = tl.arange(0, BLOCK)[:, None] * WIDTH
        places = packed_ptr + first * tl.full([], WIDTH, tl.int64) + COLUMN + points + tl.arange(0, DEPTH)[None, :]
        return tl.load(places, eviction_policy=EVICTION)
    elif COLUMN == 0:
        return packed_ptr[0].load([first, 0])
    else:
        return packed_ptr[1].load([first, COLUMN])


@triton.jit
def packed_score(
    x,
    x_rest,
    y_ptr,
    first,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    REST: tl.constexpr,
    ELEMENT: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """S of the BLOCK packed columns from `first` on, which come first, (BLOCK, M).

    x, x_rest  the first DEPTH and the last REST columns of the packed rows; with REST = 0 the second is not looked at
    """
    y = load_packed(y_ptr, first, BLOCK, 0, DEPTH, DEPTH + REST, EVICTION)
    s = product(y, tl.trans(x), tl.zeros([BLOCK, x.shape[0]], tl.float32), ELEMENT)
    if REST > 0:
        s = product(load_packed(y_ptr, first, BLOCK, DEPTH, REST, DEPTH + REST, EVICTION), tl.trans(x_rest), s, ELEMENT)
    return s
