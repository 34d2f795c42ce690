"""Label costs: the numbers of a dense cost matrix, GeomLoss's with the same cost, and what is refused."""

from __future__ import annotations

import geomloss
import pytest
import torch
from clouds import problem

import otgen
from otgen.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("streamed")

CLASSES = 4


def classes(n, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(CLASSES, CLASSES, generator=generator, dtype=torch.float64)
    ka, kb = (torch.randint(CLASSES, (size,), generator=generator) for size in (n, m))
    return ka, kb, (w + w.T) * (1.0 - torch.eye(CLASSES, dtype=torch.float64))


def geomloss_cost(w, lambda_x, lambda_y, half):
    """The same cost on points with their class as a last coordinate."""

    def cost(x, y):
        squares = torch.cdist(x[..., :-1], y[..., :-1]).square()
        between = w[x[..., -1].long()[..., :, None], y[..., -1].long()[..., None, :]]
        return half * (lambda_x * squares + lambda_y * between)

    return cost


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("lambdas", [(1.0, 1.0), (0.5, 2.0)], ids=str)
def test_the_number_and_the_gradients_are_geomlosss(lambdas, debias, reach, batch):
    x, y, a, b = problem(30, 25)
    ka, kb, w = classes(30, 25)
    tensors = (a, x, b, y, ka, kb)
    if batch:
        tensors = tuple(torch.stack([t] * batch) if t.ndim else t for t in tensors)
        tensors[1][1] += 0.2
    a, x, b, y, ka, kb = tensors
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    options = {"blur": 0.2, "reach": reach, "debias": debias, "diameter": 2.0, "scaling": 0.8}
    ours = otgen.SamplesLoss(**options, label_cost_matrix=w, lambda_x=lambdas[0], lambda_y=lambdas[1])
    value = ours(a, x, b, y, label_x=ka, label_y=kb)
    theirs = geomloss.SamplesLoss(**options, cost=geomloss_cost(w, *lambdas, 0.5), backend="tensorized")
    expected = theirs(a, torch.cat((x, ka[..., None].double()), -1), b, torch.cat((y, kb[..., None].double()), -1))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    mine, other = (torch.autograd.grad(v.sum(), (x, y)) for v in (value, expected))
    correction = 1.0 if reach is None else (reach**2 + 0.04) / (reach**2 + 0.02)
    for one, two in zip(mine, other):
        torch.testing.assert_close(one, correction * two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["auto", "newton", "symmetric"])
@pytest.mark.parametrize("debias", [False, True])
def test_a_solved_problem_is_that_of_the_dense_cost(method, debias):
    x, y, a, b = problem(30, 25)
    ka, kb, w = classes(30, 25)
    labels = {"labels_a": ka, "labels_b": kb, "label_cost": w}
    result = otgen.solve_sample(x, y, a, b, reg=0.1, tol=1e-9, max_iter=20000, method=method, debias=debias, **labels)
    costs = torch.cdist(x, y).square() + w[ka][:, kb]
    f, g = result.potentials
    plan = a[:, None] * b * torch.exp((f[:, None] + g - costs) / 0.1)
    torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=1e-8)
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-8)
    torch.testing.assert_close(result.plan, plan, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(result.value_linear, (plan * costs).sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.a_to_b, plan @ y / plan.sum(1, keepdim=True), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(result.apply(y, axis=1), plan @ y, rtol=1e-7, atol=1e-9)
    assert result.argmax().tolist() == plan.argmax(1).tolist()
    if debias:
        own = torch.cdist(x, x).square() + w[ka][:, ka]
        f = result.potential_aa
        sums = (a * torch.exp((f[:, None] + f - own) / 0.1)).sum(1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-7)


def test_no_extra_cost_is_no_label():
    x, y, a, b = problem(30, 25)
    ka, kb, w = classes(30, 25)
    plain = otgen.SamplesLoss()(a, x, b, y)
    torch.testing.assert_close(otgen.SamplesLoss(label_cost_matrix=0 * w, lambda_y=1.0)(a, x, b, y, label_x=ka, label_y=kb), plain)
    assert float(otgen.SamplesLoss(label_cost_matrix=w)(a, x, b, y, label_x=ka, label_y=kb)) == float(plain)


def test_equal_labelled_measures_have_no_distance_and_others_have():
    x, _, a, _ = problem(30, 25)
    ka, _, w = classes(30, 25)
    loss = otgen.SamplesLoss(label_cost_matrix=w, lambda_y=1.0, tol=1e-9, blur=0.3)
    assert abs(float(loss(a, x, a, x, label_x=ka, label_y=ka))) < 1e-9
    assert float(loss(a, x, a, x, label_x=ka, label_y=(ka + 1) % CLASSES)) > 1e-3


def test_float32_and_numpy():
    x, y, _, _ = problem(30, 25)
    ka, kb, w = classes(30, 25)
    exact = otgen.solve_sample(x, y, reg=0.1, tol=1e-9, labels_a=ka, labels_b=kb, label_cost=w)
    single = otgen.solve_sample(x.float(), y.float(), reg=0.1, labels_a=ka.int(), labels_b=kb, label_cost=w.float())
    arrays = otgen.solve_sample(
        x.numpy(), y.numpy(), reg=0.1, tol=1e-9, labels_a=ka.numpy(), labels_b=kb.numpy(), label_cost=w.numpy()
    )
    assert float(single.value) == pytest.approx(float(exact.value), rel=1e-4)
    assert float(arrays.value) == pytest.approx(float(exact.value), rel=1e-9)


def test_a_batch_is_its_problems():
    ka, kb, w = classes(30, 25)
    x, y, _, _ = problem(30, 25)
    xs, ys = torch.stack((x, 2 * x)), torch.stack((y, y))
    ks, ls = torch.stack((ka, ka.flip(0))), torch.stack((kb, kb))
    both = {"reg": 0.1, "tol": 1e-8, "label_cost": w}
    result = otgen.solve_sample_batch(xs, ys, labels_a=ks, labels_b=ls, **both)
    flat = otgen.solve_sample_batch(
        xs.reshape(-1, 3), ys.reshape(-1, 3), labels_a=ks.reshape(-1), labels_b=ls.reshape(-1), **both,
        batch_a=torch.arange(2).repeat_interleave(30), batch_b=torch.arange(2).repeat_interleave(25),
    )  # fmt: skip
    for i in range(2):
        alone = otgen.solve_sample(xs[i], ys[i], labels_a=ks[i], labels_b=ls[i], **both)
        torch.testing.assert_close(result.value[i], alone.value, rtol=1e-9, atol=0)
        torch.testing.assert_close(flat.value[i], alone.value, rtol=1e-9, atol=0)
        torch.testing.assert_close(result[i].plan, alone.plan, rtol=1e-4, atol=1e-9)


def test_what_needs_the_labels_of_new_points_is_not_implemented():
    x, y, _, _ = problem(30, 25)
    ka, kb, w = classes(30, 25)
    result = otgen.solve_sample(x, y, reg=0.1, labels_a=ka, labels_b=kb, label_cost=w)
    with pytest.raises(NotImplementedError, match="outside the sample"):
        result.to_dual_potentials().f(x)


K, L, W = classes(30, 25)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((K, L, None), "together; got no label_cost"),
        ((None, L, W), "together; got no labels_a"),
        ((K[:5], L, W), r"labels_a of shape \(30,\), integers; got \(5,\)"),
        ((K.double(), L, W), "integers; got .* of float64"),
        ((K, L + CLASSES, W), "classes from 0 to 3 in labels_b"),
        ((K - 1, L, W), "classes from 0 to 3 in labels_a; got -1"),
        ((K, L, W[:2]), "label_cost of shape"),
        ((K, L, W + W.triu()), "finite, symmetric label_cost"),
        ((K, L, W / 0), "finite, symmetric label_cost"),
        ((K.tolist(), L, W), "a torch tensor for labels_a"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(labels, said):
    x, y, _, _ = problem(30, 25)
    with pytest.raises(InputError, match=said):
        otgen.solve_sample(x, y, reg=0.1, **dict(zip(("labels_a", "labels_b", "label_cost"), labels)))


def test_mistakes_of_the_loss_are_named():
    x, y, _, _ = problem(30, 25)
    with pytest.raises(UsageError, match="expected label_cost_matrix with lambda_x or lambda_y"):
        otgen.SamplesLoss(lambda_y=1.0)
    with pytest.raises(InputError, match="above 0 for lambda_x"):
        otgen.SamplesLoss(label_cost_matrix=W, lambda_x=0.0, lambda_y=1.0)
    with pytest.raises(InputError, match="finite lambda_y"):
        otgen.SamplesLoss(label_cost_matrix=W, lambda_y=float("inf"))
    loss = otgen.SamplesLoss(label_cost_matrix=W, lambda_y=1.0)
    with pytest.raises(InputError, match="got no label_y"):
        loss(x, y, label_x=K)
    with pytest.raises(InputError, match="label_cost_matrix with label_x"):
        otgen.SamplesLoss()(x, y, label_x=K, label_y=L)
