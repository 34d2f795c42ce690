"""Potentials outside the sample and the c-transform: formulas in float64, derivatives by differences, limits, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from clouds import cost, problem

import otgen
from otgen import chunked
from otgen.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("streamed")


def elsewhere(k=17, d=3, dtype=torch.float64):
    return (2.0 * torch.rand(k, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.5).to(dtype)


def softmin(x, y, g, b, reg):
    return -reg * torch.logsumexp(b.log() + (g - cost(x, y)) / reg, 1)


# Potentials outside the sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 50.0])
@pytest.mark.parametrize(("unbalanced", "damping"), [(None, (1.0, 1.0)), ((0.3, None), (0.75, 1.0)), (0.3, (0.75, 0.75))])
def test_potentials_are_the_update_at_any_point(dtype, shift, unbalanced, damping):
    x, y, a, b = problem()
    a[3] = b[5] = 0.0
    a, b = a / a.sum(), b / b.sum()
    result = otgen.solve_sample(
        (x + shift).to(dtype), (y + shift).to(dtype), a.to(dtype), b.to(dtype), reg=0.1, unbalanced=unbalanced
    )
    potentials, new = result.to_dual_potentials(), elsewhere()
    f, g = (potential.double() for potential in result.potentials)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5 * (1 + shift / 10)}
    torch.testing.assert_close(potentials.f((new + shift).to(dtype)).double(), damping[0] * softmin(new, y, g, b, 0.1), **tolerance)
    torch.testing.assert_close(potentials.g((new + shift).to(dtype)).double(), damping[1] * softmin(new, x, f, a, 0.1), **tolerance)
    weights = torch.softmax(b.log() + (g - cost(new, y)) / 0.1, 1)
    torch.testing.assert_close(potentials.transport((new + shift).to(dtype)).double() - shift, weights @ y, **tolerance)
    back = torch.softmax(a.log() + (f - cost(new, x)) / 0.1, 1)
    torch.testing.assert_close(potentials.transport((new + shift).to(dtype), forward=False).double() - shift, back @ x, **tolerance)


def test_at_the_samples_own_points_they_are_the_solution():
    x, y, a, b = problem()
    result = otgen.solve_sample(x, y, a, b, reg=0.1, tol=1e-12)
    potentials = result.to_dual_potentials()
    torch.testing.assert_close(potentials.f(x), result.potential_a)
    torch.testing.assert_close(potentials.g(y), result.potential_b)
    torch.testing.assert_close(potentials.transport(x), result.a_to_b)
    torch.testing.assert_close(potentials.transport(y, forward=False), result.b_to_a)


@pytest.mark.parametrize(("unbalanced", "damping"), [(None, 1.0), (0.3, 0.75)])
@pytest.mark.parametrize("side", ["f", "g"])
def test_the_gradient_is_twice_the_way_to_the_map(side, unbalanced, damping):
    x, y, a, b = problem()
    potentials = otgen.solve_sample(x, y, a, b, reg=0.1, unbalanced=unbalanced).to_dual_potentials()
    function, forward = getattr(potentials, side), side == "f"
    assert torch.autograd.gradcheck(function, elsewhere(4).requires_grad_(), atol=1e-7)
    new = elsewhere().requires_grad_()
    (gradient,) = torch.autograd.grad(function(new).sum(), new)
    torch.testing.assert_close(new - gradient / (2 * damping), potentials.transport(new, forward))
    with torch.no_grad():
        assert not function(new).requires_grad


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, y, _, _ = problem()
    new = elsewhere().requires_grad_()
    potential = otgen.solve_sample(x, y, reg=0.1).to_dual_potentials().f(new)
    (gradient,) = torch.autograd.grad(potential.sum(), new, create_graph=True)
    with pytest.raises(UsageError, match=r"one derivative of a potential at most; got a second; type \.detach"):
        gradient.square().sum().backward()


def test_points_far_outside_go_to_the_nearest_and_nothing_overflows():
    x, y, _, _ = problem(dtype=torch.float32)
    potentials = otgen.solve_sample(x, y, reg=0.05).to_dual_potentials()
    far = torch.tensor([[100.0, 0.0, 0.0], [0.0, -300.0, 0.0]])
    assert potentials.f(far).isfinite().all()
    moved = potentials.transport(far)
    assert ((moved >= y.min(0).values - 1e-4) & (moved <= y.max(0).values + 1e-4)).all()
    assert moved[0, 0] > y[:, 0].quantile(0.9)


def test_potentials_of_half_precision_and_numpy():
    x, y, _, _ = problem(dtype=torch.float16)
    potentials = otgen.solve_sample(x, y, reg=0.1).to_dual_potentials()
    new = elsewhere(dtype=torch.float16).requires_grad_()
    potentials.f(new).sum().backward()
    assert (potentials.f(new).dtype, new.grad.dtype) == (torch.float32, torch.float16)
    single = potentials.f(new.detach().float())
    torch.testing.assert_close(potentials.f(new.detach()), single)
    arrays = otgen.solve_sample(x.float().numpy(), y.float().numpy(), reg=0.1).to_dual_potentials()
    for answer in (arrays.f(new.detach().float().numpy()), arrays.transport(new.detach().float().numpy())):
        assert isinstance(answer, np.ndarray)
        assert answer.dtype == np.float32
    np.testing.assert_allclose(arrays.f(new.detach().float().numpy()), single.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.float64), r"expected x of shape \(k, 3\); got \(4, 2\)"),
        (torch.zeros(3, dtype=torch.float64), r"expected x of shape \(k, 3\)"),
        (torch.zeros(0, 3, dtype=torch.float64), r"expected x of shape \(k, 3\)"),
        (torch.zeros(4, 3), "expected x in X_a's dtype float64; got float32"),
        (np.zeros((4, 3)), "expected a torch tensor for x"),
    ],
)
@pytest.mark.parametrize("name", ["f", "transport"])
def test_points_that_do_not_fit_are_refused(name, x, message):
    clouds = problem()
    potentials = otgen.solve_sample(*clouds, reg=0.1).to_dual_potentials()
    with pytest.raises(InputError, match=message):
        getattr(potentials, name)(x)


# The c-transform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (700, 45, 3), (31, 1000, 2), (40, 37, 130)])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_c_transform_is_the_dense_minimum(monkeypatch, dtype, n, m, d, shift):
    monkeypatch.setattr(chunked, "CPU_TILE", 64)
    x, y, psi, _ = problem(n, m, d)
    x, y, psi = (x + shift).to(dtype), (y + shift).to(dtype), torch.rand(m, generator=torch.Generator().manual_seed(1)).to(dtype)
    value, nearest = otgen.c_transform(x, y, psi)
    dense = (x.double()[:, None] - y.double()).square().sum(2) - psi.double()
    assert (value.dtype, nearest.dtype) == (dtype, torch.int64)
    tolerance = 1e-12 * (1 + d) if dtype == torch.float64 else 3e-6 * (1 + d)
    assert float((value.double() - dense.min(1).values).abs().max()) <= tolerance
    assert float((dense.gather(1, nearest[:, None])[:, 0] - value).abs().max()) <= tolerance
    if dtype == torch.float64:
        assert torch.equal(nearest, dense.argmin(1))


def test_of_equals_the_first_is_taken(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_TILE", 8)
    y = torch.tensor([[3.0], [1.0], [-1.0], [1.0], [-1.0]]).repeat(40, 1)
    value, nearest = otgen.c_transform(torch.zeros(300, 1), y, torch.zeros(200))
    assert (nearest == 1).all()
    assert (value == 1.0).all()
    x, y, _, _ = problem(50, 40, 5)
    twice = torch.cat((y, y))
    assert torch.equal(otgen.c_transform(x, twice, twice[:, 0])[1], otgen.c_transform(x, y, y[:, 0])[1])


def test_its_derivatives_are_danskins():
    x, y, _, _ = problem(20, 15, 3)
    psi = torch.rand(15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, y, psi)]
    assert torch.autograd.gradcheck(lambda *args: otgen.c_transform(*args)[0], leaves)
    value, nearest = otgen.c_transform(*leaves)
    weights = torch.arange(20, dtype=torch.float64)
    (weights * value).sum().backward()
    torch.testing.assert_close(leaves[0].grad, 2 * weights[:, None] * (x - y[nearest]))
    torch.testing.assert_close(leaves[2].grad, -torch.bincount(nearest, weights, minlength=15))
    assert not nearest.requires_grad


def test_it_is_the_limit_of_the_soft_update_and_the_semi_dual_is_bounded_by_the_cost():
    """f(x) → min_j |x − y_j|² − g_j as reg → 0, within reg·log m; the semi-dual is below every plan's cost."""
    x, y, _, _ = problem(50, 50, 2)
    result = otgen.solve_sample(x, y, reg=1e-3, tol=1e-6)
    soft, (hard, _) = result.to_dual_potentials().f(x), otgen.c_transform(x, y, result.potential_b)
    assert ((soft >= hard - 1e-12) & (soft <= hard + 1e-3 * math.log(50) + 1e-12)).all()
    semi_dual = hard.mean() + result.potential_b.mean()
    assert semi_dual <= result.value_linear + 1e-4
    assert semi_dual >= result.value_linear - 1e-3 * math.log(50) - 1e-4


def test_ascending_the_semi_dual_solves_an_assignment():
    """Points and a permuted copy of them, moved: optimal transport undoes the permutation."""
    x, _, _, _ = problem(12, 12, 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    y = x[order] + 0.3
    psi = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    for step in range(600):
        loss = -otgen.c_transform(x, y, psi)[0].mean() - psi.mean()
        (gradient,) = torch.autograd.grad(loss, psi)
        psi = (psi.detach() - 2.0 / (10 + step) * gradient).requires_grad_()
    assert float(-loss.detach()) == pytest.approx(2 * 0.3**2, abs=2e-3)


def test_numpy_and_half_precision():
    x, y, _, b = problem(30, 20, 3, dtype=torch.float32)
    value, nearest = otgen.c_transform(x.numpy(), y.numpy(), b.numpy())
    assert (type(value), value.dtype, nearest.dtype) == (np.ndarray, np.float32, np.int64)
    np.testing.assert_allclose(value, otgen.c_transform(x, y, b)[0].numpy())
    assert otgen.c_transform(x.half(), y.half(), b.half())[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[0.0]]}, "expected a torch tensor for x; got builtins.list"),
        ({"x": torch.zeros(3)}, r"expected x of shape \(points, dimensions\), not empty; got \(3,\)"),
        ({"y": torch.zeros(0, 2)}, r"expected y of shape \(points, dimensions\), not empty; got \(0, 2\)"),
        ({"y": torch.zeros(4, 3)}, r"expected clouds of one dimension; got x \(3, 2\) and y \(4, 3\)"),
        ({"psi": torch.zeros(3)}, r"expected psi of shape \(4,\), one for each point of y; got \(3,\)"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, r"expected floating-point points in x; got int64; type x\.float"),
        ({"y": torch.zeros(4, 2, dtype=torch.float64)}, "expected y in x's dtype float32; got float64"),
        ({"psi": torch.zeros(4, dtype=torch.float64)}, "expected psi in x's dtype float32; got float64"),
        ({"x": torch.full((3, 2), math.nan)}, "expected finite values in x"),
        ({"psi": torch.full((4,), -math.inf)}, "expected finite values in psi"),
        ({"y": torch.full((4, 2), 1e30)}, "expected points whose squared norms are finite"),
    ],
)
def test_what_has_no_c_transform_is_refused(change, message):
    given = {"x": torch.zeros(3, 2), "y": torch.zeros(4, 2), "psi": torch.zeros(4)}
    with pytest.raises(InputError, match=message):
        otgen.c_transform(**{**given, **change})


# The rendered kernels, interpreted


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_kernels_serve_potentials_draws_and_maps_alike(monkeypatch):
    x, y, a, b = problem(21, 34, 3, dtype=torch.float32)
    new = elsewhere(9, dtype=torch.float32)

    def answers():
        result = otgen.solve_sample(x, y, a, b, reg=0.2)
        potentials, leaf = result.to_dual_potentials(), new.clone().requires_grad_()
        potentials.f(leaf).sum().backward()
        drawn = result.sample(50, torch.Generator().manual_seed(0))
        return (
            result.variant,
            [potentials.f(new), potentials.g(new), potentials.transport(new), leaf.grad, result.top_k(2)[0]],
            drawn,
        )

    _, expected, _ = answers()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    variant, interpreted, (i, j) = answers()
    assert variant is not None
    assert len(i) == len(j) == 50
    for answer, value in zip(interpreted, expected):
        torch.testing.assert_close(answer, value, rtol=2e-3, atol=2e-4)
