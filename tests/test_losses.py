"""SamplesLoss is GeomLoss's: the same number, the same gradients where they are right, and errors where it has more to offer."""

from __future__ import annotations

import inspect

import geomloss
import pytest
import torch
from clouds import measures

import otgen
from otgen import ops
from otgen.errors import ConvergenceWarning, UsageError
from otgen.solvers import engine
from otgen.solvers.problems import problem_of
from otgen.solvers.result import OTResult

pytestmark = pytest.mark.usefixtures("streamed")


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def gradients(loss, tensors):
    own = leaves(tensors)
    return torch.autograd.grad(loss(*own).sum(), own)


def correction(reach, blur):
    """What GeomLoss's gradients of a relaxed problem are short of."""
    return 1.0 if reach is None else (reach**2 + blur**2) / (reach**2 + blur**2 / 2)


# The same number


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("reach", [None, 0.3, 1.0])
@pytest.mark.parametrize("debias", [True, False])
def test_the_number_and_the_potentials_are_geomlosss(debias, reach, batch, dtype):
    tensors = measures(dtype, 1.0 if reach is None else 1.6, batch)
    options = {"blur": 0.1, "reach": reach, "debias": debias, "scaling": 0.6}
    precision = 1e-10 if dtype == torch.float64 else 1e-5
    for count in (2, 4):
        given = tensors if count == 4 else tensors[1::2]
        theirs = geomloss.SamplesLoss(**options)(*given)
        ours = otgen.SamplesLoss(**options)(*given)
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=precision, atol=0)
    pair = otgen.SamplesLoss(**options, potentials=True)(*tensors)
    for mine, other, weights in zip(pair, geomloss.SamplesLoss(**options, potentials=True)(*tensors), tensors[::2]):
        assert mine.shape == weights.shape
        torch.testing.assert_close(mine, other.detach().view_as(weights), rtol=precision, atol=precision)


@pytest.mark.parametrize("options", [{}, {"diameter": 7.0}, {"scaling": 0.9}, {"blur": 5.0}, {"blur": 0.5, "diameter": 0.1}])
def test_defaults_and_the_options_of_the_schedule(options):
    tensors = measures()
    torch.testing.assert_close(
        otgen.SamplesLoss(**options)(*tensors), geomloss.SamplesLoss(**options)(*tensors), rtol=1e-10, atol=1e-14
    )


def test_arguments_come_in_geomlosss_order_with_its_defaults():
    theirs = list(inspect.signature(geomloss.SamplesLoss).parameters.values())
    ours = list(inspect.signature(otgen.SamplesLoss).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}
    arguments = ("sinkhorn", 2, 0.2, 1.5, 3.0, 0.7, 5, None, None, None, False, False, False, "online")
    tensors = measures()
    torch.testing.assert_close(
        otgen.SamplesLoss(*arguments)(*tensors), geomloss.SamplesLoss(*arguments[:-1], "tensorized")(*tensors), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("backend", ["auto", "tensorized", "online", "multiscale"])
def test_backends_are_one(backend):
    tensors = measures()
    assert otgen.SamplesLoss(backend=backend)(*tensors) == otgen.SamplesLoss()(*tensors)


def test_two_equal_reaches_are_one_and_either_may_be_left_out():
    tensors = measures(mass=1.6)
    both = otgen.SamplesLoss(blur=0.1, reach=0.5)(*tensors)
    assert otgen.SamplesLoss(blur=0.1, reach_x=0.5, reach_y=0.5)(*tensors) == both
    assert otgen.SamplesLoss(blur=0.1, reach=0.5, reach_x=0.5)(*tensors) == both
    assert otgen.SamplesLoss(blur=0.1, reach=0.9, reach_x=0.5, reach_y=0.5)(*tensors) == both


@pytest.mark.parametrize("reaches", [(0.5, None), (None, 0.5), (0.4, 1.0)])
@pytest.mark.parametrize("debias", [True, False])
def test_each_side_has_its_own_reach(reaches, debias):
    """At convergence the schedule and solve_sample agree, but for the constant of a biased value, which unit masses do not have."""
    tensors = measures()
    options = {"blur": 0.3, "reach_x": reaches[0], "reach_y": reaches[1], "debias": debias}
    long = otgen.SamplesLoss(**options, use_epsilon_scaling=False, n_iters=600)
    to_tolerance = otgen.SamplesLoss(**options, tol=1e-11)
    torch.testing.assert_close(long(*tensors), to_tolerance(*tensors), rtol=1e-9, atol=0)
    for mine, other in zip(gradients(long, tensors)[1::2], gradients(to_tolerance, tensors)[1::2]):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-10)
    assert long.last_result.unbalanced == tuple(float("inf") if r is None else 2.0 * r**2 for r in reaches)


@pytest.mark.parametrize("tol", [None, 1e-9])
def test_equal_measures_have_no_distance(tol):
    a, x, _, _ = measures()
    for options in ({}, {"reach": 0.5}, {"reach_x": 0.5}, {"reach_y": 0.5}, {"reach_x": 0.3, "reach_y": 0.9}):
        assert float(otgen.SamplesLoss(blur=0.1, tol=tol, **options)(a, x, a, x)) == pytest.approx(0.0, abs=1e-10)


def test_flash_sinkhorns_cost_is_twice_geomlosss():
    """flash-sinkhorn with half_cost=False and blur² = 2σ² is GeomLoss with σ, twice over."""
    tensors, root = measures(mass=1.3), 2.0**0.5
    options = {"scaling": 0.5, "diameter": 2.0}
    half = otgen.SamplesLoss(blur=0.1, reach=0.5, **options)
    full = otgen.SamplesLoss(blur=root * 0.1, reach=root * 0.5, half_cost=False, scaling=0.5, diameter=root * 2.0)
    torch.testing.assert_close(full(*tensors), 2.0 * half(*tensors), rtol=1e-12, atol=0)
    for mine, other in zip(gradients(full, tensors), gradients(half, tensors)):
        torch.testing.assert_close(mine, 2.0 * other)
    assert full.last_result.reg == pytest.approx(half.last_result.reg)


# Gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("reach", [None, 0.3])
@pytest.mark.parametrize("debias", [True, False])
def test_gradients_are_geomlosss_corrected_when_relaxed(debias, reach, batch, dtype):
    blur, tensors = 0.1, measures(dtype, 1.0 if reach is None else 1.6, batch)
    ours = gradients(otgen.SamplesLoss(blur=blur, reach=reach, debias=debias), tensors)
    theirs = gradients(geomloss.SamplesLoss(blur=blur, reach=reach, debias=debias), tensors)
    for index, (mine, other) in enumerate(zip(ours, theirs)):
        expected = correction(reach, blur) * other
        if reach is not None and not debias and index in (0, 2):
            expected = expected - blur**2 / 2
        precision = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(mine, expected, rtol=precision, atol=precision * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("reach", [None, 0.3])
@pytest.mark.parametrize("debias", [True, False])
def test_potentials_have_geomlosss_gradients(debias, reach, batch, dtype):
    tensors, pairs = measures(dtype, 1.0 if reach is None else 1.6, batch), []
    for library in (otgen, geomloss):
        a, x, b, y = tensors[0], tensors[1].clone().requires_grad_(), tensors[2], tensors[3].clone().requires_grad_()
        f, g = library.SamplesLoss(blur=0.1, reach=reach, debias=debias, potentials=True)(a, x, b, y)
        total = (f.view_as(a) * a.square()).sum() - (g.view_as(b) * b.cos()).sum()
        pairs.append(torch.autograd.grad(total, (x, y)))
    for mine, other in zip(*pairs):
        precision = 1e-9 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(mine, other, rtol=precision, atol=precision * float(other.abs().max()))


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("options", [{"tol": 1e-9, "blur": 0.3}, {"tol": 1e-9, "blur": 0.3, "reach": 0.5}], ids=str)
def test_solved_potentials_move_with_their_own_points(options, debias):
    """f(x_i) by one update from the solved g, less that of the own problem: finite differences of the update."""
    a, x, b, y = measures(n=7, m=6)
    loss = otgen.SamplesLoss(potentials=True, debias=debias, **options)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(a, point, b, y)[0][2], point)
    assert not gradient[torch.arange(7) != 2].any()
    updates = [loss.last_result.to_dual_potentials()]
    if debias:
        own = otgen.SamplesLoss(potentials=True, debias=False, **options)
        own(a, x, a, x)
        updates.append(own.last_result.to_dual_potentials())
    step = torch.tensor([[0.0, 1e-5, 0.0]], dtype=x.dtype)
    cross, *own = (float(update.f(x[2:3] + step) - update.f(x[2:3] - step)) / 4e-5 for update in updates)
    assert float(gradient[2, 1]) == pytest.approx(cross - sum(own), rel=1e-4, abs=1e-6)


def test_potentials_of_half_an_update_are_not_differentiated():
    a, x, b, y = measures(n=7, m=6)
    f, _ = otgen.SamplesLoss(eps_list=[1.0], last_extrapolation=False, potentials=True)(a, x.requires_grad_(), b, y)
    with pytest.raises(UsageError, match="last_extrapolation=True"):
        f.sum().backward()


@pytest.mark.parametrize("reach", [None, 0.5, (0.5, None), (0.4, 1.0)])
@pytest.mark.parametrize("debias", [True, False])
def test_gradients_are_finite_differences_of_the_number_at_convergence(debias, reach):
    reach_x, reach_y = reach if isinstance(reach, tuple) else (reach, reach)
    tensors = measures(mass=1.0 if reach is None else 1.6, n=12, m=9)
    loss = otgen.SamplesLoss(reach_x=reach_x, reach_y=reach_y, debias=debias, eps_list=[0.2] * 300)
    found, h = gradients(loss, tensors), 1e-5
    for index, name in enumerate("axby"):
        direction = torch.randn(tensors[index].shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        if name in "ab":
            direction *= tensors[index]
            if reach is None:
                direction -= tensors[index] * direction.sum()
        ends = [[t + sign * h * direction if i == index else t for i, t in enumerate(tensors)] for sign in (1.0, -1.0)]
        expected = float(loss(*ends[0]) - loss(*ends[1])) / (2 * h)
        assert float((found[index] * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_a_training_loop_and_the_grad_mode():
    a, x, b, y = measures()
    loss, moving = otgen.SamplesLoss(blur=0.3), x.clone().requires_grad_()
    optimiser = torch.optim.SGD([moving], lr=20.0)
    values = []
    for _ in range(10):
        optimiser.zero_grad()
        value = loss(a, moving, b, y)
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.1 * values[0]
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not loss(a, moving, b, y).requires_grad
        assert not torch.is_grad_enabled()


def test_the_value_is_differentiable_once():
    a, x, b, y = measures(n=8, m=8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(otgen.SamplesLoss()(a, x, b, y), x, create_graph=True)
    with pytest.raises(UsageError, match="one derivative"):
        gradient.sum().backward()


# To a tolerance, and results


@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("method", ["auto", "symmetric", "alternating", "anderson"])
def test_a_tolerance_goes_to_solve_sample(method, debias, reach):
    a, x, b, y = measures()
    loss = otgen.SamplesLoss(blur=0.2, reach=reach, debias=debias, tol=1e-7, method=method)
    expected = otgen.solve_sample(x, y, a, b, blur=0.2, reach=reach, debias=debias, tol=1e-7, method=method)
    torch.testing.assert_close(loss(a, x, b, y), 0.5 * expected.value, rtol=1e-12, atol=0)
    assert loss.last_result.n_iters == expected.n_iters
    assert loss.last_result.marginal_error <= 1e-7
    loss.potentials = True
    f, g = loss(a, x, b, y)
    own = (expected.potential_aa, expected.potential_bb) if debias else (0.0, 0.0)
    torch.testing.assert_close(f, 0.5 * (expected.potential_a - own[0]))
    torch.testing.assert_close(g, 0.5 * (expected.potential_b - own[1]))


def test_tolerances_and_schedules_meet_at_convergence():
    tensors = measures(batch=2)
    torch.testing.assert_close(
        otgen.SamplesLoss(blur=0.3, tol=1e-10)(*tensors), geomloss.SamplesLoss(blur=0.3, scaling=0.98)(*tensors), rtol=1e-5, atol=0
    )


def test_a_method_alone_stops_at_solve_samples_tolerance():
    loss = otgen.SamplesLoss(blur=0.2, method="alternating")
    loss(*measures())
    assert loss.last_result.stop == "tol"
    assert 1e-5 < loss.last_result.marginal_error <= 1e-3


def test_a_missed_tolerance_warns():
    with pytest.warns(ConvergenceWarning, match="after 2 iterations"):
        otgen.SamplesLoss(tol=1e-9, max_iter=2)(*measures())


def test_the_last_result_is_in_units_of_the_squared_distance():
    a, x, b, y = measures()
    loss = otgen.SamplesLoss(blur=0.2, debias=False)
    assert loss.last_result is None
    value = loss(a, x.requires_grad_(), b, y)
    result = loss.last_result
    assert isinstance(result, OTResult)
    assert result is loss.last_result
    assert not result.value.requires_grad
    torch.testing.assert_close(result.value, 2.0 * value.detach())
    assert result.reg == pytest.approx(2.0 * 0.2**2)
    loss.potentials = True
    f, g = loss(a, x, b, y)
    torch.testing.assert_close(result.potential_a[:, None] + result.potential_b, 2.0 * (f[:, None] + g).detach())
    error = (result.plan.sum(1) - a).abs().sum() + (result.plan.sum(0) - b).abs().sum()
    assert result.marginal_error == pytest.approx(float(error))
    assert result.stop == "max_iter"


def test_a_batch_keeps_a_result_for_each_problem():
    tensors = measures(batch=3)
    for options in ({"blur": 0.2}, {"blur": 0.2, "tol": 1e-6}):
        loss = otgen.SamplesLoss(**options)
        values = loss(*tensors)
        assert [float(result.value) for result in loss.last_result] == pytest.approx((2.0 * values).tolist())
        single = otgen.SamplesLoss(**options, diameter=otgen.solvers.schedule.diameter(tensors[1], tensors[3]))
        for k in range(3):
            torch.testing.assert_close(single(*(tensor[k] for tensor in tensors)), values[k], rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{"blur": 0.2}, {"blur": 0.2, "tol": 1e-3}], ids=str)
def test_a_batch_takes_no_more_launches_than_its_slowest_problem(options, monkeypatch):
    counts = []
    for name in ("sinkhorn_half_step", "sinkhorn_symmetric_step", "sinkhorn_debiased_step"):
        whole = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, whole=whole, **more: counts.append(1) or whole(*args, **more))
    monkeypatch.setattr(engine, "keepable", lambda steps: False)
    tensors = measures(batch=3)
    diameter = otgen.solvers.schedule.diameter(tensors[1], tensors[3])
    loss = otgen.SamplesLoss(**options, diameter=diameter)
    loss(*tensors)
    together = len(counts)
    alone = []
    for k in range(3):
        counts.clear()
        loss(*(tensor[k] for tensor in tensors))
        alone.append(len(counts))
    assert max(alone) <= together < sum(alone)


def test_a_warm_start_needs_fewer_iterations():
    a, x, b, y = measures()
    counts = {}
    for warm in (False, True):
        loss = otgen.SamplesLoss(blur=0.1, tol=1e-8, method="alternating", warm_start=warm)
        loss(a, x, b, y)
        value = loss(a, x + 1e-6, b, y)
        counts[warm] = loss.last_result.n_iters
        assert float(value) == pytest.approx(float(otgen.SamplesLoss(blur=0.1, tol=1e-10)(a, x + 1e-6, b, y)), rel=1e-6)
    assert counts[True] < counts[False] / 2
    assert loss(a[:20] / a[:20].sum(), x[:20], b, y) > 0


# flash-sinkhorn's options


def test_a_number_of_iterations_without_a_schedule():
    a, x, b, y = measures()
    loss = otgen.SamplesLoss(blur=0.3, use_epsilon_scaling=False, n_iters=7)
    assert loss(a, x, b, y) == otgen.SamplesLoss(eps_list=[0.3**2] * 7)(a, x, b, y)
    assert loss.last_result.n_iters == 7
    assert otgen.SamplesLoss(eps=0.3**2, use_epsilon_scaling=False, n_iters=7)(a, x, b, y) == loss(a, x, b, y)


def test_eps_stands_for_the_square_of_blur():
    tensors = measures()
    torch.testing.assert_close(otgen.SamplesLoss(eps=0.04)(*tensors), otgen.SamplesLoss(blur=0.2)(*tensors), rtol=1e-12, atol=0)


def test_a_cut_schedule_says_so():
    tensors = measures()
    with pytest.warns(ConvergenceWarning, match="n_iters=3 cuts the schedule"):
        value = otgen.SamplesLoss(blur=0.1, diameter=2.0, n_iters=3)(*tensors)
    torch.testing.assert_close(value, otgen.SamplesLoss(eps_list=[4.0, 4.0, 1.0])(*tensors), rtol=1e-12, atol=0)
    assert otgen.SamplesLoss(blur=0.1, n_iters=99)(*tensors) == otgen.SamplesLoss(blur=0.1)(*tensors)


def test_without_the_last_update_the_potentials_are_the_averaged_ones():
    tensors = measures()
    with_it, without = (
        otgen.SamplesLoss(eps_list=[1.0, 0.1], last_extrapolation=last, debias=False, potentials=True) for last in (True, False)
    )
    f, g = without(*tensors)
    c = 0.5 * torch.cdist(tensors[1], tensors[3]).square()
    torch.testing.assert_close(with_it(*tensors)[0], -0.1 * torch.logsumexp(tensors[2].log() + (g - c) / 0.1, 1))
    assert float((with_it(*tensors)[0] - f).abs().max()) > 1e-3


def test_a_threshold_is_in_units_of_the_cost():
    tensors = measures()
    loss = otgen.SamplesLoss(eps_list=[0.2] * 300, threshold=1e-5, inner_iterations=5, debias=False)
    loss(*tensors)
    assert loss.last_result.stop == "tol"
    n = loss.last_result.n_iters
    pairs = [
        otgen.SamplesLoss(eps_list=[0.2] * k, last_extrapolation=False, debias=False, potentials=True)(*tensors)
        for k in (n - 10, n - 5, n)
    ]
    changes = [max(float((one - other).abs().max()) for one, other in zip(*two)) for two in (pairs[:2], pairs[1:])]
    assert changes[0] >= 1e-5 > changes[1]
    with pytest.warns(ConvergenceWarning, match="threshold=1e-05"):
        otgen.SamplesLoss(threshold=1e-5)(*tensors)


def test_tf32_may_be_ruled_out():
    a, x, b, y = measures(torch.float32)
    loss = otgen.SamplesLoss(allow_tf32=False)
    loss(a, x, b, y)
    assert loss.last_result.precision == "fp32"
    loss(*measures())
    assert loss.last_result.precision == "fp64"
    assert loss._precision(problem_of((a, x, b, y))) == "fp32"
    assert otgen.SamplesLoss()._precision(problem_of((a, x, b, y))) == "auto"
