"""Solves that leave tiles out and those that visit all: the same answers, in the caller's order, and what was left out logged."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from clouds import LABEL_COST, problem

import otgen
from otgen.errors import InputError, UsageError
from otgen.solvers import kept, listed

pytestmark = pytest.mark.usefixtures("streamed")

REG = 4e-3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of a few points, so that a few hundred have many, and no kept matrix, so that loops sweep."""
    monkeypatch.setattr(listed, "WIDTH", 8)
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)


def scattered(zeros=False, dtype=torch.float64):
    x, y, a, b = problem(500, 400, dtype=dtype)
    if zeros:
        a[::3], b[::5] = 0.0, 0.0
        a, b = a / a.sum(), b / b.sum()
    return x, y, a, b


def both(*arguments, **options):
    """The answers with lists and without, and that lists did leave something out."""
    with_lists, without = (otgen.solve_sample(*arguments, **options, tiles=tiles) for tiles in ("listed", "all"))
    assert with_lists.visited < 0.7
    assert 0.0 < with_lists.omitted_mass <= 1.001 * listed.MOST_OMITTED
    assert (without.visited, without.omitted_mass) == (1.0, 0.0)
    return with_lists, without


@pytest.mark.parametrize("zeros", [False, True], ids=["weights", "zero weights"])
@pytest.mark.filterwarnings("ignore::otgen.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    "options", [{}, {"method": "alternating", "max_iter": 50}, {"method": "newton"}, {"unbalanced": (1.0, 0.5)}], ids=str
)
def test_answers_are_those_of_all_tiles_in_the_callers_order(options, zeros):
    found, expected = both(*scattered(zeros), reg=REG, tol=1e-8, **options)
    assert found.converged == ("max_iter" not in options)
    for name in ("value", "value_linear", "potential_a", "potential_b", "marginal_a", "marginal_b", "a_to_b", "b_to_a", "plan"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(found.argmax(), expected.argmax())


def test_a_permutation_of_the_points_permutes_the_answers():
    x, y, a, b = scattered()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    one = otgen.solve_sample(x, y, a, b, reg=REG, tol=1e-9, tiles="listed")
    other = otgen.solve_sample(x[order], y, a[order], b, reg=REG, tol=1e-9, tiles="listed")
    for name in ("potential_a", "marginal_a", "a_to_b"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name)[order], rtol=1e-6, atol=1e-6)


def test_products_and_gradients_leave_out_no_more():
    x, y, a, b = scattered()
    x, y = x.requires_grad_(), y.requires_grad_()
    found, expected = both(x, y, a, b, reg=REG, tol=1e-9)
    values = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for v in (values, values[:, 0]):
        torch.testing.assert_close(found.apply(v, axis=1), expected.apply(v, axis=1), rtol=0, atol=1e-8)
    for one, other in zip(torch.autograd.grad(found.value, (x, y)), torch.autograd.grad(expected.value, (x, y))):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore::otgen.errors.ConvergenceWarning")
@pytest.mark.parametrize("options", [{}, {"method": "symmetric"}, {"unbalanced": (1.0, None)}], ids=str)
def test_debiased_each_side_has_tiles_of_its_own(options):
    found, expected = both(*scattered(), reg=REG / 2, tol=1e-6, debias=True, max_iter=400, **options)
    for name in ("value", "potential_aa", "potential_bb"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("debias", [False, True])
def test_a_schedule_leaves_tiles_out_without_being_told(debias, monkeypatch):
    x, y, a, b = scattered()
    loss, values, visited = otgen.SamplesLoss(blur=0.02, debias=debias), [], []
    for least in (1, 1 << 30):
        monkeypatch.setattr(listed, "LEAST_PAIRS", least)
        x.requires_grad_()
        value = loss(a, x, b, y)
        values += [value.detach(), torch.autograd.grad(value, x)[0]]
        visited.append(loss.last_result.visited)
    assert visited[0] < 0.7
    assert visited[1] == 1.0
    torch.testing.assert_close(values[0], values[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values[1], values[3], rtol=1e-9, atol=1e-12)


def test_solvers_leave_tiles_out_without_being_told(monkeypatch):
    x, y, a, b = scattered(dtype=torch.float32)
    assert otgen.solve_sample(x, y, a, b, reg=REG).visited == 1.0
    monkeypatch.setattr(listed, "LEAST_PAIRS", len(x) * len(y))
    result = otgen.solve_sample(x, y, a, b, reg=REG)
    assert result.converged
    assert result.log["visited"] < 0.7
    assert 0.0 < result.log["omitted_mass"] <= 1.001 * listed.MOST_OMITTED


def test_what_is_left_out_follows_the_tolerance():
    x, y, a, b = scattered()
    omitted = {tol: otgen.solve_sample(x, y, a, b, reg=REG, tol=tol, tiles="listed").omitted_mass for tol in (1e-3, 1e-7)}
    assert omitted[1e-3] > 1e-9 > omitted[1e-7]


def test_where_all_tiles_matter_all_are_visited():
    """To the bit: the sweeps are those without lists."""
    x, y, a, b = scattered()
    found, expected = (otgen.solve_sample(x, y, a, b, reg=5.0, tiles=tiles) for tiles in ("listed", "all"))
    assert (found.visited, found.omitted_mass) == (1.0, 0.0)
    assert torch.equal(found.potential_a, expected.potential_a)


def test_points_are_sorted_once_a_solve():
    """However many sweeps and regularisations it takes, and for all three problems of a debiased one."""
    with patch.object(listed, "halved", wraps=listed.halved) as sorting:
        otgen.solve_sample(*scattered(), reg=REG, debias=True, tiles="listed")
    assert sorting.call_count == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tiles": "some"}, "tiles"),
        ({"X_a": torch.rand(5, 9), "X_b": torch.rand(6, 9)}, "at most 8 dimensions"),
        ({"labels_a": torch.arange(5) % 3, "labels_b": torch.arange(6) % 3, "label_cost": LABEL_COST.float()}, "without labels"),
    ],
)
def test_lists_that_cannot_be_had_are_refused(change, said):
    arguments = {"X_a": torch.rand(5, 2), "X_b": torch.rand(6, 2), "reg": 0.1, "tiles": "listed"} | change
    with pytest.raises((InputError, UsageError), match=said):
        otgen.solve_sample(**arguments)
