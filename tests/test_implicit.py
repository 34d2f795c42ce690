"""grad="implicit": answers as functions of the exact solution, and second derivatives of the value that meet weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from clouds import LABEL_COST, batch, normal, problem

import otgen
from otgen.errors import ConvergenceWarning, Unsupported
from otgen.solvers.conjugate import told
from otgen.solvers.implicit import pullback

RELAXED = [None, 0.5, (0.5, None), (0.3, 2.0)]
pytestmark = pytest.mark.usefixtures("streamed")


def case(n=6, m=8, unbalanced=None, *, debias=False, labels=False, empty=False):
    """(x, y, a, b) and the options of an exact solve; `empty`: a point on either side has no weight."""
    x, y, a, b = problem(n, m, 2)
    a, b = a + 0.05, b + 0.05
    if empty:
        a[2], b[4] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    if unbalanced is not None:
        a, b = 1.7 * a, 0.6 * b
    options = {"reg": 0.4, "unbalanced": unbalanced, "debias": debias, "tol": 1e-13, "grad": "implicit"}
    if labels:
        options |= {"labels_a": torch.arange(n) % 3, "labels_b": (torch.arange(m) + 1) % 3, "label_cost": LABEL_COST}
    return (x, y, a, b), options


def ways(inputs, *, equal_masses):
    """A direction of each input: weights stay non-negative, and when balanced their sums stay what they are."""
    found = []
    for k, tensor in enumerate(inputs):
        way = normal(*tensor.shape, seed=10 + k)
        if k > 1:
            way = torch.where(tensor > 0, way, way.abs())
            if equal_masses:
                way[0] -= way.sum()
        found.append(way)
    return found


def slope(function, inputs, k, way):
    """The derivative of a number along `way` of the k-th input, by differences of the fourth order: central, forward where weights
    are zero."""

    def at(h):
        with torch.no_grad():
            return float(function(*(t + h * way if i == k else t for i, t in enumerate(inputs))))

    if k > 1 and bool((inputs[k] == 0).any()):
        h = 2e-4
        return (-25 * at(0) + 48 * at(h) - 36 * at(2 * h) + 16 * at(3 * h) - 3 * at(4 * h)) / (12 * h)
    h = 1e-3
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def assert_slopes(function, inputs, *, equal_masses=True, share=1e-6):
    """Autograd's derivatives of a number in all inputs are finite differences."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    found = torch.autograd.grad(function(*leaves), leaves)
    for k, (gradient, way) in enumerate(zip(found, ways(inputs, equal_masses=equal_masses))):
        expected = slope(function, inputs, k, way)
        scale = float(gradient.norm() * way.norm())
        assert float((gradient * way).sum()) == pytest.approx(expected, abs=share * scale + 1e-10, rel=share), "xyab"[k]


# First derivatives


@pytest.mark.parametrize("empty", [False, True], ids=["weights", "zero weights"])
@pytest.mark.parametrize("labels", [False, True], ids=["plain", "labels"])
@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("unbalanced", RELAXED)
def test_a_loss_of_the_potentials(unbalanced, debias, labels, empty):
    for n, m in ((6, 8), (8, 6)):
        inputs, options = case(n, m, unbalanced, debias=debias, labels=labels, empty=empty)
        p, q = normal(n, seed=1), normal(m, seed=2)

        def loss(*tensors):
            result = otgen.solve_sample(*tensors, **options)  # noqa: B023
            total = (p * result.potential_a.tanh()).sum() + (q * result.potential_b).square().sum()  # noqa: B023
            if debias:
                total = total + (p * result.potential_aa).sum() + (q * result.potential_bb).sum()  # noqa: B023
            return total

        assert_slopes(loss, inputs, equal_masses=unbalanced is None)


ANSWERS = {
    "apply": lambda result, v, u: result.apply(v, axis=1).square().sum() + result.apply(u).cos().sum(),
    "plan_operator": lambda result, v, u: (u.T @ (result.plan_operator @ v)).square().sum(),
    "a vector": lambda result, v, u: (u[:, 0] * result.apply(v[:, 0], axis=1)).sum().square(),
    "maps": lambda result, v, u: result.a_to_b.square().sum() + (result.b_to_a * v).sum(),
    "marginals": lambda result, v, u: (result.marginal_a * u[:, 0]).sum() + (result.marginal(0) * v[:, 0]).square().sum(),
    "value_linear": lambda result, v, u: result.value_linear,
    "transport_mass": lambda result, v, u: result.transport_mass,
    "dual_cost": lambda result, v, u: result.dual_cost,
    "entropy": lambda result, v, u: result.entropy,
    "plan": lambda result, v, u: (u.T @ result.plan @ v).square().sum(),
    "density": lambda result, v, u: (u.T @ result.density @ v).square().sum(),
    "OTT's potentials": lambda result, v, u: (result.f * u[:, 0]).sum() + (result.g * v[:, 0]).sum(),
    "potentials and the plan": lambda result, v, u: (result.potential_a * result.apply(v, axis=1)[:, 0]).sum() * result.value,
}


@pytest.mark.parametrize("unbalanced", [None, (0.3, 2.0)])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name, unbalanced):
    inputs, options = case(unbalanced=unbalanced, labels=name in ("value_linear", "apply"))
    u, v = normal(6, 2, seed=1), normal(8, 2, seed=2)
    assert_slopes(
        lambda *tensors: ANSWERS[name](otgen.solve_sample(*tensors, **options), v, u), inputs, equal_masses=unbalanced is None
    )


@pytest.mark.parametrize("name", ["apply", "maps", "marginals", "value_linear"])
def test_answers_with_zero_weights(name):
    inputs, options = case(unbalanced=0.5, empty=True)
    u, v = normal(6, 2, seed=1), normal(8, 2, seed=2)
    assert_slopes(lambda *t: ANSWERS[name](otgen.solve_sample(*t, **options), v, u), inputs, equal_masses=False)


def test_answers_have_the_numbers_they_have_without_a_graph():
    inputs, options = case(unbalanced=0.5, labels=True, empty=True)
    traced, plain = (otgen.solve_sample(*inputs, **options | {"grad": way}) for way in ("implicit", "envelope"))
    for name in ("potential_a", "f", "marginal_a", "marginal_b", "a_to_b", "b_to_a", "value_linear", "plan", "density", "entropy"):
        torch.testing.assert_close(getattr(traced, name), getattr(plain, name), rtol=1e-9, atol=1e-12)
    assert not any(answer.requires_grad for answer in (traced.potential_a, traced.plan, traced.value_linear))


def test_products_are_differentiable_in_what_is_multiplied():
    inputs, options = case()
    result, v = otgen.solve_sample(*inputs, **options), normal(8, 3).requires_grad_()
    (found,) = torch.autograd.grad(result.apply(v, axis=1), v, normal(6, 3, seed=1))
    torch.testing.assert_close(found, result.apply(normal(6, 3, seed=1)))


def test_gradcheck():
    (x, y, a, b), options = case(4, 3, 0.5)

    def answers(x, y, v):
        result = otgen.solve_sample(x, y, a, b, **options)
        return result.potential_a, result.potential_b, result.apply(v, axis=1)

    assert torch.autograd.gradcheck(answers, (x.requires_grad_(), y.requires_grad_(), normal(3, 2).requires_grad_()), atol=1e-6)


def test_shifts_of_both_potentials_have_no_meaning_but_means_do():
    """<a, f> = <b, g> for weights of mass 1: each is half of the dual value, and has half of its gradient."""
    inputs, options = case()
    leaves = [t.requires_grad_() for t in inputs]
    result = otgen.solve_sample(*leaves, **options)
    x, _, a, b = leaves
    torch.testing.assert_close((a * result.potential_a).sum(), (b * result.potential_b).sum())
    (half,) = torch.autograd.grad((a * result.potential_a).sum(), x, retain_graph=True)
    (whole,) = torch.autograd.grad(result.value, x)
    torch.testing.assert_close(2.0 * half, whole)


def test_points_far_away_and_tiny_cotangents_keep_their_digits():
    (x, y, a, b), options = case()
    leaf = x.requires_grad_()
    result = otgen.solve_sample(leaf, y, a, b, **options)
    (whole,) = torch.autograd.grad(result.potential_a, leaf, normal(6), retain_graph=True)
    for size in (1e-8, 1e8):
        (found,) = torch.autograd.grad(result.potential_a, leaf, size * normal(6), retain_graph=True)
        torch.testing.assert_close(found / size, whole, rtol=1e-8, atol=1e-12)
    (nothing,) = torch.autograd.grad(result.potential_a, leaf, torch.zeros(6, dtype=x.dtype))
    assert not nothing.any()


@pytest.mark.parametrize("names", [("value_linear", "entropy"), ("transport_mass", "marginal_a"), ("potential_a", "f")], ids=str)
def test_who_looks_without_a_graph_takes_none_away(names):
    (x, y, a, b), options = case(unbalanced=0.5)
    slopes = []
    for look in (False, True):
        leaf = x.clone().requires_grad_()
        result = otgen.solve_sample(leaf, y, a, b, **options)
        if look:
            with torch.no_grad():
                getattr(result, names[0])
        slopes.append(torch.autograd.grad(getattr(result, names[1]).square().sum(), leaf)[0])
    assert torch.equal(*slopes)
    with torch.no_grad():
        assert not otgen.solve_sample(leaf, y, a, b, **options).potential_a.requires_grad


@pytest.mark.parametrize("far", [3.0, 6.0, 30.0])
@pytest.mark.parametrize("side", [0, 1])
def test_outliers_that_a_relaxed_marginal_gives_up(far, side):
    """A row whose mass is gone, down to sums that underflow, has derivatives, and takes none from the others."""
    (x, y, a, b), options = case(9, 8, 0.3)
    (x, y)[side][0] = far
    options |= {"reg": 0.1}
    u, v = normal(9, seed=1), normal(8, seed=2)

    def loss(*tensors):
        result = otgen.solve_sample(*tensors, **options)
        return (
            (u * result.potential_a).sum()
            + (v * result.potential_b).sum()
            + result.a_to_b.square().sum()
            + result.b_to_a.cos().sum()
        )

    if far < 30.0:
        assert_slopes(loss, (x, y, a, b), equal_masses=False, share=1e-5)
    leaf = x.requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, y, a, b), leaf)
    assert found.isfinite().all()
    assert found[0].any()


@pytest.mark.parametrize("tiny", [1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
def test_points_of_tiny_weight_leave_the_others_their_digits(tiny, debias):
    (x, y, a, b), options = case(9, 12, debias=debias)
    a[0], b[1] = tiny, tiny
    a, b = a / a.sum(), b / b.sum()

    def gradients(*tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        result = otgen.solve_sample(*leaves, a.to(tensors[0]), b.to(tensors[0]), **options | {"tol": 1e-6})
        loss = result.potential_a.sum() + (0 if not debias else result.potential_aa.sum())
        return torch.autograd.grad(loss, leaves)

    exact, single = gradients(x, y), gradients(x.float(), y.float())
    for part, expected in zip(single, exact):
        assert float((part.double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("rho", [1e2, 1e5, 1e8])
def test_a_large_price_of_the_marginals_costs_no_digits_in_float32(rho):
    """Of functions of the plan; the constant of f itself is then as ill conditioned as it is large."""
    (x, y, a, b), options = case(9, 12)
    options |= {"unbalanced": rho, "tol": 1e-6}

    def gradients(*tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        result = otgen.solve_sample(*leaves, **options)
        v = normal(12, 2).to(tensors[0])
        return torch.autograd.grad(result.apply(v, axis=1).square().sum(), leaves[:2], retain_graph=True) + torch.autograd.grad(
            result.potential_a.sum(), leaves[:1]
        )

    exact, single = gradients(x, y, a, b), gradients(*(t.float() for t in (x, y, a, b)))
    for part, expected in zip(single, exact):
        assert float((part.double() - expected).norm() / expected.norm()) < 1e-3


def test_padding_far_away_spoils_nothing():
    """Points without weight on both sides, where the density between them overflows."""
    x, y = (torch.cat((5.0 + cloud, torch.zeros(4, 2, dtype=cloud.dtype))) for cloud in problem(20, 20, 2)[:2])
    weights = torch.cat((torch.full((20,), 0.05, dtype=x.dtype), torch.zeros(4, dtype=x.dtype)))
    slopes = []
    for cut in (slice(None), slice(20)):
        leaf = x[cut].clone().requires_grad_()
        result = otgen.solve_sample(leaf, y[cut], weights[cut], weights[cut].clone(), reg=0.05, tol=1e-11, grad="implicit")
        loss = result.a_to_b[:20].square().sum() + (result.plan[:20, :20] * y[:20, 0]).square().sum() + result.value_linear
        slopes.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(slopes[0][:20], slopes[1], rtol=1e-6, atol=1e-9)
    assert not slopes[0][20:].any()


@pytest.mark.parametrize("name", ["plan", "apply"])
def test_the_plan_grows_with_a_weight_that_is_zero(name):
    inputs, options = case(unbalanced=0.5, empty=True)
    u, v = normal(6, 2, seed=1), normal(8, 2, seed=2)
    assert_slopes(lambda *t: ANSWERS[name](otgen.solve_sample(*t, **options), v, u), inputs, equal_masses=False)


def test_checkpoints():
    (x, y, a, b), options = case()

    def loss(x):
        result = otgen.solve_sample(x, y, a, b, **options)
        return result.potential_a.square().sum() + result.value_linear

    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (found,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False), leaf)
    torch.testing.assert_close(found, expected)


# Cost


def test_one_system_answers_for_all_of_a_loss(sweeps):
    (x, y, a, b), options = case(60, 45)
    leaf = x.requires_grad_()
    result = otgen.solve_sample(leaf, y, a, b, **options)
    loss = result.potential_a.sum() + result.potential_b.square().sum() + (normal(60) * result.potential_a).sum()
    sweeps.clear()
    loss.backward()
    _, limits = pullback(result._solution, normal(60), normal(45))
    assert sweeps["hvp_matvec"] % 2 == 0
    assert sweeps["apply_plan"] == 2 * 2  # before conjugate gradients; of backward and of pullback
    assert sweeps["apply_plan_both"] == 2  # for both sides at once
    assert limits.passes == 2 * limits.iterations + 3
    assert 1 <= limits.iterations <= 40
    assert set(sweeps) == {"hvp_matvec", "apply_plan", "apply_plan_both"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision(dtype):
    (x, y, a, b), options = case(9, 7)
    x, y = x.to(dtype), y.to(dtype)

    def gradient(*tensors):
        leaf = tensors[0].clone().requires_grad_()
        result = otgen.solve_sample(leaf, *tensors[1:], **options | {"tol": 1e-5})
        v = normal(7).to(tensors[2])
        loss = (result.potential_a * normal(9).to(v)).sum() + result.apply(v, axis=1).square().sum()
        return torch.autograd.grad(loss, leaf)[0]

    found, exact = gradient(x, y, a.float(), b.float()), gradient(x.double(), y.double(), a, b)
    assert found.dtype == dtype
    assert float((found.double() - exact).norm() / exact.norm()) < (1e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
def test_interpreted_kernels(monkeypatch):
    (x, y, a, b), options = case(10, 7)
    options |= {"tol": 1e-4}

    def gradients(*tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        result = otgen.solve_sample(*leaves, **options)
        loss = (result.potential_a * normal(10).to(x)).sum() + result.apply(normal(7, 2).to(tensors[0]), axis=1).square().sum()
        return result, torch.autograd.grad(loss, leaves)

    exact = gradients(x, y, a, b)[1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result, found = gradients(*(t.float() for t in (x, y, a, b)))
    assert result.variant is not None
    for part, expected in zip(found, exact):
        assert float((part.double() - expected).norm() / expected.norm()) < 1e-2


def test_numpy_has_no_graph():
    (x, y, a, b), options = case()
    result = otgen.solve_sample(*(t.numpy() for t in (x, y, a, b)), **options)
    assert isinstance(result.potential_a, np.ndarray)
    assert isinstance(result.a_to_b, np.ndarray)


# Second derivatives that meet weights


@pytest.mark.parametrize("empty", [False, True], ids=["weights", "zero weights"])
@pytest.mark.parametrize("debias", [False, True], ids=["biased", "debiased"])
@pytest.mark.parametrize("unbalanced", RELAXED)
def test_gradients_of_the_value_are_differentiable_in_weights(unbalanced, debias, empty):
    inputs, options = case(unbalanced=unbalanced, debias=debias, empty=empty)
    along = ways(inputs, equal_masses=unbalanced is None)

    def turned(*tensors):
        """<way, gradient> for all four ways together."""
        leaves = [t if t.requires_grad else t.clone().requires_grad_() for t in tensors]
        with torch.enable_grad():
            value = otgen.solve_sample(*leaves, **options | {"grad": "envelope"}).value
            slopes = torch.autograd.grad(value, leaves, create_graph=True)
            return sum((way * part).sum() for way, part in zip(along, slopes))

    assert_slopes(turned, inputs, equal_masses=unbalanced is None)


@pytest.mark.parametrize("unbalanced", [None, 0.5])
def test_the_whole_hessian_is_symmetric(unbalanced):
    inputs, options = case(3, 4, unbalanced)

    def value(*tensors):
        return otgen.solve_sample(*tensors, **options).value

    blocks = torch.autograd.functional.hessian(value, tuple(inputs))
    sizes = [t.numel() for t in inputs]
    matrix = torch.cat([torch.cat([block.reshape(n, m) for block, m in zip(row, sizes)], 1) for row, n in zip(blocks, sizes)])
    if unbalanced is None:  # only changes of weights that keep the masses equal have a meaning
        keep = torch.block_diag(
            torch.eye(sizes[0] + sizes[1], dtype=matrix.dtype), *(torch.eye(n, dtype=matrix.dtype) - 1 / n for n in sizes[2:])
        )
        matrix = keep @ matrix @ keep
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("ragged", [False, True])
def test_batches(ragged):
    """Second derivatives of each problem are those it has alone."""
    x, y = batch()
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype)
    if ragged:
        counts = [len(x[0]), 5, 7]
        places = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        points = torch.cat([cloud[:k] for cloud, k in zip(x, counts)])
        given, extra = points, {"batch_a": places, "batch_b": torch.arange(3).repeat_interleave(y.shape[1])}
        other, clouds = y.reshape(-1, 3), [cloud[:k] for cloud, k in zip(x, counts)]
    else:
        given, other, extra, clouds = x, y, {}, list(x)
    leaf = given.clone().requires_grad_()
    value = otgen.solve_sample_batch(leaf, other, reg=0.4, debias=True, tol=1e-11, **extra).value
    (first,) = torch.autograd.grad((factors * value).sum(), leaf, create_graph=True)
    (found,) = torch.autograd.grad(first.square().sum(), leaf)
    for k, (cloud, part) in enumerate(zip(clouds, torch.split(found, [len(c) for c in clouds]) if ragged else found)):
        alone = cloud.clone().requires_grad_()
        own = factors[k] * otgen.solve_sample(alone, y[k], reg=0.4, debias=True, tol=1e-11).value
        (slope_alone,) = torch.autograd.grad(own, alone, create_graph=True)
        (expected,) = torch.autograd.grad(slope_alone.square().sum(), alone)
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-9)


# Refused


def test_what_is_refused():
    (x, y, a, b), options = case()
    leaf, weights = x.requires_grad_(), a.requires_grad_()
    result = otgen.solve_sample(leaf, y, weights, b, **options)
    for answer in (result.potential_a, result.apply(normal(8), axis=1), result.value_linear):
        (first,) = torch.autograd.grad(answer.sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="one derivative of an implicit answer"):
            first.sum().backward()
    (first,) = torch.autograd.grad(result.value, weights, create_graph=True)
    (twice,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    with pytest.raises(Unsupported):
        twice.sum().backward()
    with pytest.raises(NotImplementedError, match="got 'implicit'; type solve_sample for each"):
        otgen.solve_sample_batch(x[None], y[None], reg=0.4, grad="implicit")


def test_a_system_left_unsolved_is_told():
    inputs, options = case(9, 7)
    result = otgen.solve_sample(*inputs, **options)
    _, limits = pullback(result._solution, normal(9), normal(7), max_iter=1)
    assert (limits.met, limits.iterations) == (False, 1)
    assert limits.residual > 1e-10
    with pytest.warns(ConvergenceWarning, match="an implicit gradient was left"):
        told("an implicit gradient", limits)
