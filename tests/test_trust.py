"""Truncated conjugate gradients against dense algebra and their theorems; the inverse Hessian against dense inverses."""

from __future__ import annotations

import re
from itertools import pairwise

import clouds
import pytest
import torch

import otgen
from otgen.errors import ConvergenceWarning, InputError
from otgen.solvers import curvature
from otgen.solvers.trust import Step, inverse_hvp, steihaug

pytestmark = pytest.mark.usefixtures("streamed")

DEFINITE = (0.3, 0.5, 1.0, 2.0, 3.0, 5.0)
INDEFINITE = (-2.0, -0.1, 0.5, 1.0, 3.0, 5.0)
TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def quadratic(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues, and a gradient, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.T
    return (matrix + matrix.T) / 2, torch.randn(size, generator=generator, dtype=torch.float64)


def decrease(matrix, g, s):
    return -float(g @ s + 0.5 * s @ matrix @ s)


def best_decrease(matrix, g, radius):
    """By how much the model can be lowered at most where the minimum is on the boundary: (H + λ) s = −g with |s| = radius."""
    values, basis = torch.linalg.eigh(matrix)
    low = max(0.0, -float(values[0]))
    high = low + float(g.norm()) / radius
    for _ in range(200):
        middle = (low + high) / 2
        s = -basis @ ((basis.T @ g) / (values + middle))
        low, high = (middle, high) if s.norm() > radius else (low, middle)
    return decrease(matrix, g, s)


def cauchy_decrease(matrix, g, radius):
    """That of the best step along −g."""
    curvature, length = float(g @ matrix @ g), float(g.norm())
    share = radius / length if curvature <= 0 else min(radius / length, length**2 / curvature)
    return decrease(matrix, g, -share * g)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("radius", [3.0, 1e6])
def test_a_bowl_is_solved_inside_the_radius(dtype, radius):
    matrix, g = quadratic(DEFINITE)
    g, low = 0.1 * g, matrix.to(dtype)
    exact = -torch.linalg.solve(matrix, g)
    found = steihaug(lambda p: low @ p, g.to(dtype), radius, tol=1e-13 if dtype == torch.float64 else 1e-6)
    assert found.ended == "tol"
    assert found.iterations <= len(g) + 2
    assert found.step.dtype == dtype
    torch.testing.assert_close(found.step.double(), exact, **TOLERANCES[dtype])
    assert found.predicted == pytest.approx(decrease(matrix, g, exact), rel=TOLERANCES[dtype]["rtol"])


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-6])
def test_the_residual_is_the_one_asked_for(tol):
    matrix, g = quadratic(DEFINITE)
    found = steihaug(lambda p: matrix @ p, g, 1e3, tol=tol)
    assert found.ended == "tol"
    assert (matrix @ found.step + g).norm() <= 1.0001 * tol * g.norm()
    if found.iterations > 1:
        before = steihaug(lambda p: matrix @ p, g, 1e3, tol=0, max_iter=found.iterations - 1)
        assert (matrix @ before.step + g).norm() > tol * g.norm()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_out_of_a_bowl_ends_on_the_boundary_with_half_of_what_can_be_had(dtype, share, seed):
    """At least half: Yuan 2000."""
    matrix, g = quadratic(DEFINITE, seed)
    low, radius = matrix.to(dtype), share * float(torch.linalg.solve(matrix, g).norm())
    found = steihaug(lambda p: low @ p, g.to(dtype), radius, tol=1e-6)
    s, best = found.step.double(), best_decrease(matrix, g, radius)
    assert found.ended == "boundary"
    assert float(s.norm()) == pytest.approx(radius, rel=TOLERANCES[dtype]["rtol"])
    assert found.predicted == pytest.approx(decrease(matrix, g, s), rel=1e-5)
    assert max(0.5 * best, cauchy_decrease(matrix, g, radius)) <= found.predicted * (1 + 1e-5) <= best * (1 + 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("radius", [2.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_negative_curvature_is_followed_to_the_boundary(dtype, radius, seed):
    matrix, g = quadratic(INDEFINITE, seed)
    low = matrix.to(dtype)
    ways = []

    def product(p):
        ways.append(p.double())
        return low @ p

    found = steihaug(product, g.to(dtype), radius, tol=1e-6)
    s = found.step.double()
    assert found.ended in (("negative curvature",) if radius == 20.0 else ("negative curvature", "boundary"))
    assert len(ways) == found.iterations
    bends = [float(p @ matrix @ p) for p in ways]
    assert all(bend > 0 for bend in bends[:-1])
    assert (bends[-1] <= 0) == (found.ended == "negative curvature")
    assert float(s.norm()) == pytest.approx(radius, rel=TOLERANCES[dtype]["rtol"])
    assert float(g @ s) < 0
    assert found.predicted == pytest.approx(decrease(matrix, g, s), rel=1e-5)
    assert cauchy_decrease(matrix, g, radius) <= found.predicted * (1 + 1e-5) <= best_decrease(matrix, g, radius) * (1 + 2e-5)


@pytest.mark.parametrize(("curvature", "predicted"), [(-1.0, 0.7 * 5.0 + 0.7**2 / 2), (0.0, 0.7 * 5.0)])
def test_without_any_positive_curvature_the_step_is_steepest_descent(curvature, predicted):
    g = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = steihaug(lambda p: curvature * p, g, 0.7)
    assert (found.ended, found.iterations) == ("negative curvature", 1)
    torch.testing.assert_close(found.step, -0.7 * g / 5.0)
    assert found.predicted == pytest.approx(predicted)


def test_without_a_gradient_nothing_moves():
    def product(p):
        raise AssertionError("no product is needed")

    found = steihaug(product, torch.zeros(2, 3), 1.0)
    assert (found.predicted, found.iterations, found.ended) == (0.0, 0, "tol")
    assert torch.equal(found.step, torch.zeros(2, 3))


@pytest.mark.parametrize(("least", "last"), [(0.3, "max_iter"), (-0.2, "negative curvature")])
def test_each_iteration_lengthens_the_step_and_lowers_the_model(least, last):
    """Steihaug 1983, theorem 2.1."""
    matrix, g = quadratic((least, *DEFINITE[1:]), seed=2)
    steps = [steihaug(lambda p: matrix @ p, g, 200.0, tol=0, max_iter=k) for k in range(1, 6)]
    assert [step.iterations for step in steps] == [1, 2, 3, 4, 5]
    assert [step.ended for step in steps] == ["max_iter"] * 4 + [last]
    for one, other in pairwise(steps):
        assert other.step.norm() > one.step.norm()
        assert other.predicted > one.predicted > 0


@pytest.mark.parametrize("shape", [(6,), (3, 2), (1, 2, 3, 1)])
@pytest.mark.parametrize("eigenvalues", [DEFINITE, INDEFINITE])
def test_any_shape_will_do(shape, eigenvalues):
    matrix, g = quadratic(eigenvalues)
    flat = steihaug(lambda p: matrix @ p, g, 1.5)
    shaped = steihaug(lambda p: (matrix @ p.flatten()).reshape(shape), g.reshape(shape), 1.5)
    assert shaped.step.shape == shape
    assert (shaped.predicted, shaped.iterations, shaped.ended) == (flat.predicted, flat.iterations, flat.ended)
    assert torch.equal(shaped.step.flatten(), flat.step)


def test_a_number_is_a_shape_too():
    found = steihaug(lambda p: 4.0 * p, torch.tensor(-2.0, dtype=torch.float64), 1.0)
    assert (float(found.step), found.predicted, found.iterations) == (0.5, 0.5, 1)


@pytest.mark.parametrize("eigenvalues", [DEFINITE, INDEFINITE])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_units_do_not_matter(eigenvalues, size):
    matrix, g = quadratic(eigenvalues)
    one, other = (steihaug(lambda p: matrix @ p, by * g, by * 1.5) for by in (1.0, size))
    torch.testing.assert_close(other.step / size, one.step)
    assert other.predicted / size**2 == pytest.approx(one.predicted)


def test_products_may_come_from_autograd_and_leave_no_graph():
    x = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad((x**4).sum() / 12, x, create_graph=True)
    found = steihaug(lambda p: torch.autograd.grad(g, x, p, create_graph=True)[0], g, 10.0, tol=1e-12)
    assert not found.step.requires_grad
    torch.testing.assert_close(found.step, -x.detach() / 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gradient": torch.tensor([1.0, torch.nan])}, "finite gradient"),
        ({"gradient": torch.ones(2).half()}, "float64 or float32"),
        ({"radius": 0.0}, "radius"),
        ({"radius": torch.inf}, "radius"),
        ({"tol": -1.0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
        ({"product": lambda p: torch.inf * p}, "finite product"),
        ({"product": lambda p: p[:1]}, re.escape("shape (2,); got (1,)")),
    ],
)
def test_what_makes_no_step_is_refused(change, sentence):
    given = {"product": lambda p: p, "gradient": torch.ones(2), "radius": 1.0, **change}
    with pytest.raises(InputError, match=sentence):
        steihaug(**given)


def solved(dtype=torch.float64, **options):
    """A small problem, its dense Hessian (36, 36) in float64, and a direction (12, 3)."""
    x, y, a, b = clouds.problem(12, 10, 3, dtype=dtype)
    result = otgen.solve_sample(x, y, a, b, **{"reg": 1.0, "tol": 1e-10 if dtype == torch.float64 else 1e-6, **options})
    hessian = result.hvp(torch.eye(36, dtype=dtype).reshape(36, 12, 3)).reshape(36, 36).double()
    v = torch.randn(12, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    return result, (hessian + hessian.T) / 2, v


def dense(hessian, v, damping=0.0):
    whole = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
    return torch.linalg.solve(whole, v.double().flatten()).reshape(v.shape)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 2e-3)])
@pytest.mark.parametrize("options", [{}, {"unbalanced": 2.0}, {"debias": True}, {"reg": 0.2}, {"reg": 0.2, "debias": True}])
@pytest.mark.parametrize("damped", [False, True])
def test_the_inverse_is_the_dense_one(dtype, rtol, options, damped):
    result, hessian, v = solved(dtype, **options)
    least = float(torch.linalg.eigvalsh(hessian)[0])
    if not damped and least < 1e-4:
        with pytest.raises(InputError, match="positive definite"):
            result.inverse_hvp(v)
        return
    damping = 1.5 * abs(least) if damped else 0.0
    found, log = result.inverse_hvp(v, damping=damping, log=True)
    wanted = dense(hessian, v, damping)
    assert found.dtype == dtype
    assert float((found - wanted).norm() / wanted.norm()) < rtol
    assert log["iterations"] < log["passes"]
    assert log["residual"] <= (2e-8 if dtype == torch.float64 else 2e-4)


def test_both_kinds_of_hessian_are_met_above():
    least = [float(torch.linalg.eigvalsh(solved(**options)[1])[0]) for options in ({}, {"reg": 0.2})]
    assert least[0] > 1e-3
    assert least[1] < -1e-3


def test_it_undoes_hvp():
    result, _, v = solved(unbalanced=2.0)
    torch.testing.assert_close(inverse_hvp(result, result.hvp(v)), v, rtol=1e-6, atol=1e-6)


def test_an_indefinite_hessian_is_said_to_be_so_with_what_to_type():
    result, hessian, v = solved(reg=0.2)
    least = float(torch.linalg.eigvalsh(hessian)[0])
    damping = 0.0
    for _ in range(20):
        try:
            found = result.inverse_hvp(v, damping=damping)
            break
        except InputError as error:
            curvature, wanted = (float(part) for part in re.findall(r"curvature (\S+); type damping=(\S+),", str(error))[0])
            assert least + damping <= curvature <= 0.0
            assert wanted > damping - curvature
            damping = wanted
    torch.testing.assert_close(found, dense(hessian, v, damping), rtol=1e-6, atol=1e-6)


def test_negative_curvature_that_v_has_no_share_of_is_not_met():
    """The preconditioner is a number where all points weigh the same."""
    x, y, _, _ = clouds.problem(12, 10, 3)
    result = otgen.solve_sample(x, y, reg=0.2, tol=1e-12)
    hessian = result.hvp(torch.eye(36, dtype=torch.float64).reshape(36, 12, 3)).reshape(36, 36)
    values, basis = torch.linalg.eigh((hessian + hessian.T) / 2)
    low, high = basis[:, 0].reshape(12, 3), basis[:, -1].reshape(12, 3)
    torch.testing.assert_close(result.inverse_hvp(high, tol=1e-6), high / values[-1], rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="positive definite"):
        result.inverse_hvp(high + 0.1 * low, tol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_system_left_unsolved_is_a_warning_with_its_residual(damping):
    result, hessian, v = solved(unbalanced=2.0)
    with pytest.warns(ConvergenceWarning, match="after 2 iterations"):
        found, log = result.inverse_hvp(v, damping=damping, max_iter=2, log=True)
    weight = 2 * result.marginal_a[:, None] + damping
    left = v - (hessian @ found.flatten()).reshape(12, 3) - damping * found
    assert log["iterations"] == 2
    assert log["residual"] == pytest.approx(float(((left**2 / weight).sum() / (v**2 / weight).sum()).sqrt()), rel=1e-5)


def test_sweeps_of_all_products_are_counted(monkeypatch):
    result, _, v = solved()
    products, hvp = [], curvature.hvp

    def counted(*args, **options):
        products.append(hvp(*args, **options))
        return products[-1]

    monkeypatch.setattr(curvature, "hvp", counted)
    _, log = result.inverse_hvp(v, log=True)
    assert len(products) == log["iterations"] + 1
    assert log["passes"] == sum(product.passes for product in products)


def test_numpy_and_points_without_weight():
    x, y, a, b = clouds.problem(12, 10, 3)
    a[3] = 0.0
    a /= a.sum()
    x, y, a, b = (tensor.numpy() for tensor in (x, y, a, b))
    result = otgen.solve_sample(x, y, a, b, reg=1.0, tol=1e-10)
    hessian = torch.from_numpy(result.hvp(torch.eye(36, dtype=torch.float64).reshape(36, 12, 3).numpy())).reshape(36, 36)
    v = x - 0.3
    with pytest.raises(InputError, match="zero weight"):
        result.inverse_hvp(v)
    found = result.inverse_hvp(v, damping=0.1)
    assert type(found) is type(x)
    torch.testing.assert_close(torch.from_numpy(found), dense(hessian, torch.from_numpy(v), 0.1), rtol=1e-6, atol=1e-6)
    v[3] = 0.0
    found = torch.from_numpy(result.inverse_hvp(v))
    assert bool((found[3] == 0).all())
    torch.testing.assert_close((hessian @ found.flatten()).reshape(12, 3), torch.from_numpy(v), rtol=1e-6, atol=1e-6)


def test_a_direction_of_zeros_has_a_product_of_zeros():
    result, _, v = solved(unbalanced=2.0)
    assert torch.equal(result.inverse_hvp(0.0 * v), torch.zeros_like(v))


@pytest.mark.parametrize(
    ("v", "options", "sentence"),
    [
        (torch.ones(12, 2, dtype=torch.float64), {}, "v of shape"),
        (torch.full((12, 3), torch.nan, dtype=torch.float64), {}, "finite v"),
        (torch.ones(12, 3, dtype=torch.float64), {"damping": -0.1}, "damping"),
        (torch.ones(12, 3, dtype=torch.float64), {"tol": -0.1}, "tol"),
        (torch.ones(12, 3, dtype=torch.float64), {"max_iter": 0}, "max_iter"),
    ],
)
def test_what_cannot_be_inverted_is_refused(v, options, sentence):
    with pytest.raises(InputError, match=sentence):
        solved()[0].inverse_hvp(v, **options)


def test_newton_with_the_step_solves_rosenbrock():
    """Indefinite on the way from here, at (1, 1) at the end."""

    def function(z):
        return (1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2

    z, radius, ends = torch.tensor([0.0, 2.0], dtype=torch.float64), 1.0, set()
    for _ in range(60):
        at = z.clone().requires_grad_()
        value = function(at)
        (g,) = torch.autograd.grad(value, at, create_graph=True)
        if g.norm() < 1e-10:
            break
        step: Step = steihaug(lambda p, g=g, at=at: torch.autograd.grad(g, at, p, retain_graph=True)[0], g, radius, tol=1e-10)
        ratio = float(value.detach() - function(z + step.step)) / step.predicted
        radius = 0.25 * float(step.step.norm()) if ratio < 0.25 else 2.0 * radius if ratio > 0.75 else radius
        z = z + step.step if ratio > 0 else z
        ends.add(step.ended)
    torch.testing.assert_close(z, torch.ones(2, dtype=torch.float64))
    assert ends >= {"tol", "negative curvature"}
