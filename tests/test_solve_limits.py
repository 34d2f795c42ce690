"""Where precision, mass and convergence end: what a solve then answers, and what it says of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import otgen
from otgen.errors import ConvergenceWarning, InputError
from otgen.solvers.sinkhorn import PATIENCE, Watch

METHODS = ["alternating", "symmetric"]


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def clouds(n=30, m=20, d=2, dtype=torch.float64):
    """Two overlapping clouds with random weights of mass one."""
    generator = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (m, d), (n,), (m,)))
    return x.to(dtype), (y + 0.2).to(dtype), (a / a.sum()).to(dtype), (b / b.sum()).to(dtype)


def only_warning(caught):
    (warning,) = caught
    return str(warning.message)


# Whose memory


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_changes_in_place_by_the_caller_do_not_reach_the_solution(method, kind):
    """An optimiser steps on the weights before a lazy attribute is read; a marginal that was handed out is overwritten."""

    def solve():
        given = clouds() if kind == "torch" else [tensor.numpy() for tensor in clouds()]
        return given, otgen.solve_sample(*given, reg=0.1, method=method, tol=1e-6)

    def answers(result):
        return result.value_linear, *result.potentials, result.a_to_b, result.b_to_a, result.plan

    expected = answers(solve()[1])
    given, result = solve()
    text = repr(result)
    for tensor in (*given, *result.marginals):
        tensor *= 0.0
    if kind == "torch":
        result.value.zero_()
    assert repr(result) == text
    for answer, value in zip(answers(result), expected):
        np.testing.assert_array_equal(np.asarray(answer), np.asarray(value))


# Masses that are not one


def test_gradients_in_the_weights_count_the_mass():
    """Along changes of both weights that keep the masses equal and move them; finite differences at mass 3."""
    x, y, a, b = clouds()
    generator = torch.Generator().manual_seed(1)
    along_a, along_b = (torch.rand(len(w), generator=generator, dtype=torch.float64) for w in (a, b))
    along_b *= along_a.sum() / along_b.sum()
    solve = lambda t: otgen.solve_sample(x, y, 3 * a + t * along_a, 3 * b + t * along_b, reg=0.1, tol=1e-12).value  # noqa: E731
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solve(t).backward()
    expected = float(solve(t.detach() + 1e-4) - solve(t.detach() - 1e-4)) / 2e-4
    assert t.grad.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mass", [1e-5, 3.0, 1e5])
def test_the_error_and_the_tolerance_are_shares_of_the_mass(method, mass):
    x, y, a, b = clouds()
    one = otgen.solve_sample(x, y, a, b, reg=0.02, method=method)
    result = otgen.solve_sample(x, y, mass * a, mass * b, reg=0.02, method=method)
    plan = result.plan
    error = float((plan.sum(1) - mass * a).abs().sum() + (plan.sum(0) - mass * b).abs().sum()) / mass
    assert result.marginal_error == pytest.approx(error, rel=1e-6, abs=1e-14)
    assert (result.stop, result.n_iters) == ("tol", one.n_iters)
    torch.testing.assert_close(plan, mass * one.plan, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "off", "fits"), [(torch.float32, 1e-3, False), (torch.bfloat16, 1e-3, True)])
def test_the_tolerance_of_masses_is_that_of_the_weights(dtype, off, fits):
    """Not that of the points: float32 weights beside bfloat16 points are precise, and must agree."""
    x, y, a, b = (tensor.bfloat16() for tensor in clouds())
    a, b = (torch.full((len(w),), 1.0 / len(w)) for w in (a, b))
    b = (b * (1 + off)).to(dtype)
    if fits:
        assert otgen.solve_sample(x, y, a, b, reg=0.5, tol=2e-2).converged
    else:
        with pytest.raises(InputError, match=r"expected equal masses; got .* sum\(b\) = 1\.001"):
            otgen.solve_sample(x, y, a, b, reg=0.5)


# What float32 cannot hold


def test_a_tolerance_below_the_floor_of_float32_is_doubted_though_the_error_reported_is_smaller():
    """A single point converges at once; its scores still are rounded."""
    x, y, _, _ = clouds(1, 20, dtype=torch.float32)
    with pytest.warns(ConvergenceWarning) as caught:
        result = otgen.solve_sample(x, y, reg=1e-4, tol=1e-5)
    assert result.stop == "tol"
    assert only_warning(caught).startswith("float32 cannot hold tol=1e-05: its floor here is about 1e-04; pass float64 points, or")
    assert otgen.solve_sample(x.double(), y.double(), reg=1e-4, tol=1e-5).converged
    assert otgen.solve_sample(x, y, reg=0.1, tol=1e-5).converged


def test_more_iterations_are_not_advised_below_the_floor_of_float32():
    x, y, a, b = clouds(dtype=torch.float32)
    with pytest.warns(ConvergenceWarning) as caught:
        otgen.solve_sample(x, y, a, b, reg=1e-5, max_iter=3)
    text = only_warning(caught)
    assert "after 3 iterations, above tol=0.001; float32 cannot hold tol=0.001" in text
    assert "max_iter" not in text


def test_an_outlier_without_weight_does_not_lower_what_float32_can_hold():
    x, y, a, b = clouds(dtype=torch.float32)
    x[0], a[0] = 100.0, 0.0
    assert otgen.solve_sample(x, y, a / a.sum(), b, reg=0.1, tol=1e-3).converged


def test_a_reg_for_which_float32_loses_the_value_warns():
    x, y, a, b = clouds()
    single = [tensor.float() for tensor in (x, y, a, b)]
    expected = float(otgen.solve_sample(x, y, a, b, reg=1e5).value)
    with pytest.warns(ConvergenceWarning) as caught:
        otgen.solve_sample(*single, reg=1e5)
    assert only_warning(caught).startswith(
        "float32 rounds the value and the potentials to 1e-02 at reg=100000; pass float64 points"
    )
    assert float(otgen.solve_sample(*single, reg=100.0).value) == pytest.approx(expected, rel=1e-2)


def test_half_precision_points_are_answered_in_float32():
    """Costs and potentials leave the range of float16 long before the points do."""
    x, y, _, _ = clouds()
    x, y = (300 * x).half(), (300 * y).half()
    result = otgen.solve_sample(x, y + 300, reg=5000.0)
    wide = otgen.solve_sample(x.float(), (y + 300).float(), reg=5000.0)
    for name in ("value", "value_linear", "potential_a", "potential_b", "plan", "a_to_b", "marginal_b"):
        answer = getattr(result, name)
        assert answer.dtype == torch.float32
        torch.testing.assert_close(answer, getattr(wide, name))
    assert float(result.value) > torch.finfo(torch.float16).max
    assert otgen.solve_sample(x, y + 300, reg=5000.0, potentials_init=result.potentials).n_iters <= 1
    torch.testing.assert_close(result.apply(torch.ones(len(x))), result.marginal_b)
    torch.testing.assert_close(result.apply(torch.ones_like(x[:, 0])), result.marginal_b)


# Slow convergence, and none


@pytest.mark.parametrize("method", METHODS)
def test_slow_convergence_is_not_taken_for_rounding(method):
    """At this reg the error rises for hundreds of iterations, in float64, whose floor is far below."""
    x, y, _, _ = clouds(100, 100)
    with pytest.warns(ConvergenceWarning, match="raise max_iter, reg or tol"):
        result = otgen.solve_sample(x, y + 1, reg=1e-5, max_iter=3000, method=method)
    assert result.stop == "max_iter"


@pytest.mark.parametrize("method", METHODS)
def test_float64_has_a_floor_too_and_its_users_are_not_sent_to_float64(method):
    x, y, a, b = clouds()
    with pytest.warns(ConvergenceWarning) as caught:
        result = otgen.solve_sample(x, y, a, b, reg=0.1, tol=0, max_iter=10000, method=method)
    assert result.stop == "precision floor"
    assert result.marginal_error < 1e-13
    assert only_warning(caught).endswith("fp64 rounding keeps it there: raise reg or tol")


def test_a_floor_is_declared_only_near_the_one_predicted():
    for error, expected in ((2e-5, "precision floor"), (1e-3, ""), (float("inf"), "nan")):
        watch = Watch(tol=0.0, floor=1e-6, max_iter=10**6, interval=1)
        for n in (1, PATIENCE - 1, PATIENCE + 1):
            assert watch.running.all()
            watch.look(torch.tensor([error]), n)
        assert watch.stops.tolist() == [expected]


@pytest.mark.parametrize("max_iter", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_convex_combinations_however_far_the_pair_is_from_its_solution(method, max_iter, dtype):
    """Rows of such a plan sum to 2^−10000, or to zero; their means are defined all the same, by the other side's potential."""
    x, y, a, b = clouds(dtype=dtype)
    y = y + 3
    with pytest.warns(ConvergenceWarning):
        result = otgen.solve_sample(x, y, a, b, reg=1e-3, tol=1e-4, max_iter=max_iter, method=method)
    near = 1e-6 if dtype == torch.float64 else 2e-2
    cost = torch.cdist(x.double(), y.double()).square()
    sides = ((result.a_to_b, y, b, result.potential_b, cost), (result.b_to_a, x, a, result.potential_a, cost.T))
    for answer, points, weights, potential, away in sides:
        expected = torch.softmax((potential.double() - away) / 1e-3 + weights.double().log(), 1) @ points.double()
        torch.testing.assert_close(answer.double(), expected, rtol=0, atol=near)
