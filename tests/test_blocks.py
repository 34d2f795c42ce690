"""The shared Triton functions, one by one, through the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from otgen.blocks import (
    BIAS_DEPTH,
    LARGEST_SUM,
    LOWEST,
    column_biases,
    exp2,
    exp2_of_four,
    in_groups,
    load_points,
    not_finite,
    out_of_range,
    row_biases,
    sums_in_parts,
)


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


@triton.jit
def _powers(s, out, COLUMNS: tl.constexpr, BY_FMA: tl.constexpr):
    places = tl.arange(0, 4)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + places, exp2(tl.load(s + places), BY_FMA))


SPECIAL = {-torch.inf: 0.0, -200.0: 0.0, -151.0: 0.0, 0.0: 1.0, 1.0: 2.0, 127.0: 2.0**127, 128.0: torch.inf, 1e30: torch.inf}
"""Scores whose power is exact, on either unit."""


@pytest.mark.parametrize("by_fma", [0, 1, 2, 4])
def test_powers_of_two_on_both_units(by_fma: int) -> None:
    """As accurate as the special-function unit; and what overflows stays infinite, so that a shift out of range is seen."""
    s = torch.cat([torch.linspace(-126, 128, 4096 - 16)[:-1], torch.tensor([1e-30]), torch.tensor([*SPECIAL, *SPECIAL])])
    out = torch.full_like(s, torch.nan)
    _powers[(1,)](s, out, COLUMNS=1024, BY_FMA=by_fma)
    exact = torch.exp2(s.double())
    assert ((out[:-16] / exact[:-16] - 1).abs() < 1.8e-7).all()
    torch.testing.assert_close(out[-16:], torch.tensor(2 * [*SPECIAL.values()]), rtol=1.8e-7, atol=0.0)
    _powers[(1,)](torch.full((32,), torch.nan), out, COLUMNS=8, BY_FMA=by_fma)
    assert not (out[:32] <= LARGEST_SUM.value).any()


def _ptx(code: str, scores: list[np.float32]) -> list[np.float32]:
    """What straight-line PTX of `exp2_of_four` writes to $0 … $3, from $4 … $7. A product and sum of fp32 fit in float64."""
    values: dict[str, np.float32] = {f"${4 + i}": score for i, score in enumerate(scores)}

    def read(name: str) -> np.float32:
        return np.uint32(int(name[2:], 16)).view(np.float32) if name.startswith("0f") else values[name]

    for line in code.strip("{} ").split(";"):
        opcode, _, operands = line.strip().partition(" ")
        if not opcode or opcode.startswith(".reg"):
            continue
        out, *names = operands.replace(" ", "").split(",")
        if opcode == "shl.b32":
            values[out] = (values[names[0]].view(np.uint32) << np.uint32(int(names[1]))).view(np.float32)
            continue
        given = [read(name) for name in names]
        match opcode.split(".")[0], given:
            case "ex2", [x]:
                values[out] = np.float32(np.exp2(np.float64(x)))
            case "mov", [x]:
                values[out] = x
            case "min", [x, y]:
                values[out] = np.fmin(x, y)
            case "max", [x, y]:
                values[out] = np.fmax(x, y)
            case "sub", [x, y]:
                values[out] = x - y
            case "fma", [x, y, z]:
                values[out] = np.float32(np.float64(x) * np.float64(y) + np.float64(z))
            case "add", [x, y] if opcode == "add.s32":
                values[out] = (x.view(np.uint32) + y.view(np.uint32)).view(np.float32)
            case "add", [x, y]:
                values[out] = x + y
            case _:
                raise AssertionError(line)
    return [values[f"${i}"] for i in range(4)]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("by_fma", [1, 2])
def test_the_assembly_of_a_mixture_computes_the_same_powers(by_fma: int) -> None:
    code = exp2_of_four(by_fma)
    assert code.count("ex2.approx") == 4 - by_fma
    for score in np.linspace(-126, 127.9, 500, dtype=np.float32):
        found = _ptx(code, [score] * 4)
        assert np.allclose(found, np.exp2(np.float64(score)), rtol=1.8e-7, atol=0.0)
    for score, power in SPECIAL.items():
        assert _ptx(code, [np.float32(score)] * 4) == [np.float32(power)] * 4
    assert not (_ptx(code, [np.float32(np.nan)] * 4)[0] <= LARGEST_SUM.value)


@triton.jit
def _places(out, GROUP: tl.constexpr):
    number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    block, part = in_groups(number, tl.num_programs(0), tl.num_programs(1), GROUP)
    tl.store(out + 2 * number, block)
    tl.store(out + 2 * number + 1, part)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(("blocks", "parts"), [(1, 1), (1, 3), (7, 2), (8, 3), (5, 1)])
def test_groups_of_blocks_take_part_after_part(blocks: int, parts: int, group: int) -> None:
    """Each once, in this order, though the last group may be smaller; a group of one takes all its parts first."""
    out = torch.full((blocks * parts, 2), -1, dtype=torch.int32)
    _places[(blocks, parts)](out, GROUP=group)
    groups = [range(first, min(first + group, blocks)) for first in range(0, blocks, group)]
    assert out.tolist() == [[block, part] for members in groups for part in range(parts) for block in members]
