"""The shared Triton functions, one by one, through the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from otgen.blocks import load_points, not_finite, out_of_range


@triton.jit
def _gather(ptr, out, first, count, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = first + tl.arange(0, BLOCK)
    values = load_points(ptr, rows, count, 0, D, BLOCK_K, True)
    tl.store(out + tl.arange(0, BLOCK)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], values)


def test_offsets_pass_two_to_the_thirty_one() -> None:
    """The last rows of a cloud of more than 2³¹ coordinates; only the pages that are touched exist."""
    d, n = 65, (1 << 25) + 3
    cloud = torch.empty(n * d, dtype=torch.float16).view(n, d)
    assert cloud.numel() > 1 << 31
    cloud[-5:] = torch.arange(5 * d, dtype=torch.float16).view(5, d)
    out = torch.full((16, 128), torch.nan, dtype=torch.float16)
    _gather[(1,)](cloud, out, n - 5, n, D=d, BLOCK=16, BLOCK_K=128)
    assert torch.equal(out[:5, :d], cloud[-5:])
    assert not out[5:].any(), "rows beyond the cloud"
    assert not out[:, d:].any(), "coordinates beyond d"


@triton.jit
def _checks(sums, out, size, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    values = tl.load(sums + place)
    tl.store(out, out_of_range(values, place < size).to(tl.int32))
    tl.store(out + 1, not_finite(values).to(tl.int32))
    tl.store(out + 2, not_finite(tl.reshape(values, [2, BLOCK // 2])).to(tl.int32))


@pytest.mark.parametrize(
    ("value", "untrusted", "infinite"),
    [
        (1.0, 0, 0),
        (2.0**-80, 0, 0),
        (2.0**-81, 1, 0),
        (0.0, 1, 0),
        (-1.0, 1, 0),
        (2.0**120, 0, 0),
        (2.0**121, 1, 0),
        (float("inf"), 1, 1),
        (float("nan"), 1, 1),
    ],
)
def test_detection_is_exact(value: float, untrusted: int, infinite: int) -> None:
    for place in (0, 7, 15):
        sums, out = torch.ones(16), torch.full((3,), -1, dtype=torch.int32)
        sums[place] = value
        _checks[(1,)](sums, out, 16, BLOCK=16)
        assert out.tolist() == [untrusted, infinite, infinite]


def test_what_lies_outside_is_not_detected() -> None:
    sums, out = torch.ones(16), torch.full((3,), -1, dtype=torch.int32)
    sums[12] = 0.0
    _checks[(1,)](sums, out, 12, BLOCK=16)
    assert out[0] == 0
