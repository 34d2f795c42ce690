"""Marginals that may be missed at a price: optimality, closed forms, other libraries, derivatives."""

from __future__ import annotations

import math

import numpy as np
import ot as pot
import pytest
import torch
from clouds import cost, geomloss_without_annealing, problem, relaxed_primal, slope, strengths, uneven
from geomloss import SamplesLoss
from geomloss import ot as geomloss_ot

import otgen
from otgen.errors import ConvergenceWarning, InputError

pytestmark = pytest.mark.usefixtures("streamed")

METHODS = ["alternating", "symmetric", "anderson"]

RELAXED = [1.0, (0.3, 2.0), (None, 0.5), (0.5, None)]
"""Unbalanced, with a strength for each side, and semi-unbalanced either way."""


def solve(*args, tol=1e-12, max_iter=20000, **options):
    return otgen.solve_sample(*args, tol=tol, max_iter=max_iter, **options)


# The solution


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unbalanced", RELAXED, ids=str)
def test_marginals_are_those_of_the_optimality_conditions_and_dual_is_primal(unbalanced, method):
    x, y, a, b = uneven()
    result = solve(x, y, a, b, reg=0.05, unbalanced=unbalanced, method=method)
    (f, g), (rho_a, rho_b), plan = result.potentials, strengths(unbalanced), result.plan
    assert result.stop == "tol"
    torch.testing.assert_close(plan, a[:, None] * b * ((f[:, None] + g - cost(x, y)) / 0.05).exp(), rtol=1e-10, atol=0)
    torch.testing.assert_close(plan.sum(1), a * (-f / rho_a).exp(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(plan.sum(0), b * (-g / rho_b).exp(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.marginal_a, plan.sum(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.marginal_b, plan.sum(0), rtol=1e-9, atol=1e-12)
    expected = relaxed_primal(plan, a, b, cost(x, y), 0.05, unbalanced)
    torch.testing.assert_close(result.value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.value_linear, (plan * cost(x, y)).sum(), rtol=1e-10, atol=0)
    assert result.unbalanced == (rho_a, rho_b)


@pytest.mark.parametrize("unbalanced", [1.0, (0.3, 2.0)], ids=str)
def test_no_other_plan_is_cheaper(unbalanced):
    """The primal is strictly convex in a plan under no constraint, so every perturbation costs."""
    x, y, a, b = uneven(20, 15)
    result = solve(x, y, a, b, reg=0.05, unbalanced=unbalanced)
    generator = torch.Generator().manual_seed(5)
    for size in (1e-3, 0.1, 1.0):
        noise = torch.rand(20, 15, generator=generator, dtype=torch.float64)
        for other in (result.plan * (1 + size * (noise - 0.5)), result.plan * (1 + size), result.plan / (1 + size)):
            assert relaxed_primal(other, a, b, cost(x, y), 0.05, unbalanced) > result.value + 1e-8 * size


@pytest.mark.parametrize("unbalanced", RELAXED, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_pair_of_points_has_a_closed_form(unbalanced, method):
    """p·C + reg·KL(p|ab) + ρ_a·KL(p|a) + ρ_b·KL(p|b) is smallest where its derivative in p is zero."""
    mass_a, mass_b, reg = 3.0, 0.4, 0.2
    rho_a, rho_b = strengths(unbalanced)
    if math.isinf(rho_a + rho_b):
        p = mass_a if math.isinf(rho_a) else mass_b
    else:
        total = reg * math.log(mass_a * mass_b) + rho_a * math.log(mass_a) + rho_b * math.log(mass_b) - 1.25
        p = math.exp(total / (reg + rho_a + rho_b))
    x, y = torch.tensor([[0.0, 3.0]], dtype=torch.float64), torch.tensor([[1.0, 3.5]], dtype=torch.float64)
    a, b = (torch.tensor([mass], dtype=torch.float64) for mass in (mass_a, mass_b))
    result = solve(x, y, a, b, reg=reg, unbalanced=unbalanced, method=method)
    assert float(result.plan) == pytest.approx(p, rel=1e-9)
    expected = relaxed_primal(torch.full((1, 1), p, dtype=torch.float64), a, b, cost(x, y), reg, unbalanced)
    assert float(result.value) == pytest.approx(float(expected), rel=1e-9)


def test_clouds_out_of_reach_exchange_nothing_and_pay_for_all_their_mass():
    x, y, a, b = uneven()
    result = solve(x, y + 50.0, a, b, reg=0.05, unbalanced=(0.3, 0.7))
    assert float(result.plan.sum()) == 0.0
    assert float(result.value) == pytest.approx(0.3 * 1.7 + 0.7 * 0.6 + 0.05 * 1.7 * 0.6, rel=1e-12)


def test_the_value_grows_with_the_strength_and_tends_to_the_balanced_one():
    x, y, a, b = problem()
    balanced = solve(x, y, a, b, reg=0.05)
    found = [solve(x, y, a, b, reg=0.05, unbalanced=rho) for rho in (0.01, 0.1, 1.0, 1e3, 1e4, 1e9)]
    values = [float(result.value) for result in found]
    assert values == sorted(values)
    gaps = [float(balanced.value) - value for value in values]
    assert gaps[3] / gaps[4] == pytest.approx(10.0, rel=1e-2)  # first order in 1/ρ
    torch.testing.assert_close(found[-1].plan, balanced.plan, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[-1].value, balanced.value, rtol=1e-8, atol=0)


@pytest.mark.parametrize("rho", [1e4, 1e8])
def test_a_large_strength_costs_float32_nothing_where_the_masses_agree(rho):
    x, y, a, b = problem(dtype=torch.float32)
    balanced = otgen.solve_sample(x, y, a, b, reg=0.05, tol=1e-4)
    result = otgen.solve_sample(x, y, a, b, reg=0.05, tol=1e-4, unbalanced=rho)
    assert result.converged
    assert result.passes <= 1.5 * balanced.passes
    assert float(result.value) == pytest.approx(float(balanced.value), rel=1e-3)


@pytest.mark.parametrize("unbalanced", RELAXED, ids=str)
def test_the_sides_may_be_exchanged_and_the_frame_moved(unbalanced):
    x, y, a, b = uneven()
    forth = solve(x, y, a, b, reg=0.1, unbalanced=unbalanced)
    exchanged = tuple(reversed(unbalanced)) if isinstance(unbalanced, tuple) else unbalanced
    back = solve(y + 7.0, x + 7.0, b, a, reg=0.1, unbalanced=exchanged)
    torch.testing.assert_close(back.value, forth.value, rtol=1e-10, atol=0)
    torch.testing.assert_close(back.plan.T, forth.plan, rtol=1e-8, atol=1e-16)
    torch.testing.assert_close(back.potential_b, forth.potential_a, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("unbalanced", RELAXED, ids=str)
def test_points_without_weight_change_nothing_and_get_exact_zeros(unbalanced):
    x, y, a, b = uneven()
    a[::3], b[1::4] = 0.0, 0.0
    x[0], y[1] = 30.0, -30.0
    leaves = [tensor.clone().requires_grad_() for tensor in (x, y, a, b)]
    result = solve(*leaves, reg=0.1, unbalanced=unbalanced)
    fewer = solve(x[a > 0], y[b > 0], a[a > 0], b[b > 0], reg=0.1, unbalanced=unbalanced)
    assert (result.plan[a == 0] == 0).all()
    assert (result.plan[:, b == 0] == 0).all()
    assert (result.marginal_a[a == 0] == 0).all()
    assert (result.marginal_b[b == 0] == 0).all()
    torch.testing.assert_close(result.value, fewer.value, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.plan[a > 0][:, b > 0], fewer.plan, rtol=1e-8, atol=1e-16)
    result.value.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[0].grad[a == 0] == 0).all()
    assert result.a_to_b.isfinite().all()


def test_unequal_masses_are_refused_only_when_both_marginals_must_fit():
    x, y, a, b = uneven()
    for unbalanced in (None, (None, None), math.inf):
        with pytest.raises(InputError, match="expected equal masses"):
            otgen.solve_sample(x, y, a, b, reg=0.1, unbalanced=unbalanced)
    assert float(solve(x, y, a, b, reg=0.1, unbalanced=(None, 0.5)).plan.sum()) == pytest.approx(1.7, rel=1e-9)
    assert float(solve(x, y, a, b, reg=0.1, unbalanced=(0.5, None)).plan.sum()) == pytest.approx(0.6, rel=1e-9)
    assert solve(x, y, a, b, reg=0.1, unbalanced=0.5).converged


def test_aliases_are_twice_the_square():
    x, y, a, b = uneven()
    for unbalanced, reach in ((0.5, 0.5), ((None, 2.0), (None, 1.0)), ((0.02, 0.5), (0.1, 0.5))):
        expected = otgen.solve_sample(x, y, a, b, reg=0.18, unbalanced=unbalanced)
        result = otgen.solve_sample(x, y, a, b, blur=0.3, reach=reach)
        assert result.reg == pytest.approx(0.18, rel=1e-15)
        assert result.unbalanced == pytest.approx(expected.unbalanced, rel=1e-15)
        assert float(result.value) == pytest.approx(float(expected.value), rel=1e-12)


@pytest.mark.parametrize("unbalanced", RELAXED, ids=str)
def test_numpy_in_numpy_out_and_float32_near_float64(unbalanced):
    given = [tensor.numpy() for tensor in uneven()]
    double = otgen.solve_sample(*given, reg=0.1, unbalanced=unbalanced, tol=1e-8)
    single = otgen.solve_sample(*(array.astype(np.float32) for array in given), reg=0.1, unbalanced=unbalanced, tol=1e-5)
    for result, dtype in ((double, np.float64), (single, np.float32)):
        for answer in (result.value, *result.potentials, *result.marginals, result.plan, result.a_to_b):
            assert isinstance(answer, (np.ndarray, np.generic))
            assert answer.dtype == dtype
    assert single.value == pytest.approx(double.value, rel=1e-5)
    np.testing.assert_allclose(single.plan, double.plan, rtol=2e-3, atol=1e-7)


# Other libraries


@pytest.mark.parametrize("reg", [0.02, 0.5])
def test_parity_with_geomloss(monkeypatch, reg):
    geomloss_without_annealing(monkeypatch)
    x, y, a, b = uneven()
    mine = solve(x, y, a, b, reg=reg, unbalanced=0.6)
    theirs = geomloss_ot.solve_sample(x, y, a, b, reg=reg, unbalanced=0.6, max_iter=2)
    torch.testing.assert_close(mine.value, theirs.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(mine.potential_a, theirs.potential_a, rtol=0, atol=1e-9)
    torch.testing.assert_close(mine.potential_b, theirs.potential_b, rtol=0, atol=1e-9)
    torch.testing.assert_close(mine.plan, theirs.plan, rtol=1e-7, atol=1e-16)


@pytest.mark.parametrize("given", [problem, uneven])
def test_parity_with_samples_loss(monkeypatch, given):
    """Half the cost, half the value. Its biased value has Σa/2 + Σb/2 where the entropy of masses other than one has Σa·Σb."""
    geomloss_without_annealing(monkeypatch)
    x, y, a, b = given()
    blur, reach = 0.2, 0.5
    mine = solve(x, y, a, b, blur=blur, reach=reach)
    legacy = SamplesLoss("sinkhorn", p=2, blur=blur, reach=reach, debias=False, backend="tensorized")
    surplus = mine.reg * float(a.sum() * b.sum() - (a.sum() + b.sum()) / 2)
    assert float(mine.value) == pytest.approx(2 * float(legacy(a, x, b, y)) + surplus, rel=1e-9)
    legacy.potentials = True
    f, g = legacy(a, x, b, y)
    torch.testing.assert_close(mine.potential_a, 2 * f.squeeze(), rtol=0, atol=1e-9)
    torch.testing.assert_close(mine.potential_b, 2 * g.squeeze(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("unbalanced", RELAXED, ids=str)
def test_parity_with_pot(unbalanced):
    """The same reference measure a⊗b, so the same plan; its price is counted here, from the plan."""
    x, y, a, b = uneven()
    mine, c = solve(x, y, a, b, reg=0.1, unbalanced=unbalanced), cost(x, y)
    options = {"reg_type": "kl", "numItermax": 100000, "stopThr": 1e-14}
    plan = pot.unbalanced.sinkhorn_unbalanced(a, b, c, 0.1, strengths(unbalanced), **options)
    linear = pot.unbalanced.sinkhorn_unbalanced2(a, b, c, 0.1, strengths(unbalanced), returnCost="linear", **options)
    torch.testing.assert_close(mine.plan, plan, rtol=1e-8, atol=1e-16)
    assert float(mine.value_linear) == pytest.approx(float(linear), rel=1e-9)
    assert float(mine.value) == pytest.approx(float(relaxed_primal(plan, a, b, c, 0.1, unbalanced)), rel=1e-9)


# First order


@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("unbalanced", [None, *RELAXED], ids=str)
def test_gradients_agree_with_finite_differences(unbalanced, debias):
    given = problem(12, 9, 2) if unbalanced is None else uneven(12, 9, 2)
    leaves = [tensor.requires_grad_() for tensor in given]
    run = lambda *args: solve(*args, reg=0.1, tol=1e-14, max_iter=2000, unbalanced=unbalanced, debias=debias)  # noqa: E731
    run(*leaves).value.backward()
    generator = torch.Generator().manual_seed(3)
    for index, leaf in enumerate(leaves):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        if leaf.ndim == 1:
            direction = 0.02 * (direction - direction.mean() if unbalanced is None else direction + 0.5)
        expected = slope(run, leaves, index, direction)
        assert float((leaf.grad * direction).sum()) == pytest.approx(expected, abs=1e-8), "xyab"[index]


@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
def test_a_balanced_gradient_counts_a_mass_that_both_sides_gain(debias):
    x, y, a, b = problem(12, 9, 2)
    generator = torch.Generator().manual_seed(3)
    along_a, along_b = (torch.rand(len(weights), generator=generator, dtype=torch.float64) for weights in (a, b))
    along_b *= along_a.sum() / along_b.sum()
    run = lambda t: solve(x, y, a + t * along_a, b + t * along_b, reg=0.1, debias=debias)  # noqa: E731
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    run(t).value.backward()
    assert float(t.grad) == pytest.approx(slope(run, [t.detach()], 0, torch.ones((), dtype=torch.float64)), abs=1e-6)


# Where it ends


def test_the_symmetric_method_finds_a_mass_that_is_far_off():
    x, y, a, b = uneven()
    expected = solve(x, y, a, b, reg=0.05, unbalanced=100.0)
    result = otgen.solve_sample(x, y, a, b, reg=0.05, unbalanced=100.0, method="symmetric")
    assert result.converged
    assert float(result.value) == pytest.approx(float(expected.value), rel=1e-2)


@pytest.mark.parametrize("unbalanced", [10.0, 1e4, 1e6, (1e4, None)], ids=str)
def test_unequal_masses_under_a_large_strength_converge_in_float32(unbalanced):
    expected = solve(*uneven(), reg=0.05, unbalanced=unbalanced, tol=1e-8)
    result = otgen.solve_sample(*uneven(dtype=torch.float32), reg=0.05, unbalanced=unbalanced, max_iter=500)
    assert result.converged
    assert float(result.plan.sum()) == pytest.approx(float(expected.plan.sum()), rel=1e-3)


def test_a_strength_that_rounding_cannot_hold_is_told_so_and_not_to_raise_max_iter():
    x, y, a, b = (tensor.float() for tensor in uneven())
    with pytest.warns(ConvergenceWarning, match="float32|fp32"):
        result = otgen.solve_sample(30 * x, 30 * y, a, b, reg=10.0, unbalanced=1e-5, max_iter=500)
    assert result.stop == "precision floor"


@pytest.mark.parametrize(
    "options",
    [{"blur": 1e-200}, {"reg": 0.1, "reach": 1e-200}, {"reg": 0.1, "reach": 1e200}, {"blur": 1e200}],
    ids=str,
)
def test_an_alias_whose_square_is_no_number_is_refused(options):
    with pytest.raises(InputError, match="above 0"):
        otgen.solve_sample(*problem(), **options)
