"""The shared Triton functions, one by one, through the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from otgen.blocks import BIAS_DEPTH, LOWEST, column_biases, load_points, not_finite, out_of_range, row_biases, sums_in_parts


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


@triton.jit
def _biases(v, columns, rows, BLOCK: tl.constexpr, ACROSS_WARPS: tl.constexpr):
    place = tl.arange(0, BLOCK)
    values = tl.load(v + place)
    places = place[:, None] * BIAS_DEPTH + tl.arange(0, BIAS_DEPTH)[None, :]
    tl.store(columns + places, column_biases(values, ACROSS_WARPS).to(tl.float32))
    tl.store(rows + places, row_biases(values, ACROSS_WARPS).to(tl.float32))


@pytest.mark.parametrize("across_warps", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_biases_are_exact_in_a_bf16_product(across_warps: bool, size: float) -> None:
    """Emulated in float64: the operands are bf16 as they are, their product is v_j + u_i to the last bit of both."""
    generator = torch.Generator().manual_seed(0)
    values = size * torch.randn(32, generator=generator)
    values[:3] = torch.tensor([0.0, LOWEST.value, 1.0 - 2.0**-24])
    columns, rows = torch.empty(32, BIAS_DEPTH.value), torch.empty(32, BIAS_DEPTH.value)
    _biases[(1,)](values, columns, rows, BLOCK=32, ACROSS_WARPS=across_warps)
    for operand in (columns, rows):
        assert torch.equal(operand, operand.bfloat16().float())
    product, exact = columns.double() @ rows.double().T, values.double()[:, None] + values.double()
    kept = torch.arange(32) != 1
    assert torch.equal(product[kept][:, kept], exact[kept][:, kept])
    assert (product[1] < 0.9 * LOWEST.value).all(), "beyond a cloud: 2^S is zero, whatever the other bias"
    error = (product.float().double() - exact).abs() / (values.double()[:, None].abs() + values.double().abs())
    assert error[kept][:, kept].nan_to_num().max() <= 2.0**-24, "fp32's own rounding"


@pytest.mark.parametrize("across_warps", [False, True])
def test_all_lanes_of_a_fragment_hold_the_same(across_warps: bool) -> None:
    """Four lanes share a row: of a warp's own instruction each has four neighbours, of one across warps 2·lane + 0, 1, 8 and 9."""
    values = torch.linspace(-50.0, 50.0, 16)
    columns, rows = torch.empty(16, BIAS_DEPTH.value), torch.empty(16, BIAS_DEPTH.value)
    _biases[(1,)](values, columns, rows, BLOCK=16, ACROSS_WARPS=across_warps)
    lanes = columns.view(16, 2, 4, 2).transpose(1, 2) if across_warps else columns.view(16, 4, 2, 2)
    assert torch.equal(lanes, lanes[:, :1].expand(16, 4, 2, 2))


@triton.jit
def _parts(p, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(p + tl.arange(0, ROWS)[:, None] * COLUMNS + columns)
    tl.store(out + tl.arange(0, PARTS)[:, None] * COLUMNS + columns, sums_in_parts(tile, PARTS))


@pytest.mark.parametrize("parts", [8, 16, 64])
def test_parts_hold_every_row_once(parts: int) -> None:
    tile, out = torch.rand(64, 4), torch.empty(parts, 4)
    _parts[(1,)](tile, out, ROWS=64, COLUMNS=4, PARTS=parts)
    torch.testing.assert_close(out, tile.view(64 // parts, parts, 4).sum(0))
