"""What is read off a plan without building it is what the dense plan says: draws, largest entries, and how little they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clouds import problem
from scipy import stats

import otgen
from otgen import chunked
from otgen.errors import ConvergenceWarning, InputError
from otgen.solvers import plan as plans
from otgen.solvers.solution import Solution

pytestmark = pytest.mark.usefixtures("streamed")

LIKELY = 1e-4
"""Least p-value of a test on fixed seeds: a right sampler fails one seed in ten thousand."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fit(counts, probabilities, least=5.0):
    """The p-value of `counts` under `probabilities`; cells that expect fewer than `least` are pooled, a pool of less left out."""
    counts, expected = counts.double().flatten(), probabilities.double().flatten() * counts.sum()
    rare = expected < least
    pool = slice(0, 1 if expected[rare].sum() >= least else 0)
    counts = torch.cat((counts[~rare], counts[rare].sum()[None][pool]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None][pool]))
    return stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue


def counted(i, j, n, m):
    return torch.bincount(i * m + j, minlength=n * m).reshape(n, m)


@pytest.fixture
def narrow(monkeypatch):
    """Many small tiles, so that their seams are drawn across."""
    monkeypatch.setattr(plans, "WIDTH", 7)
    monkeypatch.setattr(plans, "CPU_TILE", 21)


# Draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"unbalanced": 0.1}, {"method": "symmetric"}], ids=["balanced", "unbalanced", "symmetric"])
def test_pairs_follow_the_dense_plan(narrow, dtype, options):
    x, y, a, b = problem(20, 30, 2, dtype=dtype)
    a[3] = b[5] = 0.0
    a, b = a / a.sum(), b / b.sum()
    result = otgen.solve_sample(x, y, a, b, reg=0.05, **options)
    i, j = result.sample(200_000, seeded())
    plan = result.plan.double() / result.plan.double().sum()
    counts = counted(i, j, 20, 30)
    assert (i.dtype, j.dtype, i.shape, j.shape) == (torch.int64, torch.int64, (200_000,), (200_000,))
    assert counts[3].sum() == counts[:, 5].sum() == 0
    assert fit(counts, plan) > LIKELY
    assert fit(counts.sum(1), plan.sum(1)) > LIKELY
    assert fit(counts.sum(0), plan.sum(0)) > LIKELY


def test_the_test_of_fit_notices_a_wrong_plan():
    x, y, a, b = problem(20, 30, 2)
    result = otgen.solve_sample(x, y, a, b, reg=0.05)
    other = otgen.solve_sample(x, y, a, b, reg=0.055).plan
    assert fit(counted(*result.sample(200_000, seeded()), 20, 30), other / other.sum()) < LIKELY


def test_pairs_come_in_no_order():
    """The first half of the draws has the law of the second, and neighbours are independent."""
    x, y, a, b = problem(4, 3, 2)
    result = otgen.solve_sample(x, y, a, b, reg=0.5)
    i, j = result.sample(100_000, seeded())
    pair = i * 3 + j
    table = counted(pair[:-1:2], pair[1::2], 12, 12)
    plan = (result.plan / result.plan.sum()).flatten()
    assert fit(table, plan[:, None] * plan) > LIKELY
    halves = torch.stack([torch.bincount(half, minlength=12) for half in pair.chunk(2)])
    assert stats.chi2_contingency(halves.numpy()).pvalue > LIKELY


def test_a_generator_makes_draws_repeatable_on_any_number_of_threads():
    x, y, a, b = problem(300, 200, 3)
    result = otgen.solve_sample(x, y, a, b, reg=0.05)
    one, again, other = (result.sample(500, seeded(seed)) for seed in (7, 7, 8))
    torch.set_num_threads(2)
    threaded = result.sample(500, seeded(7))
    for first, second in ((one, again), (one, threaded)):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert not torch.equal(one[0], other[0])
    torch.manual_seed(3)
    free = result.sample(500)
    torch.manual_seed(3)
    assert torch.equal(free[1], result.sample(500)[1])


def test_only_the_rows_drawn_are_visited_and_tiles_stay_small(monkeypatch):
    """At n = m = 20 000 the matrix has 4e8 entries; 1000 draws may look at 1000 rows, a tile of them at a time."""
    x, y, _, _ = problem(20_000, 20_000, 3, dtype=torch.float32)
    with pytest.warns(ConvergenceWarning):
        result = otgen.solve_sample(x, y, reg=0.5, max_iter=1, tol=1e-6)
    sizes = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: (tile := product(*args, **kw), sizes.append(tile.numel()))[0])
    monkeypatch.setattr(Solution, "plan", None)
    i, _ = result.sample(1000, seeded())
    assert sum(sizes) == len(i.unique()) * 20_000
    assert max(sizes) <= chunked.CPU_TILE


def test_clouds_far_from_one_another_are_drawn_from_without_underflow():
    """The scores' own exponentials, without potentials, are all zero in float32; the diagonal has all the mass."""
    x = 2.0 * torch.arange(20.0)[:, None]
    result = otgen.solve_sample(x, x + 20.0, reg=0.1)
    i, j = result.sample(1000, seeded())
    assert torch.equal(i, j)
    assert len(i.unique()) == 20


def test_rounding_at_either_end_never_draws_a_weight_of_zero(monkeypatch):
    """Uniform numbers of 0, and of 1, which the product with a total may round to."""
    weights = torch.tensor([0.0, 3.0, 0.0, 5.0, 0.0], dtype=torch.float64)
    cumulative, line = weights.cumsum(0)[None], torch.zeros(2, dtype=torch.int64)
    assert plans._first_above(cumulative, line, torch.tensor([0.0, 8.0], dtype=torch.float64)).tolist() == [1, 3]
    for uniform, index in ((0.0, 1), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda *size, uniform=uniform, **kw: torch.full(size, uniform, dtype=torch.float64))
        assert plans.draw(weights, 2, None, replace=True).tolist() == [index, index]


# Distinct pairs


def chances(weights):
    """(w, w): the chance of each ordered pair of distinct draws, the second from what the first leaves."""
    weights = weights / weights.sum()
    second = weights / (1.0 - weights)[:, None]
    return (weights[:, None] * second).fill_diagonal_(0.0)


@pytest.mark.parametrize("rounds", [0, 1, 8])
def test_distinct_pairs_are_successive_draws(narrow, monkeypatch, rounds):
    """By sweeps alone (0), by draws less repeated ones (8), and by one after the other (1)."""
    monkeypatch.setattr(plans, "ROUNDS", rounds)
    x, y, a, b = problem(3, 2, 1)
    result = otgen.solve_sample(x, y, a, b, reg=0.3)
    generator, table = seeded(), torch.zeros(6, 6)
    for _ in range(1500):
        i, j = result.sample(2, generator, replace=False)
        table[i[0] * 2 + j[0], i[1] * 2 + j[1]] += 1
    assert fit(table[~torch.eye(6, dtype=bool)], chances(result.plan.flatten())[~torch.eye(6, dtype=bool)]) > LIKELY


@pytest.mark.parametrize("k", [1, 13, 399])
def test_distinct_pairs_are_distinct_have_weight_and_run_out(narrow, k):
    x, y, a, b = problem(20, 22, 2)
    a[3] = b[5] = 0.0
    result = otgen.solve_sample(x, y, a / a.sum(), b / b.sum(), reg=0.05)
    i, j = result.sample(k, seeded(), replace=False)
    assert len((i * 22 + j).unique()) == k
    assert 3 not in i
    assert 5 not in j
    with pytest.raises(InputError, match=r"at most 399 distinct pairs.* got k=400; type replace=True"):
        result.sample(400, replace=False)


# The largest entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 45])
def test_the_largest_entries_are_those_of_the_dense_plan(monkeypatch, dtype, k):
    monkeypatch.setattr(chunked, "CPU_TILE", 64)
    x, y, a, b = problem(700, 45, 3, dtype=dtype)
    a[3] = b[5] = 0.0
    result = otgen.solve_sample(x, y, a / a.sum(), b / b.sum(), reg=0.02)
    values, index = result.top_k(k)
    expected, where = result.plan.topk(k, 1)
    torch.testing.assert_close(values, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-38)
    torch.testing.assert_close(result.plan.gather(1, index), values, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-38)
    assert (values[3] == 0).all()
    if dtype == torch.float64:
        rows = torch.arange(700) != 3
        assert torch.equal(index[rows], where[rows])
        assert torch.equal(result.argmax()[rows], result.plan.argmax(1)[rows])
    if k < 45:
        assert not (index == 5).any()
    assert (index.sort(1).values.diff(dim=1) > 0).all()


def test_a_row_without_weight_points_where_it_would_go():
    x, y, a, b = problem(40, 40, 2)
    a[3] = 0.0
    result = otgen.solve_sample(x, y, a / a.sum(), b, reg=0.001, tol=1e-4)
    f, g = result.potentials
    scores = b.log() + (f[:, None] + g - torch.cdist(x, y).square()) / 0.001
    assert result.argmax()[3] == scores[3].argmax()
    assert result.top_k(1)[1][3] == scores[3].argmax()


def test_the_first_of_equals_is_the_largest(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_TILE", 64)
    x, y = torch.zeros(600, 2), torch.ones(50, 2)
    result = otgen.solve_sample(x, y, reg=1.0)
    assert (result.argmax() == 0).all()


# Kinds of input


def test_numpy_in_numpy_out():
    x, y, a, b = (tensor.numpy() for tensor in problem())
    result = otgen.solve_sample(x, y, a, b, reg=0.1)
    answers = [*result.sample(9, seeded()), *result.sample(9, seeded(), replace=False), result.argmax(), *result.top_k(2)]
    assert [type(answer) for answer in answers] == [np.ndarray] * 7
    assert [answer.dtype for answer in answers] == [np.int64] * 5 + [np.float64, np.int64]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda result: result.sample(0), r"at least 1 for k; got 0"),
        (lambda result: result.sample(2.0), r"at least 1 for k; got 2\.0"),
        (lambda result: result.sample(True), r"at least 1 for k; got True"),
        (lambda result: result.sample(3, 0), r"a torch\.Generator; got int; type generator=torch\.Generator\('cpu'\)"),
        (lambda result: result.sample(3, np.random.default_rng(0)), r"a torch\.Generator; got Generator"),
        (lambda result: result.top_k(46), r"at most 45, the points of X_b; got 46; type k=45"),
        (lambda result: result.top_k(0), r"at least 1 for k"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    x, y, a, b = problem()
    result = otgen.solve_sample(x, y, a, b, reg=0.1)
    with pytest.raises(InputError, match=message):
        call(result)


def test_a_plan_of_nan_is_refused():
    x, y, _, _ = problem(dtype=torch.float32)
    with pytest.warns(ConvergenceWarning):
        result = otgen.solve_sample(x, y, reg=1e-38, method="alternating")
    for call in (lambda: result.sample(3), lambda: result.top_k(3), result.argmax):
        with pytest.raises(InputError, match="finite marginals and some mass; got one that stopped by 'nan'; raise reg"):
            call()
