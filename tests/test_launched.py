"""Lists made on the device and half steps that visit them: every sum is right to its share, and solves whose lists nobody sees."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from clouds import problem as clouds_of

import otgen
from otgen import dispatch, launched, listed_step, ops
from otgen.errors import InputError, NoValidVariant
from otgen.families import family, lists
from otgen.halving import filled
from otgen.launched import LaunchedTiles
from otgen.solvers import listed, sample
from otgen.solvers.inputs import centre, read
from otgen.solvers.steps import Steps

pytestmark = pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")

WIDTH = 32
SHARE = 1e-7


def scene(n: int = 400, m: int = 350, *, zeros: bool = False, d: int = 2) -> tuple[torch.Tensor, ...]:
    """x, y, a, b, u, v, scale: float32 points and potentials near the solution."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(size, d, generator=generator) - 0.5 for size in (n, m))
    a, b = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
    if zeros:
        a[::3], b[::5] = 0.0, 0.0
    scale = 2.0 / (math.log(2.0) * 4e-4)
    u, v = -scale / 2 * x.square().sum(1), -scale / 2 * y.square().sum(1)
    for _ in range(4):
        u = u - log_sums(x, y, u, v, b, scale).float()
        v = v - log_sums(y, x, v, u, a, scale).float()
    return x, y, a, b, u, v, scale


def log_sums(x, y, u, v, b, scale):
    """(n,) float64."""
    exponents = (u.double()[:, None] + v.double() + scale * x.double() @ y.double().T) * math.log(2.0)
    return torch.logsumexp(exponents + b.double().log(), 1) / math.log(2.0)


def tiles_of(x, y, a, b, share=SHARE, width=WIDTH):
    columns = filled(y, width, None if bool((b > 0).all()) else (b > 0).nonzero()[:, 0])
    return LaunchedTiles(filled(x, width), columns, a, b, share)


def rounding(x, y, u, v, scale) -> float:
    size = float(u.abs().max() + v.abs().max() + scale * (x @ y.T).abs().max())
    return 2.0**-20 * size


@pytest.mark.parametrize("count", [1, 31, 32, 33, 200, 1000])
def test_blocks_are_full(count: int) -> None:
    points = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    blocks = filled(points, 32)
    assert blocks.order.shape == (-(-count // 32), 32)
    assert torch.equal(blocks.order[blocks.real].sort().values, torch.arange(count))
    assert torch.equal(blocks.back(blocks.of(points[:, 0])), points[:, 0])
    if count == 1000:
        volumes = (blocks.highest - blocks.lowest).prod(1)
        assert float(volumes.mean()) <= 2.0 / len(volumes)


@pytest.mark.parametrize("zeros", [False, True], ids=["weights", "zero weights"])
@pytest.mark.parametrize("moved", [0.0, 3.0, 30.0])
def test_every_sum_is_right_to_the_share_wherever_potentials_move(moved: float, zeros: bool) -> None:
    """Right after lists are made, and with old ones, of which rows that rose too far are not content."""
    x, y, a, b, u, v, scale = scene(zeros=zeros)
    tiles, generator = tiles_of(x, y, a, b), torch.Generator().manual_seed(0)
    with patch.object(launched, "LOOK", 1 << 30):
        for _ in range(3):
            out, _ = tiles.half_step(u, v, scale, 1.0)
            expected = log_sums(x, y, u, v, b, scale)
            assert float((out.double() - (u.double() - expected)).abs().max()) <= 2 * SHARE + rounding(x, y, u, v, scale)
            mass = float((a.double() * torch.exp2(expected)).sum())
            assert 0.0 < tiles.omitted <= 1.01 * SHARE * mass or (tiles.omitted == 0.0 and tiles.visited == 1.0)
            u, v = (side + moved * torch.randn(len(side), generator=generator) for side in (u, v))
    if moved == 0.0:
        assert tiles.visited < 0.5


def test_what_is_omitted_is_what_is_missing() -> None:
    """Of sums that may lack a hundredth, which can be seen."""
    x, y, a, b, u, v, scale = scene()
    tiles = tiles_of(x, y, a, b, share=0.01)
    _, rho = tiles.half_step(u, v, scale, 1.0)
    missing = float((a.double() * (torch.exp2(log_sums(x, y, u, v, b, scale)) - rho.double())).sum())
    assert 1e-6 < missing <= tiles.omitted <= 0.01


def test_one_point_that_rises_brings_its_tile_back() -> None:
    """Two heaps, of which the far one adds 2^−41 to a sum, until one of its points rises by 45 bits. Then the near one falls."""
    x, y = torch.zeros(WIDTH, 1), torch.tensor([[0.0], [1.0]]).repeat_interleave(WIDTH, 0)
    a, b = torch.full((WIDTH,), 1 / WIDTH), torch.full((2 * WIDTH,), 0.5 / WIDTH)
    u, v = torch.zeros(WIDTH), -40.0 * y[:, 0]
    tiles = tiles_of(x, y, a, b)
    for expected, visited, rises in ((0.5, 0.5, {40: 45.0}), (1.0, 1.0, {40: -45.0, 0: 1.0}), (0.5 + 1 / 64, 0.5, {})):
        _, rho = tiles.half_step(u, v, 80.0, 1.0)
        torch.testing.assert_close(rho, torch.full_like(u, expected), rtol=1e-6, atol=0)
        assert tiles.visited == visited
        assert (tiles.omitted == 0.0) == (visited == 1.0)
        for point, rise in rises.items():
            v[point] += rise
    v[:WIDTH] -= 60.0
    _, rho = tiles.half_step(u, v, 80.0, 1.0)
    torch.testing.assert_close(rho, torch.full_like(u, 2.0**-41), rtol=1e-6, atol=0)


def test_rows_whose_neighbours_fell_are_complete_and_the_next_look_makes_lists_for_them() -> None:
    x, y, a, b, u, v, scale = scene()
    tiles = tiles_of(x, y, a, b)
    with patch.object(launched, "bounds", wraps=launched.bounds) as made:
        tiles.half_step(u, v, scale, 1.0)
        before, v = tiles.visited, v - 60.0 * (y[:, 0] > 0.3)
        for _ in range(launched.LOOK - 2):
            out, _ = tiles.half_step(u, v, scale, 1.0)
            assert float((out.double() + log_sums(x, y, u, v, b, scale) - u.double()).abs().max()) < 1e-3
        assert made.call_count == 1
        assert tiles.visited > before
        tiles.half_step(u, v, scale, 1.0)
        assert made.call_count == 2


def test_only_making_lists_and_looking_at_them_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, a, b, u, v, scale = scene()
    tiles, waits, waited = tiles_of(x, y, a, b), Counter[str](), []

    def waiting(name: str) -> None:
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *given: (waits.update([name]), whole(*given))[1])

    monkeypatch.setattr(launched, "sinkhorn_listed_step", lambda x, y, u, *others, **named: (u, torch.ones_like(u)))
    for name in ("__bool__", "__float__", "__int__", "item", "tolist", "nonzero", "cpu"):
        waiting(name)
    for step in range(1, 2 * launched.LOOK):
        waits.clear()
        assert tiles.half_step(u, v, scale, 1.0) is not None
        waited += [step] * bool(waits)
    assert waited == [1, launched.LOOK]


def test_a_potential_that_is_lost_leaves_nothing_out() -> None:
    x, y, a, b, u, v, scale = scene()
    tiles = tiles_of(x, y, a, b)
    tiles.half_step(u, v, scale, 1.0)
    v[7] = math.nan
    out, _ = tiles.half_step(u, v, scale, 1.0)
    assert bool(out.isnan().all())
    assert (tiles.visited, tiles.omitted) == (1.0, 0.0)


def test_streamed_points_have_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    x, y, a, b, u, v, scale = scene()
    with pytest.raises(InputError, match="expected float32 points on a GPU"):
        tiles_of(x, y, a, b).half_step(u, v, scale, 1.0)


# --- solves


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few points, and so few blocks that a symmetric step is content with less of a saving."""
    monkeypatch.setattr(lists, "WIDTH", WIDTH)
    monkeypatch.setattr(listed, "HALF_VISITED", 0.8)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::otgen.errors.ConvergenceWarning")
@pytest.mark.parametrize("options", [{}, {"method": "symmetric"}, {"unbalanced": (1.0, 0.5), "debias": True}], ids=str)
def test_a_solve_with_lists_gives_what_all_tiles_do_in_the_callers_order(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few iterations from near the solution; some points have no weight."""
    x, y, a, b = clouds_of(220, 190, d=1, dtype=torch.float32)
    a[::3], b[::5] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    with monkeypatch.context() as streamed:
        streamed.delenv("TRITON_INTERPRET")
        start = otgen.solve_sample(x, y, a, b, reg=3e-4, tol=1e-2, tiles="all").potentials
    asked = {"reg": 3e-4, "tol": 1e-9, "max_iter": 4, "potentials_init": start, **options}
    expected = otgen.solve_sample(x, y, a, b, tiles="all", **asked)
    with patch.object(listed, "filled", wraps=listed.filled) as sorting:
        found = otgen.solve_sample(x, y, a, b, tiles="listed", **asked)
    assert sorting.call_count == 4  # of each cloud all points, and those that weigh something
    assert found.visited < 0.6
    assert 0.0 < found.omitted_mass <= 1.01 * listed.MOST_OMITTED
    assert (expected.visited, expected.omitted_mass) == (1.0, 0.0)
    assert (found.n_iters, found.stop) == (expected.n_iters, expected.stop)
    for name in ("value", "potential_a", "potential_b", "marginal_a", "a_to_b"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("us", "faster"), [(9.0, True), (11.0, False), (math.inf, False)])
def test_solvers_take_lists_where_they_are_faster(us: float, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, a, b = clouds_of(300, 260, dtype=torch.float32)
    known = {listed_step.flags_of(WIDTH): us, ops.ALTERNATING: 10.0}
    monkeypatch.setattr(ops, "known_us", lambda family, x, y, flags, modes: known[flags])
    monkeypatch.setattr(listed, "LEAST_PAIRS", len(x) * len(y))
    steps = Steps(centre(read(x, y, a, b)), 1.0, ("ieee",))
    assert isinstance(listed.listed(steps, 1e-3), listed.LaunchedSteps) == faster
    assert listed.listed(steps, 1e-3, "all") is steps
    monkeypatch.setattr(listed, "LEAST_PAIRS", len(x) * len(y) + 1)
    assert listed.listed(steps, 1e-3) is steps


def test_each_regularisation_has_its_lists_and_coarse_ones_have_none() -> None:
    x, y, a, b, u, v, scale = scene()
    tiles = LaunchedTiles(filled(x, WIDTH), filled(y, WIDTH), a, b, SHARE, coarse=scale / 2)
    with patch.object(launched, "bounds", wraps=launched.bounds) as made:
        assert [tiles.half_step(u, v, at, 1.0) is None for at in (scale / 4, scale, scale)] == [True, False, False]
        assert (made.call_count, tiles.visited < 1.0) == (1, True)
        tiles.product(u, v, v[:, None], scale)
        assert (tiles.visited, tiles.omitted) == (1.0, 0.0)
        tiles.half_step(u, v, 2 * scale, 1.0)
        assert made.call_count == 2


def test_without_a_tuned_kernel_lists_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that the solve launches, they come first."""
    x, y, a, b = clouds_of(60, 50, dtype=torch.float32)
    untuned = dispatch.Dispatcher([])
    monkeypatch.setattr(dispatch, "explain", untuned.explain)
    with pytest.raises(NoValidVariant, match=r"a tuned variant of sinkhorn\[listed=128"):
        otgen.solve_sample(x, y, a, b, reg=0.1, tiles="listed", tune="off")


@pytest.mark.parametrize(
    ("variant", "tiles"), [("auto", "auto"), ({"stabiliser": "shifted"}, "all")], ids=["auto", "a named variant"]
)
def test_a_named_variant_is_of_half_steps_that_visit_all_tiles(variant: Any, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, a, b = clouds_of(60, 50, dtype=torch.float32)
    if variant != "auto":
        kind = family("sinkhorn")
        variant = kind.default(kind.problem(60, 50, 3)).with_(**variant)
    asked: list[str] = []
    monkeypatch.setattr(sample, "listed", lambda steps, tol, tiles: (asked.append(tiles), steps)[1])
    otgen.solve_sample(x, y, a, b, reg=1.0, variant=variant)
    assert asked == [tiles]
