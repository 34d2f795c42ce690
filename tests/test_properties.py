"""The theorems of entropic transport as properties of random problems, in streamed PyTorch and through interpreted kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import triton  # noqa: F401  imported while its interpreter is on: see conftest.py
from clouds import cost, primal
from hypothesis import given, settings
from hypothesis import strategies as st

import otgen
from otgen.errors import ConvergenceWarning
from otgen.solvers.result import OTResult

pytestmark = pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")

BACKENDS = {"float64": (torch.float64, 25), "float32": (torch.float32, 25), "kernels": (torch.float32, 4)}
"""Name → dtype, and how many problems are drawn: interpreted kernels take a second each."""

TOL = {torch.float64: 1e-9, torch.float32: 1e-4}

PROBLEMS = st.fixed_dictionaries(
    {
        "n": st.integers(1, 20),
        "m": st.integers(1, 20),
        "d": st.integers(1, 5),
        "seed": st.integers(0, 10**6),
        "reg": st.floats(0.05, 5.0),
        "zeros": st.booleans(),
    }
)


@contextmanager
def computed_by(backend: str) -> Iterator[torch.dtype]:
    before = os.environ.pop("TRITON_INTERPRET", None)
    if backend == "kernels":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield BACKENDS[backend][0]
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def for_each_backend(check):
    """The property `check(dtype, problem)` for every backend, on as many problems as it is quick enough for."""

    @pytest.mark.parametrize("backend", BACKENDS)
    def test(backend):
        @settings(max_examples=BACKENDS[backend][1], deadline=None, derandomize=True, database=None)
        @given(PROBLEMS)
        def holds(problem):
            with computed_by(backend) as dtype:
                check(dtype, **problem)

        holds()

    test.__doc__ = check.__doc__
    return test


def measures(dtype, n, m, d, seed, zeros):
    """Two clouds 0.3 apart, with weights of mass one, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x, y, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (m, d), (n,), (m,)))
    for weights in (a, b):
        weights += 0.1
        if zeros and len(weights) > 1:
            weights[:: max(2, len(weights) // 3)] = 0.0
            weights[-1] = 0.5
    a, b = (weights.to(dtype) / weights.to(dtype).sum() for weights in (a, b))
    return x.to(dtype), (y + 0.3).to(dtype), a, b


def solve(x, y, a, b, reg, **options) -> OTResult:
    return otgen.solve_sample(x, y, a, b, reg=reg, **{"tol": TOL[x.dtype], **options})


@for_each_backend
def test_the_plan_has_the_marginals(dtype, n, m, d, seed, reg, zeros):
    """P ≥ 0, P·1 = a, Pᵀ·1 = b, to the error reported; exact zeros where there is no weight."""
    x, y, a, b = measures(dtype, n, m, d, seed, zeros)
    result = solve(x, y, a, b, reg)
    plan = result.plan.double()
    error = (plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()
    assert result.converged
    assert float(error) <= 1.5 * TOL[dtype] + 20 * torch.finfo(dtype).eps
    assert (plan >= 0).all()
    assert not plan[a == 0].any()
    assert not plan[:, b == 0].any()


@for_each_backend
def test_a_shift_of_the_potentials_is_no_change(dtype, n, m, d, seed, reg, zeros):
    """(f + t, g − t) is a solution too."""
    x, y, a, b = measures(dtype, n, m, d, seed, zeros)
    result = solve(x, y, a, b, reg)
    f, g = result.potentials
    again = solve(x, y, a, b, reg, potentials_init=(f + 1.5, g - 1.5), tol=3 * TOL[dtype])
    assert again.n_iters == 1
    torch.testing.assert_close(again.plan, result.plan, rtol=0, atol=10 * TOL[dtype])


@for_each_backend
def test_a_common_translation_and_an_order_of_the_points_change_nothing(dtype, n, m, d, seed, reg, zeros):
    x, y, a, b = measures(dtype, n, m, d, seed, zeros)
    result = solve(x, y, a, b, reg)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = solve(x[order] + 2.0, y + 2.0, a[order], b, reg)
    near = 20 * TOL[dtype]
    torch.testing.assert_close(other.value, result.value, rtol=near, atol=near * reg)
    torch.testing.assert_close(other.plan, result.plan[order], rtol=0, atol=near)


@for_each_backend
def test_the_dual_never_decreases_and_stays_below_the_primal(dtype, n, m, d, seed, reg, zeros):
    """Under alternating updates, whose plans are made feasible by moving what is missing."""
    x, y, a, b = measures(dtype, n, m, d, seed, zeros)
    values = []
    for max_iter in (1, 2, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = solve(x, y, a, b, reg, method="alternating", max_iter=max_iter, tol=0)
        values.append(float(result.value))
    slack = 20 * torch.finfo(dtype).eps * (1.0 + reg + abs(values[0]))
    assert all(later >= earlier - slack for earlier, later in pairwise(values))
    plan, a, b, x, y = (tensor.double() for tensor in (result.plan, a, b, x, y))
    feasible = plan * torch.where(a > 0, a / plan.sum(1), 0.0).clamp(max=1.0)[:, None]
    feasible = feasible * torch.where(b > 0, b / feasible.sum(0), 0.0).clamp(max=1.0)
    rows, columns = a - feasible.sum(1), b - feasible.sum(0)
    if float(rows.sum()) > 0:
        feasible = feasible + rows[:, None] * columns / rows.sum()
    used = (a > 0).nonzero().squeeze(1), (b > 0).nonzero().squeeze(1)
    feasible, costs = feasible[used[0]][:, used[1]], cost(x, y)[used[0]][:, used[1]]
    assert values[-1] <= float(primal(feasible, a[used[0]], b[used[1]], costs, reg)) + slack


@for_each_backend
def test_a_large_reg_gives_the_product(dtype, n, m, d, seed, reg, zeros):
    """Up to C/reg; that float32 loses the value at such a reg, and says so, is another matter."""
    x, y, a, b = measures(dtype, n, m, d, seed, zeros)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = solve(x, y, a, b, 1e3 * (1.0 + reg) if dtype == torch.float32 else 1e7)
    torch.testing.assert_close(result.plan, a[:, None] * b, rtol=0.02 if dtype == torch.float32 else 1e-5, atol=1e-9)


@for_each_backend
def test_the_divergence_of_equal_measures_is_zero_and_of_others_positive(dtype, n, m, d, seed, reg, zeros):
    x, y, a, b = measures(dtype, n, m, d, seed, zeros)
    near = 5e-5 * (1.0 + reg) if dtype == torch.float32 else 1e-9
    assert abs(float(solve(x, x.clone(), a, a.clone(), reg, debias=True).value)) <= near
    assert float(solve(x, y + 1.0, a, b, reg, debias=True).value) > near
