"""Blocks of neighbours, bounds of their tiles, and sweeps that leave tiles out: they say how much at most, and it is never more."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from otgen import bounds, chunked, listed
from otgen.bounds import ceiling
from otgen.halving import halved
from otgen.listed import Tiles

SHARE = 1e-7


def cloud(kind, n, d, generator, dtype=torch.float64):
    """(n, d) points, degenerate in one way or another."""
    points = torch.rand(n, d, generator=generator, dtype=torch.float64)
    if kind == "one point":
        points = points[:1].expand(n, d)
    elif kind == "repeated":
        points = points[torch.randint(0, min(n, 5), (n,), generator=generator)]
    elif kind == "line":
        points = points[:, :1] * torch.ones(d, dtype=torch.float64)
    elif kind == "far clusters":
        points = 1e-3 * points + 100.0 * torch.randint(0, 3, (n, 1), generator=generator)
    return (points - 0.5).to(dtype).contiguous()


KINDS = st.sampled_from(["uniform", "one point", "repeated", "line", "far clusters"])


@st.composite
def problems(draw):
    """x, y, a, b, u, v, scale: weights some of which are zero, eps from tiny to huge, potentials near a solution or far off."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    n, m, d = draw(st.integers(1, 150)), draw(st.integers(1, 150)), draw(st.integers(1, 8))
    x, y = (cloud(draw(KINDS), size, d, generator, dtype) for size in (n, m))
    a, b = (torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) for size in (n, m))
    for weights in (a, b):
        weights[1:][torch.rand(len(weights) - 1, generator=generator) < draw(st.sampled_from([0.0, 0.5]))] = 0.0
    scale = 10.0 ** draw(st.floats(-4, 6))
    off = draw(st.sampled_from([0.0, 1.0, 30.0, 3000.0]))
    u, v = (off * torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in (n, m))
    u, v = u - scale / 2 * x.square().sum(1), v - scale / 2 * y.square().sum(1)
    return x, y, a / a.sum(), b / b.sum(), u, v, scale


def scores(x, y, u, v, scale):
    """(n, m) float64."""
    return u.double()[:, None] + v.double() + scale * (x.double() @ y.double().T)


def tiles_of(x, y, a, b, width=8, share=SHARE):
    return Tiles(halved(x, width), halved(y, width, (b > 0).nonzero()[:, 0]), a, b, share)


def rounded(x, y, u, v, scale):
    """What rounding may do to the logarithm of a sum."""
    size = float(u.abs().max() + v.abs().max() + scale * (x.double() @ y.double().T).abs().max())
    return 40 * torch.finfo(x.dtype).eps * (size + 10.0)


def always():
    """Lists, however many tiles they have, and the same ones however far potentials move."""
    return patch.multiple(listed, MOST_VISITED=1.0, DRIFT=math.inf)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(KINDS, st.integers(1, 300), st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**31))
def test_every_point_has_one_place(kind, n, d, width, seed):
    points = cloud(kind, n, d, torch.Generator().manual_seed(seed))
    among = torch.arange(0, n, 2)
    for chosen in (None, among):
        blocks = halved(points, width, chosen)
        wanted = torch.arange(n) if chosen is None else among
        assert blocks.order.shape[1] <= width
        assert torch.equal(blocks.order[blocks.real].sort().values, wanted)
        assert torch.equal(blocks.points, points[blocks.order])
        torch.testing.assert_close(blocks.back(blocks.of(points[:, 0]))[wanted], points[wanted, 0], rtol=0, atol=0)


def test_blocks_of_uniform_points_are_nearly_cubes():
    blocks = halved(torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)), 64)
    assert blocks.order.shape == (64, 64)
    assert float((blocks.highest - blocks.lowest).amax()) <= 0.4


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(problems())
def test_no_score_is_above_the_bound_of_its_tile(problem):
    """Neither as it is nor as it is computed."""
    x, y, _, b, u, v, scale = problem
    rows, columns = halved(x, 8), halved(y, 8, (b > 0).nonzero()[:, 0])
    unit = torch.finfo(x.dtype).eps / 2
    above = bounds.bounds(ceiling(rows, rows.of(u), scale), ceiling(columns, columns.of(v), scale), unit)
    computed = chunked.left_factor(x, u, scale) @ chunked.right_factor(y, v).T
    for found in (scores(x, y, u, v, scale), computed.double()):
        highest = found[rows.order][:, :, columns.order].amax((1, 3))
        assert (highest <= above).all()


def test_the_bound_of_affine_potentials_is_the_best_there_is():
    """A shift of one cloud, which makes them affine, changes no bound; constants would be off by tens of bits."""
    generator = torch.Generator().manual_seed(0)
    x, y, scale = cloud("uniform", 512, 3, generator), cloud("uniform", 512, 3, generator), 3600.0
    shift = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)

    def above(y, f, g):
        rows, columns = halved(x, 32), halved(y, 32)
        u, v = f - scale / 2 * x.square().sum(1), g - scale / 2 * y.square().sum(1)
        return bounds.bounds(ceiling(rows, rows.of(u), scale), ceiling(columns, columns.of(v), scale), 1e-16)

    nothing = torch.zeros(512, dtype=torch.float64)
    g = scale * (y @ shift + shift.square().sum() / 2)
    torch.testing.assert_close(above(y + shift, -scale * (x @ shift), g), above(y, nothing, nothing), rtol=1e-3, atol=0.1)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(problems(), st.sampled_from([0.0, 2.0, 40.0]))
def test_no_more_is_left_out_than_is_said(problem, moved):
    """Of any row, of the plan, at once and after the potentials moved; and the update is right to the share."""
    x, y, a, b, u, v, scale = problem
    generator = torch.Generator().manual_seed(0)
    with always():
        tiles = tiles_of(x, y, a, b)
        for _ in range(3):
            out, rho = tiles.half_step(u, v, scale, 1.0, most=1.0)
            exact = scores(x, y, u, v, scale)[:, b > 0] * math.log(2.0)
            logs = torch.logsumexp(exact + b[b > 0].double().log(), 1) / math.log(2.0)
            rounding = rounded(x, y, u, v, scale)
            assume(rounding < 1.0)
            assert float((out.double() - (u.double() - logs)).abs().max()) <= 2 * SHARE + rounding
            sums = torch.exp2(logs)
            counted = (rho > chunked.LOWEST) & (rho < chunked.HIGHEST) & (a > 0)
            left_out = float((a.double() * (sums - rho.double()))[counted].sum())
            assert left_out <= tiles.omitted + math.expm1(rounding) * float((a.double() * sums)[counted].sum())
            assert tiles.omitted <= 1.001 * SHARE * float((a.double() * rho.double())[counted].sum()) * math.exp(rounding) + 1e-300
            u = u + moved * torch.randn(len(u), generator=generator, dtype=torch.float64).to(u.dtype)
            v = v + moved * torch.randn(len(v), generator=generator, dtype=torch.float64).to(v.dtype)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(problems())
def test_products_lack_no_more_than_the_share(problem):
    x, y, a, b, u, v, scale = problem
    u = u - torch.logsumexp(scores(x, y, u, v, scale)[:, b > 0] * math.log(2.0), 1).to(u.dtype) / math.log(2.0)
    values = torch.randn(len(y), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.dtype)
    with always():
        found = tiles_of(x, y, a, b).product(u, v, values, scale)
    weights = torch.where(b > 0, b.double() * torch.exp2(scores(x, y, u, v, scale)), 0.0)
    rounding = rounded(x, y, u, v, scale)
    assume(rounding < 1.0)
    allowed = (SHARE + math.expm1(rounding)) * weights.sum(1, keepdim=True) * values.abs().max()
    assert ((found.double() - weights @ values.double()).abs() <= allowed).all()


def cubes(n=4096, dtype=torch.float32, reg=8e-4):
    """x, y, a, b, u, v, scale of uniform points and potentials near the solution."""
    generator = torch.Generator().manual_seed(0)
    x, y = (cloud("uniform", n, 3, generator, dtype) for _ in range(2))
    weights, scale = torch.full((n,), 1 / n, dtype=dtype), 2.0 / (math.log(2.0) * reg)
    u, v = -scale / 2 * x.square().sum(1), -scale / 2 * y.square().sum(1)
    out, rho = torch.empty_like(u), torch.empty_like(u)
    chunked.half_step(x=x, y=y, u=u, v=v, b=weights, x_sq=x.square().sum(1), u_out=out, rho=rho, scale=scale)
    return x, y, weights, weights, out, v, scale


def test_most_tiles_hold_nothing_at_a_small_eps():
    *clouds, u, v, scale = cubes()
    tiles = tiles_of(*clouds, width=16)
    _, rho = tiles.half_step(u, v, scale, 1.0)
    assert tiles.visited <= 0.15
    assert 0 < tiles.omitted <= SHARE
    torch.testing.assert_close(rho, torch.ones_like(rho), rtol=1e-4, atol=0)


def test_lists_are_made_again_only_when_scores_moved_far():
    *clouds, u, v, scale = cubes(2048)
    tiles = tiles_of(*clouds, width=16)
    with patch.object(listed, "bounds", wraps=listed.bounds) as made:
        tiles.half_step(u, v, scale, 1.0)
        tiles.half_step(u + 1.0, v + 1.0, scale, 1.0)
        tiles.half_step(u + 1e4, v - 1e4, scale, 1.0)
        assert made.call_count == 1
        assert 0.0 < tiles.omitted <= SHARE
        tiles.half_step(u + 2 * listed.DRIFT, v, scale, 1.0)
        assert made.call_count == 2
        tiles.half_step(u + 2 * listed.DRIFT, v, scale / 2, 1.0)
        assert made.call_count == 3


@pytest.mark.parametrize(("rise_u", "rise_v"), [(30.0, 0.0), (0.0, 6.0), (-6.0, 6.0)])
def test_old_lists_know_what_risen_potentials_add(rise_u, rise_v):
    """Those of every seventh point, so that no block rises as a whole; of sums that may lack a hundredth, which can be seen."""
    x, y, a, b, u, v, scale = cubes(1024, torch.float64)
    with always():
        tiles = tiles_of(x, y, a, b, width=16, share=0.01)
        tiles.half_step(u, v, scale, 1.0, most=1.0)
        u[::7] += rise_u
        v[::7] += rise_v
        out, rho = tiles.half_step(u, v, scale, 1.0, most=1.0)
    sums = torch.exp2(scores(x, y, u, v, scale)) @ b
    left_out = float(a @ (sums - rho))
    assert 0.0 < left_out <= tiles.omitted <= 0.01 * float(a @ rho)
    assert float((out - (u - sums.log2())).abs().max()) <= 0.02


def test_one_point_that_rises_brings_its_tile_back():
    """Two heaps, of which the far one adds 2^−40 to a sum, until one of its points rises by 45 bits."""
    x, y = torch.zeros(16, 1, dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat_interleave(16, 0)
    a, b = torch.full((16,), 1 / 16, dtype=torch.float64), torch.full((32,), 1 / 32, dtype=torch.float64)
    u, v = torch.zeros(16, dtype=torch.float64), -40.0 * y[:, 0]
    with always():
        tiles = tiles_of(x, y, a, b, width=16)
        _, near = tiles.half_step(u, v, 80.0, 1.0, most=1.0)
        v[20] += 45.0
        _, both = tiles.half_step(u, v, 80.0, 1.0, most=1.0)
    torch.testing.assert_close(near, torch.full_like(u, 0.5), rtol=SHARE, atol=0)
    torch.testing.assert_close(both, torch.full_like(u, 1.5), rtol=SHARE, atol=0)


def test_tiles_that_turn_out_to_be_missing_follow():
    """A wrong guess of the sums, here far too large, costs a second look and no accuracy."""
    *clouds, u, v, scale = cubes(2048, torch.float64)
    tiles, informed = tiles_of(*clouds, width=16), tiles_of(*clouds, width=16)
    out, _ = tiles.half_step(u - 15.0, v, scale, 1.0)
    expected, _ = informed.half_step(u, v, scale, 1.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=2 * SHARE)
    assert tiles.visited == pytest.approx(informed.visited, rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_potential_that_is_lost_is_not_left_out(bad):
    x, y, a, b, u, v, scale = cubes(512)
    tiles = tiles_of(x, y, a, b, width=16)
    tiles.half_step(u, v, scale, 1.0)
    v = v.clone()
    v[7] = bad
    assert tiles.half_step(u, v, scale, 1.0) is None
    assert (tiles.visited, tiles.omitted) == (1.0, 0.0)


def test_where_most_tiles_matter_there_are_no_lists():
    *clouds, u, v, scale = cubes(512)
    tiles = tiles_of(*clouds, width=16)
    assert tiles.half_step(u * 1e-3, v * 1e-3, scale * 1e-3, 1.0) is None
    assert (tiles.visited, tiles.omitted) == (1.0, 0.0)
