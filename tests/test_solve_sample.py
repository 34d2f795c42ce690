"""The solver: theorems, closed forms, other libraries, and finite differences."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import ot as pot
import pytest
import torch
from geomloss import SamplesLoss
from geomloss import ot as geomloss_ot

import otgen
from otgen import chunked, dispatch, ops
from otgen.errors import InputError, UsageError
from otgen.problem import Variant
from otgen.solvers import result as result_module
from otgen.solvers.result import ConvergenceWarning
from otgen.solvers.sinkhorn import PATIENCE

METHODS = ["alternating", "symmetric"]


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    """The PyTorch path, on one thread: tests may run side by side."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(n=60, m=45, d=3, seed=0, dtype=torch.float64):
    """Two overlapping clouds with random weights of mass one."""
    generator = torch.Generator().manual_seed(seed)
    x, y, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (m, d), (n,), (m,)))
    return x.to(dtype), (y + 0.2).to(dtype), (a / a.sum()).to(dtype), (b / b.sum()).to(dtype)


def cost(x, y):
    return torch.cdist(x, y).square()


def primal(plan, a, b, c, reg):
    product = a[:, None] * b
    entropy = torch.where(plan > 0, plan * (plan / product).log(), 0.0).sum() - plan.sum() + product.sum()
    return (plan * c).sum() + reg * entropy


def rounded_to(plan, a, b):
    """A plan with exactly the marginals (a, b) near `plan` (Altschuler, Weed and Rigollet 2017)."""
    plan = plan * (a / plan.sum(1)).clamp(max=1.0)[:, None]
    plan = plan * (b / plan.sum(0)).clamp(max=1.0)
    rows, columns = a - plan.sum(1), b - plan.sum(0)
    return plan + rows[:, None] * columns / rows.sum()


# What must always hold


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals_fit_and_the_error_reported_is_that_of_the_plan(method, dtype):
    x, y, a, b = problem(dtype=dtype)
    result = otgen.solve_sample(x, y, a, b, reg=0.05, method=method, tol=1e-5)
    plan = result.plan.double()
    error = (plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()
    assert result.stop == "tol"
    assert result.marginal_error <= 1e-5
    assert float(error) == pytest.approx(result.marginal_error, abs=2e-6 if dtype == torch.float32 else 1e-14)
    assert (plan >= 0).all()
    torch.testing.assert_close(result.marginal_a.double(), plan.sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.marginal_b.double(), plan.sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_potentials_give_the_plan_in_the_stated_convention_and_may_be_shifted(method):
    x, y, a, b = problem()
    result = otgen.solve_sample(x, y, a, b, reg=0.1, method=method, tol=1e-10)
    (f, g), c = result.potentials, cost(x, y)
    for t in (0.0, 0.7):
        plan = a[:, None] * b * ((f[:, None] + t + g - t - c) / 0.1).exp()
        torch.testing.assert_close(plan, result.plan, rtol=1e-9, atol=1e-18)
    again = otgen.solve_sample(x, y, a, b, reg=0.1, method=method, tol=1e-9, potentials_init=(f + 0.7, g - 0.7))
    assert again.n_iters <= 1
    torch.testing.assert_close(again.plan, result.plan, rtol=1e-7, atol=1e-16)


def test_a_translation_changes_nothing_and_a_permutation_permutes():
    x, y, a, b = problem()
    result = otgen.solve_sample(x, y, a, b, reg=0.1, tol=1e-9)
    moved = otgen.solve_sample(x + 5.0, y + 5.0, a, b, reg=0.1, tol=1e-9)
    torch.testing.assert_close(moved.potential_a, result.potential_a)
    torch.testing.assert_close(moved.a_to_b, result.a_to_b + 5.0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    permuted = otgen.solve_sample(x[order], y, a[order], b, reg=0.1, tol=1e-9)
    torch.testing.assert_close(permuted.potential_a, result.potential_a[order])
    torch.testing.assert_close(permuted.value, result.value)


def test_the_two_sides_may_be_exchanged():
    x, y, a, b = problem()
    forth = otgen.solve_sample(x, y, a, b, reg=0.1, tol=1e-11)
    back = otgen.solve_sample(y, x, b, a, reg=0.1, tol=1e-11)
    torch.testing.assert_close(back.plan.T, forth.plan)
    torch.testing.assert_close(back.a_to_b, forth.b_to_a)


def test_the_dual_is_below_the_primal_and_never_decreases():
    x, y, a, b = problem()
    exact = otgen.solve_sample(x, y, a, b, reg=0.05, tol=1e-12).value
    values = []
    for max_iter in range(1, 12):
        with pytest.warns(ConvergenceWarning):
            result = otgen.solve_sample(x, y, a, b, reg=0.05, tol=1e-13, max_iter=max_iter)
        values.append(float(result.value))
        feasible = rounded_to(result.plan, a, b)
        assert result.value <= exact + 1e-14 <= primal(feasible, a, b, cost(x, y), 0.05) + 2e-14
    assert all(later >= earlier - 1e-15 for earlier, later in pairwise(values))


def test_value_is_linear_cost_plus_entropy():
    x, y, a, b = problem()
    result = otgen.solve_sample(x, y, a, b, reg=0.1, tol=1e-12)
    torch.testing.assert_close(result.value, primal(result.plan, a, b, cost(x, y), 0.1))
    torch.testing.assert_close(result.value_linear, (result.plan * cost(x, y)).sum())


def test_a_large_reg_gives_the_product_and_a_small_one_the_permutation():
    x, y, a, b = problem()
    loose = otgen.solve_sample(x, y, a, b, reg=1e6, tol=1e-9)
    torch.testing.assert_close(loose.plan, a[:, None] * b, rtol=1e-5, atol=0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    tight = otgen.solve_sample(x, x[order], reg=1e-4, tol=1e-6)
    assert torch.equal(tight.plan.argmax(0), order)
    torch.testing.assert_close(tight.b_to_a, x[order], rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_cloud_against_itself_has_a_symmetric_plan(method):
    x, _, a, _ = problem()
    result = otgen.solve_sample(x, x, a, a, reg=0.1, tol=1e-11, method=method)
    torch.testing.assert_close(result.plan, result.plan.T, rtol=1e-6, atol=1e-13)
    f, g = result.potentials
    torch.testing.assert_close(f - f.mean(), g - g.mean(), rtol=1e-6, atol=1e-9)


def test_the_sinkhorn_divergence_is_zero_on_equals_and_positive_otherwise():
    x, y, a, b = problem()

    def divergence(x, a, y, b):
        solve = lambda p, w, q, z: float(otgen.solve_sample(p, q, w, z, reg=0.1, tol=1e-11).value)  # noqa: E731
        return solve(x, a, y, b) - 0.5 * solve(x, a, x, a) - 0.5 * solve(y, b, y, b)

    assert divergence(x, a, x.clone(), a) == pytest.approx(0.0, abs=1e-12)
    assert divergence(x, a, y, b) > 0.01


def test_gaussians_reach_their_closed_form():
    """Entropic OT of N(0, 1) and N(μ, s²) on a fine grid; Janati, Muzellec, Peyré and Cuturi 2020, with cost |x − y|²."""
    s, mu, reg = 0.6, 1.5, 0.5
    grid = torch.linspace(-7.0, 8.0, 900, dtype=torch.float64)
    a, b = torch.softmax(-(grid**2) / 2, 0), torch.softmax(-(((grid - mu) / s) ** 2) / 2, 0)
    result = otgen.solve_sample(grid[:, None], grid[:, None], a, b, reg=reg, tol=1e-9)
    half = reg / 2  # their σ², for the cost ½·|x − y|²… doubled: plan ∝ exp(−|x − y|²/(2·half))
    spread = math.sqrt(4 * s**2 + half**2)
    covariance = (spread - half) / 2
    linear = mu**2 + 1 + s**2 - 2 * covariance
    mutual = -0.5 * math.log(1 - (covariance / s) ** 2)
    assert float(result.value_linear) == pytest.approx(linear, abs=1e-6)
    assert float(result.value) == pytest.approx(linear + reg * mutual, abs=1e-6)
    centre = slice(300, 500)
    expected = mu + covariance * grid[centre]
    torch.testing.assert_close(result.a_to_b[centre, 0], expected, rtol=0, atol=1e-5)


# The same plan, five spellings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_pot(method, dtype):
    x, y, a, b = problem()
    reg = 0.1
    mine = otgen.solve_sample(x.to(dtype), y.to(dtype), a.to(dtype), b.to(dtype), reg=reg, tol=1e-6, method=method)
    theirs = pot.solve_sample(x, y, a, b, reg=reg, reg_type="KL", max_iter=10000, tol=1e-12)
    plan = pot.sinkhorn(a, b, pot.dist(x, y), reg, method="sinkhorn_log", stopThr=1e-12, numItermax=10000)
    scale = float(plan.max())
    assert float((mine.plan - theirs.plan).abs().max()) <= 1e-5 * scale
    assert float((mine.plan - plan).abs().max()) <= 1e-5 * scale
    assert float(mine.value) == pytest.approx(float(theirs.value), rel=1e-5)
    assert float(mine.value_linear) == pytest.approx(float(theirs.value_linear), rel=1e-5)


def test_parity_with_geomloss():
    """GeomLoss has no tolerance, and its annealing lags behind by 1/iterations: a blur at which that is below the bound."""
    x, y, a, b = problem()
    blur = 0.7
    mine = otgen.solve_sample(x, y, a, b, reg=2 * blur**2, tol=1e-10)
    theirs = geomloss_ot.solve_sample(x, y, a, b, reg=2 * blur**2, max_iter=2000)
    assert float((mine.plan - theirs.plan).abs().max()) <= 1e-5 * float(mine.plan.max())
    assert float(mine.value) == pytest.approx(float(theirs.value), rel=1e-5)
    shift = mine.potential_a - theirs.potential_a
    assert float(shift.max() - shift.min()) <= 1e-5
    legacy = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.98, debias=False, backend="tensorized")
    assert float(mine.value) == pytest.approx(2 * float(legacy(a, x, b, y)), rel=1e-5)


# First order


@pytest.mark.parametrize("method", METHODS)
def test_gradients_agree_with_finite_differences(method):
    x, y, a, b = (tensor.requires_grad_() for tensor in problem(12, 9, 2))
    solve = lambda *args: otgen.solve_sample(*args, reg=0.1, tol=1e-13, max_iter=20000, method=method)  # noqa: E731
    solve(x, y, a, b).value.backward()
    generator = torch.Generator().manual_seed(3)
    inputs = [x, y, a, b]
    for index, tensor in enumerate(inputs):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.ndim == 1:
            direction = 0.01 * (direction - direction.mean())
        h = 1e-4
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                moved = [t + sign * h * direction if t is tensor else t for t in inputs]
                values.append(float(solve(*moved).value))
        expected = (values[0] - values[1]) / (2 * h)
        assert float((tensor.grad * direction).sum()) == pytest.approx(expected, abs=1e-6), "xyab"[index]


def test_the_gradient_formulas_and_the_grad_mode():
    x, y, a, b = problem()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, y, a, b)]
    result = otgen.solve_sample(*leaves, reg=0.1, tol=1e-10)
    (3.0 * result.value).backward()
    plan = result.plan
    torch.testing.assert_close(leaves[0].grad, 6.0 * (plan.sum(1)[:, None] * x - plan @ y))
    torch.testing.assert_close(leaves[1].grad, 6.0 * (plan.sum(0)[:, None] * y - plan.T @ x))
    torch.testing.assert_close(leaves[2].grad, 3.0 * result.potential_a)
    torch.testing.assert_close(leaves[3].grad, 3.0 * result.potential_b)
    assert torch.is_grad_enabled()
    assert not result.potential_a.requires_grad
    with torch.no_grad():
        assert not otgen.solve_sample(*leaves, reg=0.1).value.requires_grad
        assert not torch.is_grad_enabled()


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, y, _, _ = problem(8, 8, 2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(otgen.solve_sample(x, y, reg=0.1).value, x, create_graph=True)
    with pytest.raises(UsageError, match="one derivative"):
        (gradient.sum() + x.square().sum()).backward()


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


# Stopping, and what is said of it


@pytest.mark.parametrize("method", METHODS)
def test_a_missed_tolerance_warns_once_and_says_what_was_reached(method):
    x, y, a, b = problem()
    with pytest.warns(ConvergenceWarning, match="after 3 iterations, above tol=1e-12; raise max_iter") as caught:
        result = otgen.solve_sample(x, y, a, b, reg=0.01, tol=1e-12, max_iter=3, method=method)
    assert len(caught) == 1
    assert (result.stop, result.converged) == ("max_iter", False)
    assert caught[0].filename == __file__


def test_rounding_that_keeps_the_error_up_is_told_from_slow_convergence():
    x, y, a, b = problem(dtype=torch.float32)
    with pytest.warns(ConvergenceWarning, match="fp32 rounding"):
        result = otgen.solve_sample(x, y, a, b, reg=0.05, tol=0, max_iter=100000)
    assert result.stop == "precision floor"
    assert result.marginal_error < 1e-5
    assert result.n_iters > PATIENCE


def test_a_reg_beyond_float32_is_said_to_be_nan():
    x, y, _, _ = problem(dtype=torch.float32)
    with pytest.warns(ConvergenceWarning, match="too small for fp32"):
        assert otgen.solve_sample(x, y, reg=1e-38).stop == "nan"


def test_passes_count_sweeps(monkeypatch):
    x, y, a, b = problem()
    calls = []
    for name in ("half_step", "symmetric_step"):
        flags = ops.ALTERNATING if name == "half_step" else ops.SYMMETRIC
        launch = getattr(chunked, name)
        monkeypatch.setitem(ops.STREAMED, flags, ops.Streamed(lambda launch=launch, **kw: (calls.append(1), launch(**kw))[1]))
    for method in METHODS:
        calls.clear()
        result = otgen.solve_sample(x, y, a, b, reg=0.05, method=method)
        assert result.passes == len(calls)


def test_the_result_reports_what_dispatch_chose(monkeypatch):
    """With a stand-in for the dispatcher: the seam hands variant, cache tier and precision to the result."""
    variant = Variant(precision="tf32x3", fusion="two_launches")

    def kernel(family, gpu, n, m, d, dtype, flags, modes):
        assert "tf32x3" in modes
        return dispatch.Kernel(dispatch.Choice(variant, "predicted"), ops.STREAMED[flags].launch)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "kernel", kernel)
    x, y, a, b = problem(dtype=torch.float32)
    result = otgen.solve_sample(x, y, a, b, reg=0.1, method="symmetric")
    assert (result.precision, result.variant, result.cache) == ("tf32x3", variant, "predicted")
    assert result.passes == 2 * (result.n_iters + 2)
    result = otgen.solve_sample(x, y, a, b, reg=0.1, precision="tf32x3")
    assert result.precision == "tf32x3"


# Kinds of input and output


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


def test_apply_multiplies_by_the_plan_in_both_directions():
    x, y, a, b = problem()
    result = otgen.solve_sample(x, y, a, b, reg=0.1)
    generator = torch.Generator().manual_seed(4)
    for tail in ((), (1,), (7,)):
        v = torch.randn(len(y), *tail, generator=generator, dtype=torch.float64)
        u = torch.randn(len(x), *tail, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(result.apply(v, axis=1), result.plan @ v)
        torch.testing.assert_close(result.apply(u), result.plan.T @ u)
    torch.testing.assert_close(result.a_to_b, result.plan @ y / result.plan.sum(1, keepdim=True))
    torch.testing.assert_close(result.b_to_a, result.plan.T @ x / result.plan.sum(0)[:, None])


def test_the_dense_plan_is_refused_above_a_size(monkeypatch):
    x, y, _, _ = problem()
    result = otgen.solve_sample(x, y, reg=0.1)
    monkeypatch.setattr(result_module, "PLAN_LIMIT", 1000)
    with pytest.raises(InputError, match=r"60 × 45 entries take 21,600; type result\.apply"):
        _ = result.plan


def test_the_repr_is_one_line_and_silent():
    x, y, _, _ = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = repr(otgen.solve_sample(x.requires_grad_(), y, reg=0.1))
    assert "\n" not in text
    assert text.startswith("OTResult(value=")
    assert "60×45 points in 3-D, reg=0.1, fp64, stopped by tol after" in text


# The rendered kernels, interpreted


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
@pytest.mark.parametrize("method", METHODS)
def test_interpreted_kernels_solve_the_same_problem(monkeypatch, method):
    """From dispatch through render and launch, both halves of a result and its gradients."""
    x, y, a, b = problem(21, 34, 3, dtype=torch.float32)
    a[2] = 0.0
    a[0] += 1.0 - a.sum()

    def solve():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, a, b)]
        result = otgen.solve_sample(*leaves, reg=0.2, tol=1e-3, method=method)
        result.value.backward()
        answers = [result.value.detach(), *result.potentials, *result.marginals, result.a_to_b, result.b_to_a, result.value_linear]
        return result, [*answers, result.apply(b, axis=1), result.apply(a), *(leaf.grad for leaf in leaves)]

    expected, streamed_answers = solve()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result, answers = solve()
    assert expected.variant is None
    assert result.variant is not None
    assert result.precision == result.variant["precision"].replace("ieee", "fp32")
    assert result.cache in {"exact", "nearest", "ported", "predicted", "default"}
    assert (result.stop, result.n_iters) == ("tol", expected.n_iters)
    for answer, value in zip(answers, streamed_answers):
        torch.testing.assert_close(answer, value, rtol=1e-3, atol=1e-4)
