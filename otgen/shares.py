"""Triton functions of kernels in which several programs share a block of rows: each takes its part of the columns, and another
launch merges their shares of the sums, in the order of the parts.

*Shares* are a pointer to the first program's, how many there are, and how far apart they lie.
"""

import triton
import triton.language as tl


@triton.jit
def part_of_columns(split, splits, count, BLOCK: tl.constexpr):
    """The first of a part of `count` columns, and how many it has: whole tiles of BLOCK, shared out as evenly as they can be."""
    tiles = tl.cdiv(count, BLOCK)
    least, more = tiles // splits, tiles % splits
    first = (split * least + tl.minimum(split, more)) * BLOCK
    end = ((split + 1) * least + tl.minimum(split + 1, more)) * BLOCK
    return first, tl.minimum(end, count) - first


@triton.jit
def merged_sums(shares, places, inside):
    """The sums at some places of plain shares."""
    ptr, splits, distance = shares
    sums = tl.zeros(places.shape, tl.float32)
    for _ in range(0, splits):
        sums += tl.load(ptr + places, mask=inside, other=0.0)
        ptr += distance
    return sums


@triton.jit
def merged_peaks(peaks, rows, n):
    """The largest score that any part met in each row, minus infinity where none met one."""
    ptr, splits, distance = peaks
    peak = tl.full(rows.shape, float("-inf"), tl.float32)
    for _ in range(0, splits):
        peak = tl.maximum(peak, tl.load(ptr + rows, mask=rows < n, other=float("-inf")))
        ptr += distance
    return peak


@triton.jit
def merged_sums_below(peak, peaks, rows, n, shares, places, inside):
    """Σ 2^(peaks − peak)·shares: sums whose shares each part took relative to its own peak, relative to that of all.

    Places are rows (M,), or columns of them (M, W).
    """
    own, splits, apart = peaks
    ptr, _, distance = shares
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    sums = tl.zeros(places.shape, tl.float32)
    for _ in range(0, splits):
        factor = tl.exp2(tl.load(own + rows, mask=rows < n, other=float("-inf")) - shift)
        if len(places.shape) == 2:
            factor = factor[:, None]
        sums += factor * tl.load(ptr + places, mask=inside, other=0.0)
        own += apart
        ptr += distance
    return sums
