"""Fewer sweeps to the same solution: how many, on which clouds, and where acceleration must do no harm."""

from __future__ import annotations

import warnings

import pytest
import torch
from clouds import clusters, cubes, gaussians, mean_cost, problem, reference, uneven

import otgen
from otgen.errors import ConvergenceWarning

pytestmark = pytest.mark.usefixtures("streamed")

METHODS = ["alternating", "symmetric", "anderson"]

KINDS = [None, 0.5, (None, 0.5), (0.5, None)]


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return otgen.solve_sample(*args, **options)


# The same solution


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
@pytest.mark.parametrize("d", [2, 3, 64])
def test_it_finds_what_alternation_finds(d, unbalanced):
    x, y, a, b = problem(80, 60, d) if unbalanced is None else uneven(80, 60, d)
    reg = 0.03 * mean_cost(x, y)
    plain, fast = (
        otgen.solve_sample(x, y, a, b, reg=reg, unbalanced=unbalanced, method=method, tol=1e-10, max_iter=20000)
        for method in ("alternating", "anderson")
    )
    assert fast.passes < plain.passes
    torch.testing.assert_close(fast.plan, plain.plan, rtol=1e-6, atol=1e-13)
    torch.testing.assert_close(fast.value, plain.value, rtol=1e-10, atol=0)
    f, expected = fast.potential_a, plain.potential_a
    if unbalanced is None:
        f, expected = f - a @ f, expected - a @ expected
    torch.testing.assert_close(f, expected, rtol=0, atol=1e-5 * reg)


def test_auto_is_anderson():
    x, y, a, b = problem()
    auto, named = (otgen.solve_sample(x, y, a, b, reg=0.01, method=method) for method in ("auto", "anderson"))
    assert (auto.passes, auto.n_iters) == (named.passes, named.n_iters)
    assert torch.equal(auto.potential_a, named.potential_a)
    assert auto.passes < otgen.solve_sample(x, y, a, b, reg=0.01, method="alternating").passes


# How many sweeps


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("clouds", "d", "share", "row", "plain"),
    [(cubes, 2, 0.01, 45, 695), (cubes, 3, 0.002, 111, 2667), (gaussians, 64, 0.01, 27, 55), (gaussians, 64, 0.002, 85, 513)],
    ids=["2-D", "3-D", "64-D", "64-D hard"],
)
def test_sweeps_to_a_thousandth_are_those_of_the_table(clouds, d, share, row, plain, seed):
    """`row`: the better of Anderson with and without annealing in MATH.md; `plain`: alternation there, to know the clouds by."""
    x, y = clouds(1000, d, seed)
    reg = share * mean_cost(x, y)
    result = otgen.solve_sample(x, y, reg=reg)
    print(f"{clouds.__name__} {d}-D, {share} of the mean cost, seed {seed}: {result.passes} sweeps; MATH.md {row}")
    assert result.converged
    assert result.passes <= 1.2 * row
    if seed == 0 and plain < 1000:
        slow = otgen.solve_sample(x, y, reg=reg, method="alternating")
        assert slow.passes == pytest.approx(plain, rel=0.2)


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
@pytest.mark.parametrize("share", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(60, 45, 3), (10, 200, 2), (200, 3, 1), (30, 30, 64)], ids=str)
def test_an_easy_problem_is_not_made_longer(shape, share, unbalanced):
    x, y, a, b = problem(*shape) if unbalanced is None else uneven(*shape)
    reg = share * mean_cost(x, y)
    for tol in (1e-3, 1e-8):
        plain, fast = (
            otgen.solve_sample(x, y, a, b, reg=reg, unbalanced=unbalanced, tol=tol, method=method)
            for method in ("alternating", "anderson")
        )
        assert fast.passes <= max(1.2 * plain.passes, plain.passes + 2), (
            "one more iteration is what starting from the other side may cost"
        )


@pytest.mark.parametrize("unbalanced", KINDS, ids=str)
@pytest.mark.parametrize("d", [2, 64])
def test_a_warm_start_takes_fewer_sweeps(d, unbalanced):
    x, y, a, b = problem(300, 250, d)
    reg = 0.01 * mean_cost(x, y)
    first = otgen.solve_sample(x, y, a, b, reg=reg, unbalanced=unbalanced)
    generator = torch.Generator().manual_seed(4)
    moved = x + 0.01 * torch.randn(x.shape, generator=generator, dtype=x.dtype) / d**0.5
    cold = otgen.solve_sample(moved, y, a, b, reg=reg, unbalanced=unbalanced)
    warm = otgen.solve_sample(moved, y, a, b, reg=reg, unbalanced=unbalanced, potentials_init=first.potentials)
    assert warm.passes <= 0.7 * cold.passes
    assert float(warm.value) == pytest.approx(float(cold.value), rel=1e-4)
    again = otgen.solve_sample(x, y, a, b, reg=reg, unbalanced=unbalanced, potentials_init=first.potentials)
    assert again.passes <= 3


# What it must survive


@pytest.mark.parametrize(
    ("reg", "dtype"),
    [
        (1.0, torch.float32),
        (1.0, torch.float64),
        (0.1, torch.float32),
        (0.02, torch.float32),
        (0.02, torch.float64),
    ],
    ids=str,
)
def test_mass_that_crosses_between_two_distant_points_converges(reg, dtype):
    """Alternation moves the potentials by the same vector at every iteration for a while, so residuals do not differ."""
    x = torch.tensor([[0.0], [1.0]], dtype=dtype)
    a, b = torch.tensor([0.5, 0.5], dtype=dtype), torch.tensor([0.3, 0.7], dtype=dtype)
    plain = otgen.solve_sample(x, x, a, b, reg=reg, method="alternating")
    fast = quiet(x, x, a, b, reg=reg)
    assert plain.converged
    assert fast.stop == "tol"
    assert float(fast.value) == pytest.approx(float(plain.value), rel=1e-2)
    assert fast.passes <= plain.passes


@pytest.mark.parametrize("d", [2, 16])
def test_clusters_of_different_masses_converge(d):
    stops = []
    for seed in range(6):
        x, y = clusters(40, 30, d, seed)
        reg = 0.01 * mean_cost(x, y)
        assert otgen.solve_sample(x, y, reg=reg, method="alternating", max_iter=20000).converged
        stops.append(quiet(x, y, reg=reg).stop)
    assert stops == ["tol"] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_few_atoms_against_a_cloud_converge(dtype):
    """Uniform clouds, as in clustering or quantisation; alternation converges in 140 to 700 sweeps."""
    stops = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.rand(size, 2, generator=generator, dtype=torch.float64).to(dtype) for size in (40, 3))
        assert otgen.solve_sample(x, y + 0.2, reg=0.005, method="alternating").converged
        stops.append(quiet(x, y + 0.2, reg=0.005).stop)
    assert stops == ["tol"] * 6


@pytest.mark.parametrize("unbalanced", [0.5, (None, 0.5), (0.5, None)], ids=str)
def test_a_few_atoms_against_a_cloud_converge_when_relaxed(unbalanced):
    for seed in range(4):
        x, y = (cloud.double() for cloud in cubes(40, 2, seed))
        result = otgen.solve_sample(x, y[:3], reg=0.005, unbalanced=unbalanced, tol=1e-6)
        assert result.converged
        assert result.value.isfinite()


# Where it stops


@pytest.mark.parametrize("max_iter", [1, 2, 3])
@pytest.mark.parametrize("unbalanced", [None, (0.5, None)], ids=str)
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_max_iter_is_kept_and_its_end_is_told(method, debias, unbalanced, max_iter):
    """At a reg low enough that the accelerated loop would take more than three stages of annealing."""
    x, y, a, b = problem()
    with pytest.warns(ConvergenceWarning, match="above tol") as caught:
        result = otgen.solve_sample(
            x, y, a, b, reg=1e-3, tol=1e-9, max_iter=max_iter, method=method, debias=debias, unbalanced=unbalanced
        )
    assert len(caught) == 1
    assert result.stop == "max_iter"
    assert 1 <= result.n_iters <= max_iter
    assert result.value.isfinite()
    plan = result.plan
    assert (plan >= 0).all()
    assert plan.isfinite().all()


def told(method, debias=False, **options):
    x, y, a, b = problem()
    seen = []
    result = quiet(x, y, a, b, method=method, debias=debias, callback=lambda n, error: seen.append((n, error)), **options)
    return seen, result


@pytest.mark.parametrize("options", [{"reg": 0.1}, {"reg": 0.002}, {"reg": 0.01, "max_iter": 4}], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        "alternating",
        "anderson",
        "symmetric",
    ],
)
def test_the_callback_is_told_every_error_and_last_the_one_reported(method, options):
    seen, result = told(method, **options)
    counts = [n for n, _ in seen]
    assert counts == sorted(set(counts))
    assert all(0 <= n <= result.n_iters for n in counts)
    assert seen[-1] == (result.n_iters, result.marginal_error)


def test_the_callback_hears_only_of_the_plan_between_the_clouds():
    plain, _ = told("anderson", reg=0.1)
    debiased, result = told("anderson", debias=True, reg=0.1)
    assert debiased == plain
    assert debiased[-1][1] <= result.marginal_error


# Degenerate clouds


CLOUDS = {
    "one point each": lambda x, y: (x[:1], y[:1]),
    "one point": lambda x, y: (x, y[:1]),
    "identical points": lambda x, y: (x[:1].repeat(7, 1), y[:1].repeat(5, 1)),
    "zero diameter": lambda x, y: (x[:1].repeat(7, 1), x[:1].repeat(5, 1)),
    "duplicates": lambda x, y: (torch.cat((x, x, x)), y),
    "the same cloud": lambda x, y: (x, x.flip(0)),
    "a line": lambda x, y: (x[:, :1], y[:, :1]),
    "100 times more": lambda x, y: (x.repeat(10, 1) + 1e-3 * torch.arange(300)[:, None].to(x), y[:3]),
    "100 times fewer": lambda x, y: (x[:3], y.repeat(15, 1) + 1e-3 * torch.arange(300)[:, None].to(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unbalanced", [None, 0.5, (None, 0.5)], ids=str)
@pytest.mark.parametrize("kind", CLOUDS)
def test_degenerate_clouds_get_right_answers(kind, unbalanced, dtype):
    x, y, _, _ = problem(30, 20, dtype=dtype)
    x, y = CLOUDS[kind](x, y)
    options = {"reg": 0.2, "unbalanced": unbalanced, "tol": 1e-4 if dtype == torch.float32 else 1e-9}
    expected, own = reference(x, y, 0.2, unbalanced), 0.0
    for cloud in (x, y):
        own += reference(cloud, cloud, 0.2, unbalanced) / 2
    slack = 1e-6 if dtype == torch.float32 else 1e-9
    x.requires_grad_()
    for debias, wanted in ((False, expected), (True, expected - own)):
        result = otgen.solve_sample(x, y, debias=debias, **options)
        assert result.converged
        assert float(result.value.detach()) == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 1e-8, abs=slack)
        (gradient,) = torch.autograd.grad(result.value, x)
        assert gradient.isfinite().all()
        assert result.a_to_b.isfinite().all()


@pytest.mark.parametrize("unbalanced", [None, 0.5, (None, 0.5)], ids=str)
@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_do_not_matter(dtype, scale, debias, unbalanced):
    x, y, a, b = problem(dtype=dtype)
    square = scale**2
    other = (
        tuple(rho and rho * square for rho in unbalanced) if isinstance(unbalanced, tuple) else unbalanced and unbalanced * square
    )
    plain = otgen.solve_sample(x, y, a, b, reg=0.02, unbalanced=unbalanced, debias=debias)
    result = otgen.solve_sample(scale * x, scale * y, a, b, reg=0.02 * square, unbalanced=other, debias=debias)
    assert result.converged
    assert abs(result.passes - plain.passes) <= 2
    assert float(result.value) / square == pytest.approx(float(plain.value), rel=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("unbalanced", [None, 0.5, (None, 0.5)], ids=str)
@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_offset_does_not_matter(dtype, debias, unbalanced):
    """float32 coordinates near 1e4 are multiples of 2⁻¹⁰: the clouds are rounded to that before they are moved."""
    x, y, a, b = problem(dtype=dtype)
    x, y = ((cloud * 1024).round() / 1024 for cloud in (x, y))
    plain = otgen.solve_sample(x, y, a, b, reg=0.02, unbalanced=unbalanced, debias=debias)
    result = otgen.solve_sample(x + 1e4, y + 1e4, a, b, reg=0.02, unbalanced=unbalanced, debias=debias)
    assert result.converged
    assert float(result.value) == pytest.approx(float(plain.value), rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_one_point_needs_no_stages():
    """Whatever reg: the plan of one point is known after two half-steps."""
    x, y, _, _ = problem()
    for one, other in ((x[:1], y), (x, y[:1])):
        assert otgen.solve_sample(one, other, reg=1e-6).passes <= 7
