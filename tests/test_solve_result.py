"""What a solve hands back: why it stopped, what it chose, the plan and its repr; from interpreted kernels too."""

from __future__ import annotations

import warnings

import pytest
import torch
from clouds import METHODS, problem

import otgen
from otgen import chunked, dispatch, ops
from otgen.errors import ConvergenceWarning, InputError
from otgen.problem import Variant
from otgen.solvers import engine, operator
from otgen.solvers.sinkhorn import PATIENCE

pytestmark = pytest.mark.usefixtures("streamed")


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
    monkeypatch.setattr(engine, "keepable", lambda steps: False)
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


# The plan and the repr


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
    monkeypatch.setattr(operator, "PLAN_LIMIT", 1000)
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


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("options", [{}, {"debias": True}, {"unbalanced": 0.5}], ids=str)
def test_gradients_in_both_clouds_share_the_sweep_of_their_pair(options, batch, sweeps):
    x, y, a, b = (tensor if batch is None else torch.stack((tensor, tensor)) for tensor in problem())
    solve = otgen.solve_sample if batch is None else otgen.solve_sample_batch
    both = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = solve(*both, a, b, reg=0.05, tol=1e-8, **options).value.sum()
    sweeps.clear()
    found = torch.autograd.grad(value, both)
    assert sweeps == {"apply_plan_both": 1, **({"plan_gradient": 2} if "debias" in options else {})}
    for side, leaf in enumerate((x, y)):
        alone = leaf.clone().requires_grad_()
        clouds = (alone, y) if side == 0 else (x, alone)
        (expected,) = torch.autograd.grad(solve(*clouds, a, b, reg=0.05, tol=1e-8, **options).value.sum(), alone)
        torch.testing.assert_close(found[side], expected, rtol=1e-10, atol=1e-13)
