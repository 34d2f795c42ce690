"""What the options of a solve change, and nothing else: gradients, stages, kernels, tuning, and what is told of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clouds import batch, problem

import otgen
from otgen import ops
from otgen.errors import ConvergenceWarning, UsageError
from otgen.precision import LOG2_E
from otgen.solvers.annealing import FACTOR
from otgen.solvers.engine import METHODS, _merged
from otgen.solvers.sinkhorn import Outcome

pytestmark = pytest.mark.usefixtures("streamed")


@pytest.fixture
def sweeps(monkeypatch):
    """The regularisation of each half step (a number, or those of a batch) as it is launched; symmetric steps count for none."""
    seen = []
    half_step = ops.sinkhorn_half_step

    def spied(*args, scale, **options):
        seen.append(2.0 * LOG2_E / (scale[:, 0].clone() if isinstance(scale, torch.Tensor) else scale))
        return half_step(*args, scale=scale, **options)

    monkeypatch.setattr(ops, "sinkhorn_half_step", spied)
    return seen


# grad


@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
def test_a_detached_value_is_the_same_number_without_a_graph(solve):
    x, y = problem()[:2] if solve is otgen.solve_sample else batch()
    x.requires_grad_()
    envelope, detached = (solve(x, y, reg=0.1, grad=grad) for grad in ("envelope", "detach"))
    assert envelope.value.requires_grad
    assert not detached.value.requires_grad
    assert torch.equal(detached.value, envelope.value.detach())
    assert torch.equal(solve(x, y, reg=0.1).value, envelope.value)
    if solve is otgen.solve_sample_batch:
        assert envelope[0].value.requires_grad
        assert not detached[0].value.requires_grad


# scaling


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reg", [0.3, 0.01])
def test_stages_go_down_from_the_squared_radius_by_the_squared_ratio(sweeps, method, reg):
    x, y, a, b = problem()
    plain = otgen.solve_sample(x, y, a, b, reg=reg, method=method, tol=1e-6)
    own = [eps for eps in sweeps if eps > 1.001 * reg]
    sweeps.clear()
    staged = otgen.solve_sample(x, y, a, b, reg=reg, method=method, tol=1e-6, scaling=0.7)
    points = torch.cat((x, y))
    radius = float((points - points.mean(0)).norm(dim=1).max())
    count = int(np.ceil(np.log(radius**2 / reg) / -np.log(0.49)))
    assert count >= 2
    expected = [eps for i in range(count) for eps in 2 * [radius**2 * 0.49**i]]
    assert [eps for eps in sweeps if eps > 1.001 * reg] == pytest.approx(expected, rel=1e-6)
    assert staged.n_iters >= count
    torch.testing.assert_close(staged.value, plain.value, rtol=1e-6, atol=0)
    if own:
        assert (method in ("anderson", "newton"), reg) == (True, 0.01) or radius**2 > 150 * reg
        assert own[0] / own[2] == pytest.approx(1 / FACTOR)


def test_methods_without_stages_of_their_own_take_none_unless_asked(sweeps):
    x, y, a, b = problem()
    for method in ("alternating", "symmetric"):
        otgen.solve_sample(x, y, a, b, reg=0.002, method=method, tol=0.1)
    assert max(sweeps) == pytest.approx(0.002)


def test_stages_save_alternation_iterations():
    x, y, a, b = problem(300, 200)
    plain, staged = (otgen.solve_sample(x, y, a, b, reg=0.005, method="alternating", scaling=s) for s in (None, 0.7))
    assert staged.converged
    assert staged.passes < 0.8 * plain.passes


def test_problems_of_a_batch_go_through_stages_of_their_own():
    x, y = batch()
    together = otgen.solve_sample_batch(x, y, reg=0.05, tol=1e-7, scaling=0.5)
    for i, one in enumerate(together):
        alone = otgen.solve_sample(x[i], y[i], reg=0.05, tol=1e-7, scaling=0.5)
        assert (one.n_iters, one.passes) == (alone.n_iters, alone.passes)
        torch.testing.assert_close(one.value, alone.value, rtol=1e-10, atol=1e-12)
    assert together.n_iters[2] > together.n_iters[1]


@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
def test_stages_count_against_max_iter(solve):
    x, y = problem()[:2] if solve is otgen.solve_sample else batch()
    with pytest.warns(ConvergenceWarning, match="after 5 iterations"):
        result = solve(x, y, reg=1e-4, scaling=1.0 - 1e-12, max_iter=5)
    assert np.max(result.n_iters) == 5


@pytest.mark.parametrize("unbalanced", [None, 0.5, (0.5, None)], ids=str)
def test_own_costs_take_no_stages(sweeps, unbalanced):
    x, y, _, _ = problem()
    given = {"reg": 0.3, "method": "alternating", "scaling": 0.5, "unbalanced": unbalanced}
    otgen.solve_sample(x, y, **given)
    staged = [eps for eps in sweeps if eps > 0.301]
    sweeps.clear()
    otgen.solve_sample(x, y, debias=True, **given)
    assert [eps for eps in sweeps if eps > 0.301] == staged != []


# errors and log


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_errors_are_those_the_callback_is_told(method, dtype):
    x, y, a, b = problem(dtype=dtype)
    told = []
    result = otgen.solve_sample(x, y, a, b, reg=0.02, method=method, callback=lambda n, error: told.append(error))
    assert result.errors.tolist() == told
    assert result.errors.dtype == dtype
    assert len(told) > 5
    assert float(result.errors[-1]) == result.marginal_error
    again = otgen.solve_sample(*(t.numpy() for t in (x, y, a, b)), reg=0.02, method=method)
    assert isinstance(again.errors, np.ndarray)
    np.testing.assert_array_equal(again.errors, result.errors.numpy())


def test_errors_of_a_divergence_are_those_between_the_clouds():
    x, y, a, b = problem()
    plain, debiased = (otgen.solve_sample(x, y, a, b, reg=0.02, debias=debias) for debias in (False, True))
    assert torch.equal(plain.errors, debiased.errors)


@pytest.mark.parametrize("method", ["anderson", "symmetric"])
def test_errors_of_a_batch_end_with_each_problem(method):
    x, y = batch()
    result = otgen.solve_sample_batch(x, y, reg=0.05, method=method, tol=1e-6)
    looks, problems = result.errors.shape
    assert problems == 3
    assert len(set(result.n_iters.tolist())) == 3
    for i, one in enumerate(result):
        alone = otgen.solve_sample(x[i], y[i], reg=0.05, method=method, tol=1e-6)
        assert one.errors.shape == alone.errors.shape
        torch.testing.assert_close(one.errors, alone.errors, rtol=1e-4, atol=1e-12)
        assert float(one.errors[-1]) == pytest.approx(result.marginal_error[i])
        met = result.errors[:, i]
        assert int((~met.isnan()).sum()) == len(one.errors) <= looks
    assert result.errors.isnan().any()


def test_an_error_that_is_not_a_number_is_among_them():
    x = torch.tensor([[[0.0], [1.0]], [[0.0], [1e4]]])
    y = torch.tensor([[[0.0], [1.0]], [[5e3], [1.5e4]]])
    with pytest.warns(ConvergenceWarning):
        result = otgen.solve_sample_batch(x, y, reg=1e-4, method="alternating", tol=1e-6, max_iter=200)
    for i, one in enumerate(result):
        assert np.array_equal(float(one.errors[-1]), result.marginal_error[i], equal_nan=True)


def test_errors_met_in_a_coarser_precision_come_first():
    ended = torch.zeros(1)
    first = Outcome(ended, ended, ended, ended, 0.1, 2, 5, "precision floor", np.array([0.5, 0.1]))
    last = Outcome(ended, ended, ended, ended, 0.01, 1, 3, "tol", np.array([0.01]))
    assert _merged(first, last, np.array([True])).errors.tolist() == [0.5, 0.1, 0.01]
    many = torch.zeros(2, 1)
    counts = np.array([2, 2]), np.array([5, 5]), np.array(["tol", "precision floor"])
    first = Outcome(many, many, many, many, np.array([0.1, 0.2]), *counts, np.array([[0.5, 0.6], [0.1, 0.2]]))
    last = Outcome(many, many, many, many, np.array([np.nan, 0.0]), *counts, np.array([[np.nan, 0.0]]))
    merged = _merged(first, last, np.array([False, True]))
    np.testing.assert_array_equal(merged.errors, [[0.5, 0.6], [0.1, 0.2], [np.nan, 0.0]])
    assert merged.error.tolist() == [0.1, 0.0]


@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
def test_the_log_has_what_the_result_says(solve):
    x, y = problem()[:2] if solve is otgen.solve_sample else batch()
    result = solve(x, y, reg=0.1)
    skipped = {"visited", "omitted_mass"} if solve is otgen.solve_sample else set()
    assert set(result.log) == {"errors", "n_iters", "passes", "stop", "seconds", "precision", "variant", "cache"} | skipped
    assert all(value is getattr(result, name) for name, value in result.log.items())
    assert (result.log["precision"], result.log["variant"], result.log["cache"]) == ("fp64", None, None)


def test_a_schedule_looked_once():
    x, y, _, _ = problem()
    loss = otgen.SamplesLoss(blur=0.1)
    loss(x, y)
    assert loss.last_result.errors.tolist() == [loss.last_result._solution.outcome.error]
    loss(x[None], y[None])
    assert loss.last_result.errors.shape == (1, 1)


# verbose


@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
def test_verbose_prints_a_line_at_each_look_and_the_result(solve, capsys):
    x, y = problem()[:2] if solve is otgen.solve_sample else batch()
    told = []
    result = solve(x, y, reg=0.1, debias=True, verbose=True, callback=lambda n, error: told.append((n, error)))
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == ""
    assert lines[-1] == repr(result)
    assert len(lines) == len(told) + 1 == len(result.errors) + 1
    for line, (n, error) in zip(lines, told):
        assert line.startswith(f"{n} iterations, marginal error {error:.1e}, ")
        assert line.endswith(" s")
        assert 0.0 <= float(line.split()[-2]) <= result.seconds + 0.01
    solve(x, y, reg=0.1, debias=True)
    assert capsys.readouterr() == ("", "")


def test_the_repr_counts_no_coordinates_of_labels():
    x, y, _, _ = problem()
    labels = {"label_x": torch.zeros(60, dtype=torch.long), "label_y": torch.ones(45, dtype=torch.long)}
    loss = otgen.SamplesLoss(label_cost_matrix=1.0 - torch.eye(2, dtype=torch.float64), lambda_y=1.0, blur=0.5)
    loss(x, y, **labels)
    assert "60×45 points in 3-D" in repr(loss.last_result)


# Whose warning it is


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: otgen.solve_sample(x, y, reg=0.01, max_iter=2),
        lambda x, y: otgen.empirical_sinkhorn_divergence(x, y, reg=0.01, max_iter=2),
        lambda x, y: otgen.solve_sample_batch(x[None], y[None], reg=0.01, max_iter=2),
        lambda x, y: otgen.SamplesLoss(blur=0.05, max_iter=2)(x, y),
    ],
)
def test_a_warning_points_at_the_caller(call):
    x, y, _, _ = problem()
    with pytest.warns(ConvergenceWarning) as caught:
        call(x, y)
    assert [(warning.filename, len(caught)) for warning in caught] == [(__file__, 1)]


# Mistakes


@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grad": "envelop"}, UsageError, "unknown grad 'envelop'; known: detach, envelope, implicit. Did you mean 'envelope'"),
        ({"grad": None}, UsageError, "unknown grad 'None'"),
        ({"tune": "nwo"}, UsageError, "unknown tune 'nwo'; known: cache, now, off. Did you mean 'now'"),
        ({"tune": False}, UsageError, "unknown tune 'False'"),
    ],
)
def test_names_that_are_not_there_are_answered(solve, options, error, message):
    with pytest.raises(error) as caught:
        solve(*problem()[:2], reg=0.1, **options)
    assert str(caught.value).startswith(message)
