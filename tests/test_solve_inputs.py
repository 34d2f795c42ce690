"""What the solver takes: weights of zero, degenerate clouds, numpy arrays, half precision, strided tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clouds import METHODS, cost, primal, problem

import otgen

pytestmark = pytest.mark.usefixtures("streamed")


# Weights of zero, degenerate clouds


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_without_weight_get_exact_zeros_and_disturb_nothing(method, dtype):
    x, y, a, b = problem(dtype=dtype)
    x[3] += 100.0
    y[5] -= 100.0
    a[3], b[5] = 0.0, 0.0
    a[0] += 1.0 - a.sum()
    b[0] += 1.0 - b.sum()
    result = otgen.solve_sample(x, y, a, b, reg=0.05, tol=1e-4, method=method)
    rows, columns = torch.arange(len(x)) != 3, torch.arange(len(y)) != 5
    clean = otgen.solve_sample(x[rows], y[columns], a[rows], b[columns], reg=0.05, tol=1e-4, method=method)
    assert (result.plan[3] == 0).all()
    assert (result.plan[:, 5] == 0).all()
    assert result.n_iters == clean.n_iters
    torch.testing.assert_close(result.plan[rows][:, columns], clean.plan, rtol=2e-2 if dtype == torch.float32 else 1e-8, atol=1e-9)
    for answer in (result.value, *result.potentials, result.a_to_b, result.b_to_a, result.apply(torch.ones_like(a))):
        assert answer.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (1, 50, 2), (50, 1, 2), (3, 300, 2), (40, 40, 1), (20, 30, 1025)], ids=lambda size: str(size)
)
def test_degenerate_shapes(n, m, d, method):
    x, y, a, b = problem(n, m, d, dtype=torch.float32)
    result = otgen.solve_sample(x, y, a, b, reg=0.1 * d, tol=1e-4, method=method)
    assert result.converged
    double = otgen.solve_sample(x.double(), y.double(), reg=0.1 * d, tol=1e-4) if n == m else None
    assert float((result.plan.sum(0) - b).abs().sum()) <= 2e-4
    assert double is None or double.converged


@pytest.mark.parametrize("method", METHODS)
def test_identical_and_duplicate_points(method):
    x = torch.full((7, 3), 0.3)
    result = otgen.solve_sample(x, x.clone(), reg=0.1, method=method)
    assert float(result.value) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(result.a_to_b, x)
    y, _, _, _ = problem(20, 20, 3)
    twice = otgen.solve_sample(torch.cat((y, y)), y + 0.1, reg=0.1, tol=1e-8, method=method)
    once = otgen.solve_sample(y, y + 0.1, reg=0.1, tol=1e-8, method=method)
    torch.testing.assert_close(twice.value, once.value)


def test_an_offset_of_ten_thousand_costs_only_the_rounding_of_the_points():
    x, y, a, b = problem(dtype=torch.float32)
    far_x, far_y = x + 1e4, y + 1e4
    far = otgen.solve_sample(far_x, far_y, a, b, reg=0.05, tol=1e-5)
    a, b = (weights.double() / weights.double().sum() for weights in (a, b))
    near = otgen.solve_sample(far_x.double() - 1e4, far_y.double() - 1e4, a, b, reg=0.05, tol=1e-5)
    assert far.converged
    assert float(far.value) == pytest.approx(float(near.value), rel=1e-4)


def test_clouds_far_apart_at_a_small_reg_do_not_underflow():
    x, y, _, _ = problem(dtype=torch.float32)
    result = otgen.solve_sample(x, y + 50.0, reg=0.1, tol=1e-2)
    assert result.converged
    assert float(result.value_linear) == pytest.approx(float((y + 50.0).mean(0).sub(x.mean(0)).square().sum()), rel=1e-2)


def test_unnormalised_masses_are_taken_as_they_are():
    x, y, a, b = problem()
    one, ten = (otgen.solve_sample(x, y, mass * a, mass * b, reg=0.1, tol=1e-9) for mass in (1, 10))
    torch.testing.assert_close(ten.plan, 10 * one.plan)
    torch.testing.assert_close(ten.value, primal(ten.plan, 10 * a, 10 * b, cost(x, y), 0.1))


# Kinds of input


def test_numpy_in_numpy_out():
    x, y, a, b = (tensor.numpy() for tensor in problem())
    result = otgen.solve_sample(x, y, a, b, reg=0.1)
    assert isinstance(result.value, np.float64)
    for answer in (*result.potentials, *result.marginals, result.a_to_b, result.plan, result.apply(np.ones(len(y)), axis=1)):
        assert isinstance(answer, np.ndarray)
        assert answer.dtype == np.float64
    single = otgen.solve_sample(x.astype(np.float32)[::-1], np.broadcast_to(y[:1].astype(np.float32), y.shape), reg=0.1)
    assert single.plan.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, y, _, _ = problem(dtype=dtype)
    x.requires_grad_()
    result = otgen.solve_sample(x, y, reg=0.1)
    assert result.precision == "fp32"
    assert {answer.dtype for answer in (result.value, *result.potentials, result.plan, result.a_to_b)} == {torch.float32}
    result.value.backward()
    assert x.grad.dtype == dtype
    wide = otgen.solve_sample(x.detach().float(), y.float(), reg=0.1)
    assert result.value.item() == pytest.approx(wide.value.item(), rel=1e-2)
    weights = torch.full((len(x),), 1 / len(x))
    assert otgen.solve_sample(x, y, weights, reg=0.1).converged


def test_strided_and_expanded_tensors_work():
    x, y, a, b = problem(40, 40, 4)
    plain = otgen.solve_sample(x, y, a, b, reg=0.1)
    wide = torch.zeros(40, 8, dtype=torch.float64)
    wide[:, ::2] = x
    strided = otgen.solve_sample(wide[:, ::2], y.T.contiguous().T, torch.stack((a, a), 1)[:, 0], b, reg=0.1)
    torch.testing.assert_close(strided.potential_a, plain.potential_a)
    point = torch.rand(1, 4, dtype=torch.float64, requires_grad=True)
    result = otgen.solve_sample(point.expand(40, 4), y, torch.tensor(1 / 40, dtype=torch.float64).expand(40), b, reg=0.1)
    result.value.backward()
    torch.testing.assert_close(point.grad, 2 * (point.detach() - b @ y), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["anderson", "alternating", "newton"])
@pytest.mark.parametrize("unbalanced", [None, 0.5])
@pytest.mark.parametrize("debias", [False, True])
def test_a_point_without_weight_ends_with_the_update_from_the_solution(method, unbalanced, debias):
    """However soon the loop stops: its potential is the softmin, and so is the derivative in its weight."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[0.0, 0.1], [0.9, 0.0]], dtype=torch.float64)
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    both = {"reg": 0.5, "tol": 1e-12, "unbalanced": unbalanced, "debias": debias, "method": method}
    result = otgen.solve_sample(x, y, a.requires_grad_(), b, **both)
    costs, factor = torch.cdist(x, y).square(), 1.0 if unbalanced is None else 0.5 / 1.0
    soft = -0.5 * torch.logsumexp((result.potential_b - costs) / 0.5 + b.log(), 1)
    torch.testing.assert_close(result.potential_a, factor * soft, rtol=1e-8, atol=1e-8)
    result.value.backward()
    moved = torch.tensor([1.0 - 1e-6, 1e-6], dtype=torch.float64)
    slope = (otgen.solve_sample(x, y, moved, b, **both).value - result.value.detach()) / 1e-6
    assert float(a.grad[1] - a.grad[0]) == pytest.approx(float(slope), rel=1e-3, abs=1e-3)
