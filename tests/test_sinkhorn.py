"""The Sinkhorn family: its formula in natural units, the redo of a failed shift, zero weights, and what fusion must not change."""

from __future__ import annotations

import pytest
import torch

from otgen.families import family, sinkhorn, tiles
from otgen.gpus import gpu
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.verify import call_arguments

KIND = family("sinkhorn")
SYMMETRIC = KIND.problem(70, 45, 5, schedule="symmetric")
ALTERNATING = KIND.problem(70, 45, 5)
OWN = KIND.problem(150, 150, 5, schedule="own")


def run(problem: Problem, given: dict[str, torch.Tensor], **axes: int | str) -> dict[str, torch.Tensor]:
    """The outputs of an interpreted kernel, in float64."""
    variant = KIND.default(problem).with_(**{"BLOCK_M": 32, "BLOCK_N": 16, **axes})
    call = call_arguments(problem, given, "cpu")
    load(problem, variant).launch(**call)
    return {name: call[name].double() for name in KIND.reference(problem, given)}


def test_reference_is_the_softmin_of_the_plan() -> None:
    """T_f(g)_i = −eps·log Σ_j b_j exp((g_j − C_ij)/eps), in natural units, through none of the base-2 code."""
    given = {**tiles.clouds(ALTERNATING, 3), "damping": 1.0, "step": 1.0}
    given["x_sq"], y_sq = (given["x"] ** 2).sum(1), (given["y"] ** 2).sum(1)
    cost = torch.cdist(given["x"], given["y"]) ** 2 * given["cost"]
    g = (given["v"] + given["scale"] / 2 * y_sq) / given["kappa"]
    f = -given["eps"] * torch.logsumexp((g - cost) / given["eps"] + given["b"].log(), 1)
    found = sinkhorn.reference(ALTERNATING, given)["u_out"]
    torch.testing.assert_close((found + given["scale"] / 2 * given["x_sq"]) / given["kappa"], f, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fusion", ["two_launches", "one_launch", "one_sweep"])
def test_fusion_and_stabiliser_do_not_change_the_step(fusion: str) -> None:
    given = sinkhorn.inputs(SYMMETRIC, 0)
    plain = run(SYMMETRIC, given, fusion="two_launches", stabiliser="running")
    fused = run(SYMMETRIC, given, fusion=fusion, stabiliser="shifted")
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fusion", ["two_launches", "one_launch", "one_sweep"])
@pytest.mark.parametrize("offset", [-3000.0, -130.0, 130.0, 3000.0])
def test_a_shift_out_of_range_is_redone(fusion: str, offset: float) -> None:
    """u* does not depend on u: however wrong the shift, the kernel must find it; rho itself may leave fp32's range."""
    given = {**sinkhorn.inputs(SYMMETRIC, 1), "damping_a": 1.0, "damping_b": 1.0, "step": 1.0}
    expected = sinkhorn.reference(SYMMETRIC, given)["u_out"]
    given["u"][::7] += offset
    found = run(SYMMETRIC, given, fusion=fusion, stabiliser="shifted")
    torch.testing.assert_close(found["u_out"], expected, rtol=1e-6, atol=1e-3)
    if offset > 0:
        assert found["v_out"].isfinite().all()


@pytest.mark.parametrize("stabiliser", ["running", "shifted"])
def test_points_without_weight_count_for_nothing(stabiliser: str) -> None:
    """Moving a weightless point changes no other potential, and its own potential is still the softmin there."""
    given = {**sinkhorn.inputs(ALTERNATING, 2), "damping": 1.0, "step": 1.0}
    column = int((given["b"] == 0).nonzero()[0])
    before = run(ALTERNATING, given, stabiliser=stabiliser)
    given["v"][column] = 900.0
    after = run(ALTERNATING, given, stabiliser=stabiliser)
    assert torch.equal(before["u_out"], after["u_out"])


def test_marginals_have_the_same_mass() -> None:
    """Σ_i a_i rho_i = Σ_j b_j gamma_j: both are the plan's mass, out of one exponential."""
    given = sinkhorn.inputs(SYMMETRIC, 4)
    given["u"][0] += 100.0
    found = run(SYMMETRIC, given, fusion="one_sweep", stabiliser="shifted")
    rows, columns = (given["a"] * found["rho"]).sum(), (given["b"] * found["gamma"]).sum()
    torch.testing.assert_close(rows, columns, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("tile", [(32, 16), (16, 64), (64, 64)], ids=str)
def test_half_a_sweep_has_all_sums(splits: int, tile: tuple[int, int]) -> None:
    """Symmetric scores: later columns are rows too, whatever the tile and however many programs share them."""
    given = sinkhorn.inputs(OWN, 5)
    expected, (rows, columns) = sinkhorn.reference(OWN, given), tile
    options = {"fusion": "half_sweep", "stabiliser": "shifted", "BLOCK_M": rows, "BLOCK_N": columns, "SPLITS": splits}
    found = run(OWN, given, **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


def test_only_a_measure_with_itself_has_half_a_sweep() -> None:
    assert "as many columns as rows" in KIND.fits(KIND.problem(70, 45, 5, schedule="own"), KIND.default(OWN), gpu("a100"))


def test_one_sweep_needs_a_shift() -> None:
    variant = Variant(KIND.default(SYMMETRIC), fusion="one_sweep", stabiliser="running")
    assert "common shift" in KIND.fits(SYMMETRIC, variant, gpu("a100"))
