"""Kept exponentials: the same answers as streamed sweeps, from far away too, and no memory held afterwards."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from clouds import problem

import otgen
from otgen.solvers import engine, kept
from otgen.solvers.inputs import centre, read
from otgen.solvers.kept import KeptSteps, keepable
from otgen.solvers.steps import Steps

pytestmark = pytest.mark.usefixtures("streamed")


def steps(dtype=torch.float64, rho=math.inf, reg=0.05, **shape) -> Steps:
    return Steps(centre(read(*problem(dtype=dtype, **shape))), reg, ("ieee",), rho, rho)


@pytest.mark.parametrize("rho", [math.inf, 0.5])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_half_steps_agree_with_streamed_ones(dtype, rtol, rho):
    plain = steps(dtype, rho)
    keeping = KeptSteps.of(plain)
    u, v = plain.scaled(torch.zeros_like(plain.clouds.a), torch.zeros_like(plain.clouds.b))
    u, _ = keeping.rows(u, v)
    for _ in range(5):
        for mine, reference in ((keeping.columns(u, v), plain.columns(u, v)), (keeping.rows(u, v), plain.rows(u, v))):
            for one, other in zip(mine, reference):
                torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
        v, _ = plain.columns(u, v)
        u, _ = plain.rows(u, v)


def test_a_pair_far_away_is_answered_by_taking_the_matrix_anew(monkeypatch):
    """Potentials a thousand powers of two off, and sums that no float holds: the redo of the streamed sweep answers those."""
    plain = steps(reg=0.002)
    keeping = KeptSteps.of(plain)
    u, v = plain.scaled(torch.zeros_like(plain.clouds.a), torch.zeros_like(plain.clouds.b))
    u, _ = keeping.rows(u, v)
    v, _ = keeping.columns(u, v)
    for shift in (0.0, kept.REACH + 1.0, 1000.0, -3000.0):
        moved = v + shift
        for one, other in zip(keeping.rows(u, moved), plain.rows(u, moved)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["alternating", "anderson"])
@pytest.mark.parametrize("reg", [0.2, 0.002])
def test_a_solve_ends_where_it_would_without(monkeypatch, method, reg):
    x, y, a, b = problem(n=120, m=90)
    mine = otgen.solve_sample(x, y, a, b, reg=reg, method=method, tol=1e-8, max_iter=20000)
    monkeypatch.setattr(engine, "keepable", lambda steps: False)
    other = otgen.solve_sample(x, y, a, b, reg=reg, method=method, tol=1e-8, max_iter=20000)
    assert mine.converged
    assert abs(mine.passes - other.passes) <= 0.1 * other.passes + 2
    torch.testing.assert_close(mine.value, other.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine.plan, other.plan, rtol=0, atol=1e-9)


def test_what_is_not_kept(monkeypatch):
    assert keepable(steps())
    assert not keepable(steps(n=5000, m=5000)), "200 MB"
    x, y, a, b = problem()
    a[0] = 0.0
    b *= a.sum() / b.sum()
    assert not keepable(Steps(centre(read(x, y, a, b)), 0.1, ("ieee",))), "nothing bounds exponentials of weightless points"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not keepable(steps(torch.float32)), "kernels are asked for"


def test_a_result_does_not_hold_the_matrix():
    x, y, _, _ = problem(n=700, m=900)
    result = otgen.solve_sample(x, y, reg=0.1)
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (700, 900)]
    assert not held
    assert result.converged
