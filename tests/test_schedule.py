"""GeomLoss's schedule: its list of regularisations, its loop against a dense one, and what is said of where it ends."""

from __future__ import annotations

import math

import pytest
import torch
from clouds import cost, problem
from geomloss._legacy.sinkhorn_divergence import epsilon_schedule, max_diameter

from otgen.solvers import schedule
from otgen.solvers.inputs import centre, read
from otgen.solvers.schedule import Schedule
from otgen.solvers.solution import Divergence
from otgen.solvers.steps import Steps

pytestmark = pytest.mark.usefixtures("streamed")

INF = math.inf


def steps_of(x, y, a, b, rho_a=INF, rho_b=INF):
    balanced = rho_a == rho_b == INF
    return Steps(centre(read(x, y, a, b), balanced=balanced), 1.0, ("ieee",), rho_a, rho_b)


def dense(x, y, a, b, eps_list, rho_a, rho_b, *, last=True):
    """The loop on the cost matrix, cost |x − y|²; the pair at the end and the one before."""
    c = cost(x, y)

    def updated(f, g, eps):
        damp_a, damp_b = 1 / (1 + eps / rho_a), 1 / (1 + eps / rho_b)
        return (
            -damp_a * eps * torch.logsumexp(b.log() + (g - c) / eps, 1),
            -damp_b * eps * torch.logsumexp(a.log()[:, None] + (f[:, None] - c) / eps, 0),
        )

    def moved(f, g):
        if (rho_a == INF) == (rho_b == INF):
            return f, g
        if rho_a == INF:
            t = rho_b * (a.sum() / (b * (-g / rho_b).exp()).sum()).log()
        else:
            t = -rho_a * (b.sum() / (a * (-f / rho_a).exp()).sum()).log()
        return f + t, g - t

    f, g = moved(*updated(torch.zeros_like(a), torch.zeros_like(b), eps_list[0]))
    for eps in eps_list:
        new_f, new_g = updated(f, g, eps)
        f, g = moved((f + new_f) / 2, (g + new_g) / 2)
    return moved(*updated(f, g, eps_list[-1])) if last else (f, g)


@pytest.mark.parametrize(
    ("first", "last", "ratio"), [(1.7, 0.05, 0.5), (2.0, 0.25, 0.5), (0.9, 0.3, 0.9), (0.1, 0.3, 0.5), (8.0, 8.0, 0.7)]
)
def test_the_list_is_geomlosss(first, last, ratio):
    assert schedule.geometric(first, last, ratio) == pytest.approx(epsilon_schedule(2, first, last, ratio), rel=1e-13)


def test_clouds_that_are_one_point_need_one_regularisation():
    assert schedule.geometric(0.0, 0.5, 0.5) == (0.25,)


def test_the_diameter_is_that_of_the_box_around_all_clouds_of_a_batch():
    x, y = torch.rand(3, 20, 4), 2.0 * torch.rand(3, 30, 4)
    assert schedule.diameter(x, y) == max_diameter(x.view(-1, 4), y.view(-1, 4))
    assert schedule.diameter(x[0], y[0]) == max_diameter(x[0], y[0])


@pytest.mark.parametrize(("rho_a", "rho_b"), [(INF, INF), (0.5, 0.5), (0.2, 3.0), (0.5, INF), (INF, 0.5)])
@pytest.mark.parametrize("last", [True, False])
def test_the_loop_is_that_of_the_formulas(rho_a, rho_b, last):
    x, y, a, b = problem()
    if rho_a != INF or rho_b != INF:
        b = 1.4 * b
    eps_list = (2.0, 2.0, 0.5, 0.1, 0.02)
    end = schedule.run(steps_of(x, y, a, b, rho_a, rho_b), Schedule(eps_list, last))
    f, g = dense(x, y, a, b, eps_list, rho_a, rho_b, last=last)
    torch.testing.assert_close(end.f, f)
    torch.testing.assert_close(end.swapped.f, g)
    assert (end.n_iters, end.passes) == (5, 7 * end.steps.sweeps)
    assert end.steps.eps == 0.02


@pytest.mark.parametrize("rho", [INF, 0.5])
def test_one_potential_does_for_a_measure_and_itself(rho):
    x, _, a, _ = problem()
    own = steps_of(x, x, a, a, rho, rho)
    one = schedule.run(own, Schedule((1.0, 0.3, 0.1)), own=True)
    two = schedule.run(own, Schedule((1.0, 0.3, 0.1)))
    torch.testing.assert_close(one.f, two.f)
    assert one.v is one.u
    assert one.passes == 5
    assert one.outcome().error == pytest.approx(two.outcome().error)


@pytest.mark.parametrize("rho", [INF, 0.5])
def test_the_outcome_is_that_of_the_plan(rho):
    x, y, a, b = problem()
    end = schedule.run(steps_of(x, y, a, b, rho, rho), Schedule((1.0, 0.1)))
    outcome, (f, g) = end.outcome(), dense(x, y, a, b, (1.0, 0.1), rho, rho)
    plan = a[:, None] * b * ((f[:, None] + g - cost(x, y)) / 0.1).exp()
    torch.testing.assert_close(outcome.r, plan.sum(1))
    torch.testing.assert_close(outcome.c, plan.sum(0))
    missed = (plan.sum(1) - a * (-f / rho).exp()).abs().sum() + (plan.sum(0) - b * (-g / rho).exp()).abs().sum()
    assert outcome.error == pytest.approx(float(missed))
    assert outcome.stop == "max_iter"


@pytest.mark.parametrize(("rho_a", "rho_b"), [(INF, INF), (0.5, 0.5), (0.2, 3.0), (0.5, INF)])
@pytest.mark.parametrize("last", [True, False])
def test_the_gradient_rows_have_the_marginals_that_the_potentials_promise(rho_a, rho_b, last):
    """2·r∘(x − T(x)) with r of the value's potential and T from the pair before the last update, written out."""
    x, y, a, b = problem()
    end = schedule.run(steps_of(x, y, a, b, rho_a, rho_b), Schedule((1.0, 0.1), last))
    f_old, g_old = dense(x, y, a, b, (1.0, 0.1), rho_a, rho_b, last=False)
    f, g = dense(x, y, a, b, (1.0, 0.1), rho_a, rho_b, last=last)
    rows = torch.softmax(b.log() + (g_old - cost(x, y)) / 0.1, 1)
    columns = torch.softmax(a.log() + (f_old - cost(y, x)) / 0.1, 1)
    torch.testing.assert_close(end.gradient(), 2.0 * (a * (-f / rho_a).exp())[:, None] * (x - rows @ y))
    torch.testing.assert_close(end.swapped.gradient(), 2.0 * (b * (-g / rho_b).exp())[:, None] * (y - columns @ x))


@pytest.mark.parametrize(("rho_a", "rho_b"), [(INF, INF), (0.5, 0.5), (0.2, 3.0), (0.5, INF), (INF, 0.5)])
def test_the_value_is_the_dual_objective_at_a_solution(rho_a, rho_b):
    x, y, a, b = problem(20, 15)
    mass = 1.0 if rho_a == rho_b == INF else 1.7
    steps = steps_of(x, y, a, mass * b, rho_a, rho_b)
    for debias in (False, True):
        found = schedule.solve(steps, Schedule((0.5,) * 400), debias=debias)
        constant = 0.0 if debias else 0.5 * ((1 + mass) / 2 - mass)
        assert all(outcome.error < 1e-12 for outcome in (end.outcome() for end in found.ends))
        assert float(found.dual()) == pytest.approx(float(found.divergence.dual()) + constant, rel=1e-10)
        assert isinstance(found.divergence, Divergence)
        torch.testing.assert_close(found.gradient(), found.divergence.gradient())
        torch.testing.assert_close(found.gradient(transposed=True), found.divergence.gradient(transposed=True))


def test_a_threshold_ends_the_schedule_at_its_last_regularisation():
    steps = steps_of(*problem())
    full = schedule.run(steps, Schedule((1.0, *(0.3,) * 200), threshold=1e-4, interval=5))
    assert full.met
    assert full.n_iters < 200
    assert full.n_iters % 5 == 0
    before, after = (schedule.run(steps, Schedule((1.0, *(0.3,) * (n - 1)), False)).f for n in (full.n_iters - 5, full.n_iters))
    assert float((after - before).abs().max()) < 1e-4
    earlier = schedule.run(steps, Schedule((1.0, *(0.3,) * (full.n_iters - 11)), False)).f
    assert float((before - earlier).abs().max()) >= 1e-4
    assert full.outcome().stop == "tol"
    assert schedule.run(steps, Schedule((1.0, 0.3), threshold=1e9, interval=1)).met is False
    assert schedule.run(steps, Schedule((1.0, 0.3))).met is None


def test_points_without_weight_change_nothing():
    x, y, a, b = problem()
    far = torch.full((2, 3), 30.0, dtype=x.dtype)
    plan = Schedule((1.0, 0.1))
    for rho in (INF, 0.5):
        without = schedule.solve(steps_of(x, y, a, b, rho, rho), plan, debias=True)
        padded = steps_of(torch.cat((x, far)), y, torch.cat((a, a.new_zeros(2))), b, rho, rho)
        found = schedule.solve(padded, plan, debias=True)
        assert float(found.dual()) == pytest.approx(float(without.dual()), rel=1e-9)
        torch.testing.assert_close(found.gradient()[:-2], without.gradient(), rtol=1e-6, atol=1e-12)
        assert (found.gradient()[-2:] == 0).all()
