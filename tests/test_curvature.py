"""Second derivatives of a value in the points: finite differences, theorems, counted sweeps, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clouds import LABEL_COST, mean_cost, normal, problem, uneven

import otgen
from otgen import ops
from otgen.errors import ConvergenceWarning, InputError, UsageError
from otgen.solvers import curvature, second
from otgen.solvers.conjugate import told
from otgen.solvers.solution import Divergence

RELAXED = [None, 0.5, (0.5, None), (0.3, 2.0)]
pytestmark = pytest.mark.usefixtures("streamed")


def case(n, m, unbalanced=None, debias=False, labels=False):
    """Clouds with random weights, of masses 1.7 and 0.6 when relaxed, and the options of an exact solve."""
    clouds = (problem if unbalanced is None else uneven)(n, m, 2)
    options = {"reg": 0.4, "unbalanced": unbalanced, "debias": debias, "tol": 1e-12}
    if labels:
        options |= {"labels_a": torch.arange(n) % 3, "labels_b": (torch.arange(m) + 1) % 3, "label_cost": LABEL_COST}
    return *clouds, options


def gradients(x, y, a, b, options):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    return torch.autograd.grad(otgen.solve_sample(x, y, a, b, **options).value, (x, y))


def differences(function, h=1e-3):
    """The derivatives at 0 of a function of a number, central differences of the fourth order."""
    ends = [function(t * h) for t in (1, -1, 2, -2)]
    return [(8 * (one - two) - (three - four)) / (12 * h) for one, two, three, four in zip(*ends)]


def assert_close(found, expected, share):
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


def inner(one, other):
    return sum(float((p * q).sum()) for p, q in zip(one, other))


# Right


@pytest.mark.parametrize("labels", [False, True], ids=["plain", "labels"])
@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("unbalanced", RELAXED)
def test_products_are_finite_differences_of_the_gradients(unbalanced, debias, labels):
    for n, m in ((6, 8), (8, 5)):
        x, y, a, b, options = case(n, m, unbalanced, debias, labels)
        result = otgen.solve_sample(x, y, a, b, **options)
        for size_a, size_b in ((1.0, 0.0), (0.0, 1.0)):
            way_a, way_b = size_a * normal(n, 2), size_b * normal(m, 2, seed=1)
            expected = differences(lambda t: gradients(x + t * way_a, y + t * way_b, a, b, options))  # noqa: B023
            for found, moved in zip(result.hvp(way_a, way_b), expected):
                assert_close(found, moved, 1e-7)


@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("unbalanced", RELAXED)
def test_a_side_that_is_none_rests(unbalanced, debias):
    x, y, a, b, options = case(7, 6, unbalanced, debias, labels=True)
    result = otgen.solve_sample(x, y, a, b, **options)
    way_a, way_b = normal(7, 2), normal(6, 2, seed=1)
    both = result.hvp(way_a, way_b)
    along_a, along_b = result.hvp(way_a, torch.zeros_like(way_b)), result.hvp(None, way_b)
    assert_close(result.hvp(way_a), along_a[0], 1e-9)
    for whole, one, other in zip(both, along_a, along_b):
        assert_close(one + other, whole, 1e-9)


@pytest.mark.parametrize(
    ("unbalanced", "debias", "labels"), [(None, False, False), (None, True, True), ((0.5, None), True, False), (0.5, False, True)]
)
def test_double_backward_is_the_product(unbalanced, debias, labels):
    x, y, a, b, options = case(6, 8, unbalanced, debias, labels)
    x.requires_grad_()
    y.requires_grad_()
    result = otgen.solve_sample(x, y, a, b, **options)
    slopes = torch.autograd.grad(3.0 * result.value, (x, y), create_graph=True)
    ways = normal(6, 2), normal(8, 2, seed=1)
    found = torch.autograd.grad(slopes, (x, y), ways, retain_graph=True)
    for part, expected in zip(found, result.hvp(*ways)):
        assert_close(part, 3.0 * expected, 1e-9)
    (mixed,) = torch.autograd.grad(slopes[0], y, ways[0])
    assert_close(mixed, 3.0 * result.hvp(ways[0], torch.zeros_like(y.detach()))[1], 1e-9)


def test_gradgradcheck():
    x, y, a, b, options = case(3, 4)

    def value(x, y, factor):
        return factor**2 * otgen.solve_sample(x, y, a, b, **options).value

    inputs = x.requires_grad_(), y.requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(value, inputs, atol=1e-6)


def test_a_loss_composed_of_values():
    x, y, a, b, options = case(6, 8, debias=True)
    z, way = normal(5, 2, seed=3), normal(6, 2)

    def slope(x):
        one, other = otgen.solve_sample(x, y, a, b, **options).value, otgen.solve_sample(z, x, reg=0.3, tol=1e-12).value
        return torch.autograd.grad(one**2 + other * one.exp(), x, create_graph=True)

    (expected,) = differences(lambda t: [part.detach() for part in slope((x + t * way).requires_grad_())])
    x.requires_grad_()
    (found,) = torch.autograd.grad(slope(x), x, way)
    assert_close(found, expected, 1e-7)


def test_torch_functional_products_and_hessian():
    x, y, a, b, options = case(4, 5, unbalanced=0.5)
    result, ways = otgen.solve_sample(x, y, a, b, **options), (normal(4, 2), normal(5, 2, seed=1))

    def value(x, y):
        return otgen.solve_sample(x, y, a, b, **options).value

    for found in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        for part, expected in zip(found(value, (x, y), ways)[1], result.hvp(*ways)):
            assert_close(part, expected, 1e-9)
    hessian = torch.autograd.functional.hessian(value, (x, y))
    for row, expected in zip(hessian, result.hvp(*ways)):
        assert_close(sum(torch.tensordot(block, way, 2) for block, way in zip(row, ways)), expected, 1e-9)


def test_a_factor_that_is_differentiated_too():
    """V = exp(t)·OT: derivatives pass through the derivative that comes in, and products are linear in all that does."""
    x, y, a, b, options = case(4, 5)
    result, way, turn = otgen.solve_sample(x, y, a, b, **options), normal(4, 2), torch.tensor(0.7, dtype=x.dtype)
    (slope,) = torch.autograd.grad(otgen.solve_sample(x.requires_grad_(), y, a, b, **options).value, x)
    x, t = x.detach(), torch.tensor(0.3, dtype=x.dtype)

    def value(x, t):
        return t.exp() * otgen.solve_sample(x, y, a, b, **options).value

    for found in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        in_x, in_t = found(value, (x, t), (way, turn))[1]
        assert_close(in_x, t.exp() * (result.hvp(way) + turn * slope), 1e-9)
        assert_close(in_t, t.exp() * ((slope * way).sum() + turn * result.value), 1e-9)
    leaves = x.requires_grad_(), t.requires_grad_()
    (first,) = torch.autograd.grad(value(*leaves), x, create_graph=True)
    (along,) = torch.autograd.grad(first, x, way, create_graph=True)
    (in_t,) = torch.autograd.grad(along.sum(), t)
    assert_close(in_t, t.detach().exp() * result.hvp(way).sum(), 1e-9)


def test_the_loss_module_to_a_tolerance_is_twice_differentiable():
    x, y, a, b, _ = case(6, 7)
    loss, way = otgen.SamplesLoss(blur=0.5, tol=1e-12), normal(6, 2)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(loss(a, x, b, y), x, create_graph=True)
    (found,) = torch.autograd.grad(slope, x, way)
    assert_close(found, 0.5 * otgen.solve_sample(x, y, a, b, reg=0.5, debias=True, tol=1e-12).hvp(way), 1e-9)


@pytest.mark.parametrize("unbalanced", [None, 0.5])
def test_whoever_solved_it(unbalanced):
    """Every method, and a problem out of a batch."""
    x, y, a, b, options = case(6, 6, unbalanced, debias=True)
    ways = normal(6, 2), normal(6, 2, seed=1)
    exact = otgen.solve_sample(x, y, a, b, **options).hvp(*ways)
    others = [otgen.solve_sample(x, y, a, b, method=name, **options) for name in ("alternating", "symmetric", "newton")]
    both = [torch.stack((part, part)) for part in (x, y, a, b)]
    for result in (*others, otgen.solve_sample_batch(*both, **options)[1]):
        for part, expected in zip(result.hvp(*ways), exact):
            assert_close(part, expected, 1e-8)


# Theorems


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("unbalanced", RELAXED)
@pytest.mark.parametrize("tol", [1e-2, 1e-12])
def test_the_hessian_is_symmetric_wherever_the_solve_stopped(tol, unbalanced, debias):
    x, y, a, b, options = case(9, 7, unbalanced, debias, labels=True)
    result = otgen.solve_sample(x, y, a, b, **options | {"tol": tol})
    one, other = ((normal(9, 2, seed=k), normal(7, 2, seed=k + 1)) for k in (1, 3))
    assert inner(one, result.hvp(*other)) == pytest.approx(inner(other, result.hvp(*one)), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_homogeneous_in_the_direction(dtype):
    x, y, a, b, _ = case(9, 7)
    result = otgen.solve_sample(*(t.to(dtype) for t in (x, y, a, b)), reg=0.4, debias=True, tol=1e-5)
    ways = normal(9, 2, dtype=dtype), normal(7, 2, seed=1, dtype=dtype)
    whole = result.hvp(*ways)
    for size in (1e-8, 1e-3, 1e8):
        for part, expected in zip(result.hvp(*(size * way for way in ways)), whole):
            assert_close(part / size, expected, 1e-8 if dtype == torch.float64 else 2e-5)
    assert not result.hvp(torch.zeros_like(ways[0])).any()


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("n", "m"), [(9, 12), (300, 200)])
def test_a_translation_changes_no_plan(n, m, dtype, share):
    """(H A)_i = 2 r_i t, whatever the clouds and however well they were solved, and −2(P t) in y; debiased, no force at all."""
    x, y, a, b = problem(n, m, 3, dtype=dtype)
    result = otgen.solve_sample(x, y, a, b, reg=0.1)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    in_x, in_y = result.hvp(shift.expand(n, 3), torch.zeros_like(y))
    assert_close(in_x, 2.0 * result.marginal_a[:, None] * shift, share)
    assert_close(in_y, -2.0 * result.marginal_b[:, None] * shift, share)
    together = otgen.solve_sample(x, y, a, b, reg=0.1, debias=True).hvp(shift.expand(n, 3), shift.expand(m, 3))
    assert max(float(part.abs().max()) for part in together) <= share * float(in_x.abs().max())


def test_a_translation_of_ten_thousand_points():
    x, y, a, b = problem(10_000, 10_000, 3, dtype=torch.float32)
    result = otgen.solve_sample(x, y, a, b, reg=0.2, tol=1e-2)
    shift = torch.tensor([1.0, -2.0, 0.5])
    assert_close(result.hvp(shift.expand(10_000, 3), tol=1e-4), 2.0 * result.marginal_a[:, None] * shift, 1e-4)


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
@pytest.mark.parametrize(("n", "m"), [(17, 33), (33, 17)])
def test_a_translation_through_interpreted_kernels(monkeypatch, n, m):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, y, a, b = problem(n, m, 3, dtype=torch.float32)
    result = otgen.solve_sample(x, y, a, b, reg=0.2, precision="fp32")
    shift = torch.tensor([1.0, -2.0, 0.5])
    assert result.variant is not None
    assert_close(result.hvp(shift.expand(n, 3)), 2.0 * result.marginal_a[:, None] * shift, 1e-4)


@pytest.mark.parametrize("unbalanced", [None, 0.5, (0.5, None)])
@pytest.mark.parametrize("debias", [False, True])
def test_points_without_weight_have_no_second_derivative(unbalanced, debias):
    x, y, a, b, options = case(9, 8, unbalanced, debias)
    a[2:4], b[5] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    ways = normal(9, 2), normal(8, 2, seed=1)
    keep_a, keep_b = a > 0, b > 0
    alone = otgen.solve_sample(x[keep_a], y[keep_b], a[keep_a], b[keep_b], **options).hvp(ways[0][keep_a], ways[1][keep_b])
    for lost in (1e6, torch.nan):
        ways[0][~keep_a] = ways[1][~keep_b] = lost
        in_x, in_y = otgen.solve_sample(x, y, a, b, **options).hvp(*ways)
        assert torch.equal(in_x[~keep_a], torch.zeros(2, 2, dtype=x.dtype))
        assert torch.equal(in_y[~keep_b], torch.zeros(1, 2, dtype=x.dtype))
        assert_close(in_x[keep_a], alone[0], 1e-8)
        assert_close(in_y[keep_b], alone[1], 1e-8)


@pytest.mark.parametrize("rho", [1e3, 1e8])
def test_a_large_price_of_the_marginals_is_no_problem_in_float32(rho):
    """Constants are then nearly in the null space, and their share a difference of nearly equal numbers."""
    x, y, a, b, _ = case(12, 9)
    ways = normal(12, 2), normal(9, 2, seed=1)
    exact = otgen.solve_sample(x, y, a, b, reg=0.1, unbalanced=rho, tol=1e-11).hvp(*ways)
    single = otgen.solve_sample(*(t.float() for t in (x, y, a, b)), reg=0.1, unbalanced=rho, tol=1e-6)
    for part, expected in zip(single.hvp(*(way.float() for way in ways)), exact):
        assert_close(part.double(), expected, 1e-4)


def test_clouds_that_fall_into_pairs_and_single_points():
    """reg so small that the plan is a matching: nothing couples the points, H A = 2 A/n, and there is no system to solve."""
    x = 10.0 * problem(8, 8, 2)[0]
    result = otgen.solve_sample(x, x[torch.arange(8) ^ 1] + 1e-3, reg=1e-2)
    way = normal(8, 2)
    assert_close(result.hvp(way), way / 4, 1e-12)
    for n, m in ((1, 1), (1, 3), (3, 1)):
        way = normal(n, 1)
        found = otgen.solve_sample(normal(n, 1), normal(m, 1), reg=0.3).hvp(way)
        if n == 1:
            assert_close(found, 2.0 * way, 1e-12)
        assert found.isfinite().all()


# Cost


@pytest.mark.parametrize(("n", "m"), [(60, 45), (45, 60)])
def test_conjugate_gradients_and_their_sweeps(n, m, sweeps):
    """At most 20 iterations with uneven weights at a tenth of the mean cost, and 2K + 3 sweeps in all."""
    x, y, a, b = problem(n, m, 3)
    result = otgen.solve_sample(x, y, a, b, reg=0.1 * mean_cost(x, y), tol=1e-9)
    for ways, extra in (((normal(n, 3),), 3), ((normal(n, 3), torch.zeros_like(y)), 4), ((None, normal(m, 3)), 4)):
        sweeps.clear()
        _, log = result.hvp(*ways, log=True)
        assert 1 <= log["iterations"] <= 20
        assert log["residual"] <= 1e-10
        assert log["passes"] == 2 * log["iterations"] + extra == sum(sweeps.values())
        assert sweeps["hvp_matvec"] == 2 * log["iterations"]
    way = normal(n, 3)
    assert result.hvp(way, tol=1e-2, log=True)[1]["iterations"] < result.hvp(way, log=True)[1]["iterations"]


def test_an_own_problem_takes_one_sweep_an_iteration(sweeps):
    x, y, a, b = problem(20, 15, 3)
    cross, both = (otgen.solve_sample(x, y, a, b, reg=0.1, debias=debias, tol=1e-9) for debias in (False, True))
    _, plain = cross.hvp(normal(20, 3), log=True)
    sweeps.clear()
    _, debiased = both.hvp(normal(20, 3), log=True)
    assert debiased["passes"] == sum(sweeps.values())
    own = sweeps["hvp_matvec"] - 2 * plain["iterations"]
    assert debiased["passes"] == plain["passes"] + own + 2
    assert 1 <= own <= 40


@pytest.mark.parametrize("unbalanced", [None, 0.5, (0.5, None), (0.3, 2.0)])
@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
def test_several_directions_share_their_sweeps(unbalanced, debias, sweeps):
    x, y, a, b, options = case(6, 5, unbalanced, debias)
    result = otgen.solve_sample(x, y, a, b, **options)
    ways, others = normal(3, 6, 2), normal(3, 5, 2, seed=1)
    ways[1] *= 1e6
    others[1] = 0.0
    ways[2], others[2] = 0.0, 0.0
    alone = [result.hvp(way, other) for way, other in zip(ways, others)]
    sweeps.clear()
    found, log = result.hvp(ways, others, log=True)
    for side in (0, 1):
        for part, expected in zip(found[side], alone):
            assert_close(part, expected[side], 1e-8)
    assert log["passes"] == sum(sweeps.values())
    if not debias:
        assert log["passes"] == 2 * log["iterations"] + 2 + 2 * 3


def test_numpy_and_half_precision():
    x, y, a, b, options = case(6, 5)
    whole = otgen.solve_sample(x, y, a, b, **options).hvp(normal(6, 2))
    found = otgen.solve_sample(*(t.numpy() for t in (x, y, a, b)), **options).hvp(normal(6, 2).numpy())
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, whole.numpy())
    half = otgen.solve_sample(x.bfloat16(), y.bfloat16(), reg=0.4).hvp(normal(6, 2).bfloat16())
    exact = otgen.solve_sample(x.bfloat16().double(), y.bfloat16().double(), reg=0.4).hvp(normal(6, 2).bfloat16().double())
    assert half.dtype == torch.float32
    assert_close(half.double(), exact, 1e-4)


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
@pytest.mark.parametrize("mixed", [False, True], ids=["x", "mixed"])
def test_interpreted_kernels(monkeypatch, mixed):
    x, y, a, b, _ = case(10, 7)
    ways = (normal(10, 2), normal(7, 2, seed=1)) if mixed else (normal(10, 2),)
    exact = otgen.solve_sample(x, y, a, b, reg=0.4, debias=mixed, tol=1e-10).hvp(*ways)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = otgen.solve_sample(*(t.float() for t in (x, y, a, b)), reg=0.4, debias=mixed, tol=1e-4)
    assert result.variant is not None
    found = result.hvp(*(way.float() for way in ways))
    for part, expected in zip(*((found, exact) if mixed else ((found,), (exact,)))):
        assert_close(part.double(), expected, 1e-3)


def test_products_are_taken_in_full_precision(monkeypatch):
    """The value survives tf32, its second derivatives do not: sweeps take those of the admissible modes that round as fp32 does."""
    seen = []
    launch = ops.hvp_matvec
    monkeypatch.setattr(ops, "hvp_matvec", lambda *given, **options: seen.append(options["modes"]) or launch(*given, **options))
    x, y, a, b, _ = case(6, 5)
    result = otgen.solve_sample(x, y, a, b, reg=0.4)
    for modes, taken in ((("tf32", "bf16"), ("ieee",)), (("ieee", "tf32x3", "bf16x3", "tf32"), ("ieee", "tf32x3"))):
        cross = replace(result._divergence.cross, steps=replace(result._divergence.cross.steps, modes=modes))
        curvature.hvp(Divergence(cross), normal(6, 2), None)
        assert seen
        assert set(seen) == {taken}
        seen.clear()


# Refused


def test_what_is_refused_rather_than_wrong():
    x, y, a, b, options = case(5, 6)
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    value = otgen.solve_sample(*leaves, **options).value
    in_x, _, in_a, _ = torch.autograd.grad(value, leaves, create_graph=True)
    (twice,) = torch.autograd.grad(in_x.square().sum(), x, create_graph=True)
    (mixed,) = torch.autograd.grad(in_x.square().sum(), a, create_graph=True)
    (of_weights,) = torch.autograd.grad(in_a.square().sum(), x, create_graph=True)

    def refused(match, output, *inputs):
        with pytest.raises(NotImplementedError, match=match):
            torch.autograd.grad(output.sum(), inputs, retain_graph=True)

    for leaf in (x, y, a):
        refused("two derivatives", twice, leaf)
        refused("two derivatives", mixed, leaf)
        refused("one derivative of an implicit answer", of_weights, leaf)


def test_schedules_are_refused():
    x, y, _, _, _ = case(5, 5)
    x.requires_grad_()
    for value in (otgen.SamplesLoss()(x, y), otgen.SamplesLoss()(x[None], y[None]).sum()):
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(NotImplementedError, match="one derivative"):
            slope.sum().backward()


def test_directions_that_do_not_fit():
    x, y, a, b, _ = case(5, 6)
    result, way = otgen.solve_sample(x, y, a, b, reg=0.4), normal(5, 2)
    for bad, match in (
        (way[:4], r"shape \(5, 2\)"),
        (way.numpy(), "torch tensor"),
        (way.half(), "dtype"),
        ([[1.0]], "torch tensor"),
    ):
        with pytest.raises(InputError, match=match):
            result.hvp(bad)
    with pytest.raises(InputError, match="finite direction v_b"):
        result.hvp(way, torch.full((6, 2), torch.nan, dtype=way.dtype))
    with pytest.raises(InputError, match="as many directions"):
        result.hvp(way.expand(3, 5, 2), normal(2, 6, 2))
    with pytest.raises(InputError, match="tol"):
        result.hvp(way, tol=-1.0)
    with pytest.raises(UsageError, match="expected a direction"):
        result.hvp(None)


def test_a_system_left_unsolved_is_told():
    x, y, a, b, options = case(9, 7)
    result = otgen.solve_sample(x, y, a, b, **options)
    product = curvature.hvp(result._divergence, normal(9, 2), None, max_iter=1)
    assert (product.met, product.iterations, product.residual > 1e-10) == (False, 1, True)
    with pytest.warns(ConvergenceWarning, match="after 1 iterations"):
        told(second.PRODUCT, product)
