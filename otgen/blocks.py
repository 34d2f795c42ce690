"""Triton functions that rendered kernels share: operands, products and scores of a tile.

A *tile* is BLOCK_M rows (points of x) by BLOCK_N columns (points of y). Coordinates are row-major with d columns, read BLOCK_K at a
time; with RESIDENT (BLOCK_K ≥ d) one read holds them all and a row block keeps its own for the whole sweep.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

SMALLEST_SUM = tl.constexpr(2.0**-80)
LARGEST_SUM = tl.constexpr(2.0**120)

LOWEST = tl.constexpr(-1e30)
"""The bias of what lies beyond a cloud: 2^LOWEST is zero, and unlike infinity it can be multiplied by zero."""

LANES = tl.constexpr(4)
"""Lanes that share a row of a matrix instruction's fragment."""

SHARES = tl.constexpr(8)
"""Programs whose shares of a sum are read at once."""

BIAS_DEPTH = tl.constexpr(16)
HALF_WORD = tl.constexpr(16)
UPPER_HALF = tl.constexpr(-(1 << 16))

ROUNDING = tl.constexpr(1.5 * 2.0**23)
MANTISSA_BITS = tl.constexpr(23)
LEAST_POWER = tl.constexpr(-127.0)
MOST_POWER = tl.constexpr(128.0)
EXP2_1 = tl.constexpr(0.693147)
EXP2_2 = tl.constexpr(0.24022242)
EXP2_3 = tl.constexpr(0.05550734)
EXP2_4 = tl.constexpr(0.009671511)
EXP2_5 = tl.constexpr(0.0013264653)
PACK = tl.constexpr(4)


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
def described_block(ptr, count, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """What `load_block` reads BLOCK points of a cloud from by one request: its descriptor, made by the program that uses it.

    The copy unit fills in zeros outside the cloud. Rows must be multiples of 16 bytes and begin at one.
    """
    return tl.make_tensor_descriptor(ptr, shape=[count, D], strides=[D, 1], block_shape=[BLOCK, BLOCK_K])


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
def exp2_by_fma(s):
    """2^s on the multiply-add units: a whole power moved into the exponent, times a quintic on [-1/2, 1/2].

    Relative error 1.7e-7, of which 9e-8 are the minimax quintic's; exactly 0 below -127 and inf from 128 on; inf of NaN. Adding
    1.5·2²³ rounds to the nearest integer and leaves it in the lowest bits.
    """
    s = tl.maximum(tl.minimum(s, MOST_POWER), LEAST_POWER)
    rounded = s + ROUNDING
    f = s - (rounded - ROUNDING)
    p = EXP2_5 * f + EXP2_4
    p = p * f + EXP2_3
    p = p * f + EXP2_2
    p = p * f + EXP2_1
    p = p * f + 1.0
    return (p.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << MANTISSA_BITS)).to(tl.float32, bitcast=True)


@triton.constexpr_function
def exp2_of_four(by_fma):
    """PTX of 2^s for PACK scores a thread holds: `by_fma` of them as in `exp2_by_fma`, the others on the special-function unit."""
    pack = PACK.value
    unit = "ex2.approx.ftz.f32 $%d, $%d;"
    polynomial = """
        min.f32 s, $%d, 0f43000000;
        max.f32 s, s, 0fC2FE0000;
        add.rn.f32 r, s, 0f4B400000;
        sub.rn.f32 f, r, 0f4B400000;
        sub.rn.f32 f, s, f;
        fma.rn.f32 p, f, 0f3AADDCCA, 0f3C1E7542;
        fma.rn.f32 p, p, f, 0f3D635BAA;
        fma.rn.f32 p, p, f, 0f3E75FCDE;
        fma.rn.f32 p, p, f, 0f3F317215;
        fma.rn.f32 p, p, f, 0f3F800000;
        mov.b32 i, r;
        shl.b32 i, i, 23;
        mov.b32 j, p;
        add.s32 i, i, j;
        mov.b32 $%d, i;
    """
    lines = [polynomial % (pack + i, i) if i < by_fma else unit % (i, pack + i) for i in range(pack)]
    return "{ .reg .f32 s, r, f, p; .reg .b32 i, j;" + "".join(lines) + "}"


@triton.jit
def exp2(s, BY_FMA: tl.constexpr):
    """2^s of a tile, BY_FMA of every PACK on the multiply-add units and the rest on the special-function unit."""
    if BY_FMA == 0:
        return tl.exp2(s)
    elif BY_FMA == PACK:
        return exp2_by_fma(s)
    elif INTERPRETED:
        return tl.where((tl.arange(0, s.shape[1]) % PACK < BY_FMA)[None, :], exp2_by_fma(s), tl.exp2(s))
    else:
        code: tl.constexpr = exp2_of_four(BY_FMA)
        return tl.inline_asm_elementwise(code, "=f,=f,=f,=f,f,f,f,f", [s], dtype=tl.float32, is_pure=True, pack=PACK)


@triton.jit
def load_block(
    ptr,
    first,
    count,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """Coordinates of BLOCK points from `first` on, zero outside the cloud. WHOLE: all lie inside, nothing has to be masked.

    ptr       a pointer, or a descriptor of such blocks
    EVICTION  whether L2 shall keep them longest, "evict_last"; of whole blocks only
    """
    if isinstance(ptr, tl.tensor_descriptor):
        return ptr.load([first, 0])
    elif WHOLE:
        dims = tl.arange(0, BLOCK_K)
        places = ptr + first * tl.full([], D, tl.int64) + tl.arange(0, BLOCK)[:, None] * D + dims[None, :]
        if MASK_K:
            return tl.load(places, mask=(dims < D)[None, :], other=0.0, eviction_policy=EVICTION)
        else:
            return tl.load(places, eviction_policy=EVICTION)
    else:
        return load_points(ptr, first + tl.arange(0, BLOCK), count, 0, D, BLOCK_K, MASK_K)


@triton.jit
def load_some(ptr, first, count, other, BLOCK: tl.constexpr, WHOLE: tl.constexpr, EVICTION: tl.constexpr = ""):
    """BLOCK numbers from `first` on, `other` beyond the last. WHOLE: that many are left. EVICTION as in `load_block`."""
    places = tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(ptr + first + places, eviction_policy=EVICTION)
    else:
        return tl.load(ptr + first + places, mask=first + places < count, other=other)


@triton.jit
def upper_half(v):
    """The bf16 that is fp32 `v` without the lower half of its bits: 8 bits of its mantissa are left."""
    return (v.to(tl.int32, bitcast=True) >> HALF_WORD).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def lower_bits(v):
    """`v` minus its `upper_half`, exactly."""
    return v - (v.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)


@triton.jit
def thirds(v):
    """Three bf16 whose sum is fp32 `v`, to its last bit."""
    rest = lower_bits(v)
    return upper_half(v), upper_half(rest), upper_half(lower_bits(rest))


@triton.jit
def column_biases(v, ACROSS_WARPS: tl.constexpr):
    """(N, 16) operand: <column_biases(v)_j, row_biases(u)_i> = v_j + u_i, exact but for the sum's rounding.

    A lane of a fragment holds four of a row's 16 entries: 4·lane … 4·lane + 3, of an instruction across warps those at 2·lane + 0,
    1, 8 and 9. All four lanes hold the same, v's thirds and a one, so that none has to choose, or to ask another.
    """
    high, middle, low = thirds(v)
    one = tl.full([v.shape[0]], 1.0, tl.float32).to(tl.bfloat16)
    own = tl.join(tl.join(high, low), tl.join(middle, one))
    if ACROSS_WARPS:
        every = tl.broadcast_to(own[:, :, None, :], [v.shape[0], 2, LANES, 2])
    else:
        every = tl.broadcast_to(own[:, None, :, :], [v.shape[0], LANES, 2, 2])
    return tl.reshape(every, [v.shape[0], BIAS_DEPTH])


@triton.jit
def row_biases(u, ACROSS_WARPS: tl.constexpr):
    """(M, 16) operand: ones that meet the first lane's thirds in `column_biases`, and u's thirds, each meeting one lane's one."""
    high, middle, low = thirds(u)
    k = tl.arange(0, BIAS_DEPTH)[None, :]
    if ACROSS_WARPS:
        lane, part = k // 2 % LANES, k // (2 * LANES) * 2 + k % 2
    else:
        lane, part = k // LANES, k % LANES
    third = tl.where(lane == 0, high[:, None], tl.where(lane == 1, middle[:, None], low[:, None])).to(tl.float32)
    third = tl.where(lane < LANES - 1, third, 0.0)
    return tl.where(part == LANES - 1, third, tl.where(lane == 0, 1.0, 0.0)).to(tl.bfloat16)


@triton.jit
def biased_score(
    x,
    u,
    y_ptr,
    v_ptr,
    first,
    m,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    ACROSS_WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """S of the BLOCK columns from `first` on, which come first, (BLOCK, M); LOWEST beyond the last. WHOLE: all of them exist.

    x from `scaled_operand`, u from `row_biases`. An infinite bias makes NaN.
    """
    v = load_some(v_ptr, first, m, LOWEST, BLOCK, WHOLE, EVICTION)
    y = load_block(y_ptr, first, m, BLOCK, D, BLOCK_K, MASK_K, WHOLE, EVICTION)
    start = tl.zeros([BLOCK, x.shape[0]], tl.float32)
    start = product(column_biases(v, ACROSS_WARPS), tl.trans(u), start, "bf16")
    return product(y, tl.trans(x), start, PRECISION)


@triton.jit
def in_groups(number, blocks, parts, GROUP: tl.constexpr):
    """(block, part) of a program: GROUP blocks after each other take the same part, then the next one; then come other blocks."""
    first = number // (GROUP * parts) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    number %= GROUP * parts
    return first + number % size, number // size


@triton.jit
def sums_in_parts(p, PARTS: tl.constexpr):
    """Sums of every PARTS-th row of a tile, (PARTS, columns). Rows that one lane holds need no other lane to be added up."""
    if p.shape[0] == PARTS:
        return p
    else:
        return tl.sum(tl.reshape(p, [p.shape[0] // PARTS, PARTS, p.shape[1]]), 0)


@triton.jit
def sum_of_shares(shares, points, count, BLOCK: tl.constexpr):
    """Sums of a block of points from `shares`: a pointer to the first programs', how many there are, and how far apart they lie.

    They are added up in an order of their own, whatever the order in which they were written.
    """
    ptr, number, distance = shares
    sums = tl.zeros([SHARES, BLOCK], tl.float32)
    for first in range(0, number, SHARES):
        some = first + tl.arange(0, SHARES)
        places = ptr + some.to(tl.int64)[:, None] * distance + points[None, :]
        sums += tl.load(places, mask=(some < number)[:, None] & (points < count)[None, :], other=0.0)
    return tl.sum(sums, 0)


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


@triton.jit
def sum_of_sums(values):
    """Their sum, where they are made of sums of a tile. The scan keeps two reductions apart (see `not_finite`)."""
    last = tl.arange(0, values.shape[0]) == values.shape[0] - 1
    return tl.sum(tl.where(last, tl.cumsum(values, 0), 0.0), 0)


@triton.jit
def grid_barrier(arrived_ptr, times):
    """Waits until all programs on the grid's first axis have come here for the `times`-th time, counted from 1.

    Afterwards each sees what the others wrote before. Only in a cooperative launch: programs that are not on the GPU never come.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < times * tl.num_programs(0):
        pass
    tl.debug_barrier()
