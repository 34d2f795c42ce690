"""Newton's method on the semi-dual: its system is the derivative, its steps are progress, its sweeps are counted."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from clouds import clusters, cubes, mean_cost, problem, strengths, uneven

import otgen
from otgen import ops
from otgen.solvers import newton as module
from otgen.solvers.annealing import anneal, stages
from otgen.solvers.inputs import centre, read
from otgen.solvers.newton import _Point, _System, newton
from otgen.solvers.sinkhorn import Watch, alternating
from otgen.solvers.steps import Steps, damping, kappa, scale
from otgen.solvers.verdict import least_error

pytestmark = pytest.mark.usefixtures("streamed")

KINDS = [None, 0.5, (None, 0.5), (0.5, None)]


def steps_of(x, y, a=None, b=None, *, share, unbalanced=None):
    rho_a, rho_b = strengths(unbalanced or math.inf)
    clouds = centre(read(x, y, a, b), balanced=math.isinf(rho_a) and math.isinf(rho_b))
    return Steps(clouds, share * mean_cost(x, y), ("ieee",), rho_a, rho_b)


def kind(unbalanced, n=80, m=60, d=3, share=0.005):
    """Two clouds; `unbalanced` is the strength, or the pair of them, as a share of the mean cost."""
    x, y, a, b = problem(n, m, d) if unbalanced is None else uneven(n, m, d)
    rho = tuple(strength * mean_cost(x, y) for strength in strengths(unbalanced or math.inf))
    return steps_of(x, y, a, b, share=share, unbalanced=rho)


def start(steps):
    return steps.scaled(torch.zeros_like(steps.clouds.a), torch.zeros_like(steps.clouds.b))


def annealed(steps):
    stage = anneal(steps, torch.zeros_like(steps.clouds.a), torch.zeros_like(steps.clouds.b), stages(steps))
    return stage.u, stage.v


def watch_of(steps, tol, max_iter=2000, interval=1, callback=lambda n, error: None):
    return Watch(tol, least_error(steps.clouds, steps.eps, "ieee"), max_iter, interval, callback)


def solved(steps, tol, pair=None, **options):
    return newton(steps, *(pair or start(steps)), watch_of(steps, tol, **options))


def plan_of(steps, u, v):
    c = steps.clouds
    scores = u[:, None] + v + scale(steps.eps) * c.x @ c.y.T
    return torch.where((c.a[:, None] > 0) & (c.b > 0), c.a[:, None] * c.b * torch.exp2(scores), 0.0)


def dual_of(steps, u, v):
    """kappa times the dual objective, dense."""
    total = 0.0
    for rho, weights, potential, squares, lift in (
        (steps.rho_a, steps.clouds.a, u, steps.clouds.x_sq, steps.lift),
        (steps.rho_b, steps.clouds.b, v, steps.clouds.y_sq, -steps.lift),
    ):
        f = (potential + scale(steps.eps) / 2 * squares) / kappa(steps.eps) + lift
        total = total + weights @ (f if math.isinf(rho) else -rho * torch.expm1(-f / rho))
    return kappa(steps.eps) * (total - steps.eps * plan_of(steps, u, v).sum())


def image_of(steps, u, v):
    """T(u), dense and differentiable: both softmins, damped."""
    c, by, ln2 = steps.clouds, scale(steps.eps), math.log(2.0)

    def update(squares, others, scores, rho, lift):
        soft = -torch.logsumexp(scores * ln2 + others.log(), 1) / ln2
        factor = damping(steps.eps, rho)
        return factor * soft - (1.0 - factor) * (by / 2 * squares + kappa(steps.eps) * lift)

    v = update(c.y_sq, c.a, by * c.y @ c.x.T + u, steps.rho_b, -steps.lift)
    return update(c.x_sq, c.b, by * c.x @ c.y.T + v, steps.rho_a, steps.lift)


# The system


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_its_matrix_is_the_derivative_of_the_fixed_point(unbalanced):
    steps = kind(unbalanced, 20, 25, 2, share=0.05)
    u, v = start(steps)
    u, v = steps.rows(u, v)[0], v
    point = _Point.at(steps, u, v)
    torch.testing.assert_close(point.image, image_of(steps, u, v), rtol=1e-12, atol=1e-11)
    jacobian = torch.autograd.functional.jacobian(lambda u: image_of(steps, u, v), u)
    system, identity = _System.of(point), torch.eye(len(u), dtype=u.dtype)
    expected = (point.r / damping(steps.eps, steps.rho_a))[:, None] * (identity - jacobian)
    found = torch.stack([system.product(unit) for unit in identity], 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found, found.T, rtol=1e-9, atol=1e-14)
    lowest = torch.linalg.eigvalsh(found)[0]
    assert abs(lowest) < 1e-14 if unbalanced is None else lowest > 1e-6


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_a_step_solved_to_the_end_solves_the_linear_equations(unbalanced):
    steps = kind(unbalanced, 20, 25, 2, share=0.05)
    u, v = start(steps)
    point = _Point.at(steps, *steps.rows(u, v)[:1], v)
    system = _System.of(point)
    direction, inner = module._direction(point, 1e-12, 1e9, 1)
    matrix = torch.stack([system.product(unit) for unit in torch.eye(len(u), dtype=u.dtype)], 1)
    expected = torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True) @ (system.diagonal * system.projected(point.residual))
    if unbalanced is None:
        expected = expected - expected.mean()
        direction = direction - direction.mean()
    torch.testing.assert_close(direction, expected, rtol=1e-8, atol=1e-9)
    assert inner <= len(u)


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_gain_and_slope_are_those_of_the_dual(unbalanced):
    steps = kind(unbalanced, 20, 25, 2, share=0.05)
    u, v = start(steps)
    point = _Point.at(steps, *steps.rows(u, v)[:1], v)
    direction = torch.randn(len(u), generator=torch.Generator().manual_seed(0), dtype=u.dtype)
    ends = [_Point.at(steps, point.u + h * direction, point.v) for h in (1e-4, -1e-4)]
    for end in ends:
        expected = dual_of(steps, end.u, end.v) - dual_of(steps, point.u, point.v)
        torch.testing.assert_close(point.gain(end), expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close((point.gain(ends[0]) - point.gain(ends[1])) / 2e-4, point.slope(direction), rtol=1e-5, atol=0)


# The solution


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
@pytest.mark.parametrize(("d", "share"), [(2, 0.01), (3, 0.01), (64, 0.003)])
def test_it_finds_in_few_steps_what_alternation_finds_in_hundreds(d, share, unbalanced):
    steps = kind(unbalanced, d=d, share=share)
    pair = annealed(steps)
    plain = alternating(steps, *pair, watch_of(steps, 1e-10, 30000))
    fast = solved(steps, 1e-10, pair)
    print(f"{d}-D, {unbalanced}: {fast.n_iters} steps in {fast.passes} sweeps; alternation {plain.n_iters} in {plain.passes}")
    assert (plain.stop, fast.stop) == ("tol", "tol")
    assert fast.error <= 1e-10
    assert plain.n_iters > 200
    assert fast.n_iters <= 20
    assert fast.passes < 0.5 * plain.passes
    plan = plan_of(steps, fast.u, fast.v)
    torch.testing.assert_close(plan, plan_of(steps, plain.u, plain.v), rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(fast.r, plan.sum(1), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(fast.c, plan.sum(0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_the_error_is_that_of_the_pair(unbalanced):
    steps = kind(unbalanced)
    outcome = solved(steps, 1e-3)
    plan = plan_of(steps, outcome.u, outcome.v)
    rows = (plan.sum(1) - steps.row_target(outcome.u)).abs().sum()
    columns = (plan.sum(0) - steps.swapped.row_target(outcome.v)).abs().sum()
    assert 1e-9 < outcome.error <= 1e-3
    assert float(rows + columns) / steps.clouds.mass == pytest.approx(outcome.error, rel=1e-6)


def test_it_converges_quadratically_when_the_linear_equations_are_solved(monkeypatch):
    for name in ("LOOSEST", "TIGHTEST"):
        monkeypatch.setattr(module, name, 1e-13)
    for unbalanced in KINDS:
        steps, errors = kind(unbalanced, share=0.01), []
        assert solved(steps, 1e-14, callback=lambda n, error, errors=errors: errors.append(error)).stop == "tol"
        last = [error for error in errors if 1e-13 < error < 1e-2]
        assert len(last) >= 2
        print(unbalanced, [f"{error:.1e}" for error in last])
        assert all(new <= 200.0 * old**2 for old, new in pairwise(last))


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_the_sides_may_be_exchanged(unbalanced):
    steps = kind(unbalanced)
    forth, back = solved(steps, 1e-8), solved(steps.swapped, 1e-8)
    assert forth.passes == back.passes
    assert forth.error == pytest.approx(back.error, rel=1e-4)
    torch.testing.assert_close(forth.u, back.v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forth.c, back.r, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_points_without_weight_change_nothing(unbalanced):
    x, y, a, b = problem(50, 60) if unbalanced is None else uneven(50, 60)
    far = torch.full((2, 3), 9.0, dtype=x.dtype)
    wide, taller = torch.cat((x, far, far + x[:2])), torch.cat((y, -far))
    nothing = torch.zeros(4, dtype=a.dtype)
    steps = steps_of(x, y, a, b, share=0.01, unbalanced=unbalanced)
    more = steps_of(wide, taller, torch.cat((a, nothing)), torch.cat((b, nothing[:2])), share=0.01, unbalanced=unbalanced)
    more = Steps(more.clouds, steps.eps, ("ieee",), more.rho_a, more.rho_b)
    expected, found = solved(steps, 1e-10), solved(more, 1e-10)
    assert found.stop == "tol"
    assert found.passes <= 1.5 * expected.passes
    assert float(found.r[50:].abs().max()) == 0.0
    plan = plan_of(more, found.u, found.v)[:50, :60]
    torch.testing.assert_close(plan, plan_of(steps, expected.u, expected.v), rtol=1e-6, atol=1e-12)
    settled, _ = more.rows(found.u, found.v)
    torch.testing.assert_close(found.u, settled, rtol=0, atol=1e-4)


# Sweeps


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_passes_are_the_sweeps_taken(unbalanced, monkeypatch):
    taken = []
    for name in ("sinkhorn_half_step", "hvp_matvec"):
        sweep = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, sweep=sweep, name=name, **kw: (taken.append(name), sweep(*args, **kw))[1])
    for tol, max_iter in ((1e-9, 2000), (1e-9, 6), (2.0, 2000)):
        taken.clear()
        outcome = solved(kind(unbalanced), tol, max_iter=max_iter)
        assert outcome.passes == len(taken)
        assert outcome.n_iters <= max_iter
        assert (taken.count("hvp_matvec") > 0) == (tol < 2.0)
        assert (outcome.stop == "max_iter") == (max_iter == 6)


@pytest.mark.parametrize(("clouds", "d"), [(cubes, 2), (cubes, 3)], ids=["2-D", "3-D"])
def test_to_a_tight_tolerance_it_takes_fewer_sweeps_than_the_accelerated_loop(clouds, d):
    steps = steps_of(*clouds(500, d, dtype=torch.float64), share=0.002)
    pair = annealed(steps)
    mixed = alternating(steps, *pair, watch_of(steps, 1e-8), accelerated=True)
    outcome = solved(steps, 1e-8, pair)
    print(f"{d}-D: {outcome.passes} sweeps in {outcome.n_iters} steps; accelerated {mixed.passes}")
    assert outcome.stop == "tol"
    assert outcome.passes <= 0.8 * mixed.passes


def test_a_solution_is_recognised():
    steps = kind(None)
    first = solved(steps, 1e-9)
    again = solved(steps, 1e-8, (first.u, first.v))
    assert (again.n_iters, again.passes) == (1, 3)


def test_a_gpu_waits_for_few_numbers(monkeypatch):
    """As with interval = 8; on this CPU, sums out of range are looked at by the sweeps themselves, which use bool()."""
    reads = []
    for name in ("tolist", "__float__"):
        read_out = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, read_out=read_out: (reads.append(1), read_out(self))[1])
    steps = kind(None)
    pair = start(steps)
    reads.clear()
    outcome = solved(steps, 1e-8, pair, interval=8)
    assert outcome.stop == "tol"
    assert outcome.n_iters >= 8
    assert len(reads) <= outcome.passes / 8 + 2 * outcome.n_iters


# What it must survive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 16])
def test_mass_that_crosses_between_clusters_converges(d, dtype):
    """Alternation moves the potentials of a cluster by the same vector for hundreds of iterations, and mixing can wander."""
    sweeps = []
    for seed in range(6):
        x, y = clusters(40, 30, d, seed, dtype)
        steps = steps_of(x, y, share=0.01)
        outcome = solved(steps, 1e-3 if dtype == torch.float32 else 1e-8, annealed(steps))
        sweeps.append(outcome.passes)
        assert outcome.stop == "tol"
    print(sweeps)
    assert max(sweeps) <= 250


@pytest.mark.parametrize("reg", [1.0, 0.02, 0.005])
def test_two_distant_points_converge(reg):
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    a, b = torch.tensor([0.5, 0.5], dtype=x.dtype), torch.tensor([0.3, 0.7], dtype=x.dtype)
    steps = Steps(centre(read(x, x, a, b)), reg, ("ieee",))
    outcome = solved(steps, 1e-12)
    assert outcome.stop == "tol"
    assert outcome.n_iters <= 20
    plan = plan_of(steps, outcome.u, outcome.v)
    torch.testing.assert_close(plan.sum(1), a)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("unbalanced", [None, 0.5], ids=str)
def test_a_few_points(shape, unbalanced):
    steps = kind(unbalanced, *shape, 2, share=0.05)
    outcome = solved(steps, 1e-12)
    assert outcome.stop == "tol"
    plan = plan_of(steps, outcome.u, outcome.v)
    torch.testing.assert_close(plan.sum(1), steps.row_target(outcome.u), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("broken", [lambda d: -d, lambda d: d * math.nan, lambda d: 0.0 * d], ids=["down", "nan", "none"])
def test_steps_that_are_no_progress_are_refused_and_alternation_goes_on(broken, monkeypatch):
    direction = module._direction
    found = []

    def spoilt(*args):
        d, inner = direction(*args)
        found.append(inner)
        return broken(d), inner

    monkeypatch.setattr(module, "_direction", spoilt)
    steps = kind(None, share=0.05)
    plain = alternating(steps, *start(steps), watch_of(steps, 1e-6))
    outcome = solved(steps, 1e-6)
    assert found
    assert outcome.stop == "tol"
    assert outcome.n_iters <= plain.n_iters + len(found)


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
def test_float32_agrees_with_float64(unbalanced):
    x, y, a, b = problem(80, 60) if unbalanced is None else uneven(80, 60)
    exact = steps_of(x, y, a, b, share=0.01, unbalanced=unbalanced)
    steps = steps_of(x.float(), y.float(), a.float(), b.float(), share=0.01, unbalanced=unbalanced)
    outcome, expected = solved(steps, 1e-5), solved(exact, 1e-12)
    assert outcome.u.dtype == torch.float32
    assert outcome.stop == "tol"
    plan = plan_of(exact, expected.u, expected.v)
    found = plan_of(steps, outcome.u, outcome.v).double()
    assert float((found - plan).abs().sum()) <= 1e-3 * float(plan.sum())


def test_it_stops_where_rounding_holds_the_error():
    steps = steps_of(*cubes(200, 2), share=0.01)
    outcome = solved(steps, 0.0)
    assert outcome.stop == "precision floor"
    assert outcome.error < 1e-4


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_kernels_take_the_same_steps(monkeypatch):
    """Under Triton's interpreter."""
    steps = steps_of(*cubes(20, 2), share=0.02)
    expected = solved(steps, 1e-3)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = solved(steps, 1e-3)
    assert (found.stop, found.n_iters, found.passes) == ("tol", expected.n_iters, expected.passes)
    torch.testing.assert_close(plan_of(steps, found.u, found.v), plan_of(steps, expected.u, expected.v), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(60, 45), (45, 60)], ids=str)
def test_as_a_method_of_solve_sample(shape, unbalanced):
    """The value of the accelerated loop, in fewer sweeps at a tight tolerance, debiased too."""
    x, y, a, b = problem(*shape) if unbalanced is None else uneven(*shape)
    for debias in (False, True):
        both = {"reg": 0.002, "unbalanced": unbalanced, "debias": debias, "tol": 1e-10, "max_iter": 5000}
        mine, other = (otgen.solve_sample(x, y, a, b, method=method, **both) for method in ("newton", "anderson"))
        assert mine.converged
        assert float(mine.value) == pytest.approx(float(other.value), rel=1e-9, abs=1e-12)
        assert mine.n_iters < other.n_iters
