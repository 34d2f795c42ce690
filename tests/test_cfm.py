"""torchcfm's sampler without its matrix: POT's plans, the law of the pairs, labels and trajectories that follow their points."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import ot as pot
import pytest
import torch
from clouds import cost, problem
from test_plan import LIKELY, fit, seeded

import otgen
from otgen.cfm import OTPlanSampler, _largest_cost
from otgen.errors import ConvergenceWarning, InputError, UsageError
from otgen.solvers.solution import Solution

pytestmark = pytest.mark.usefixtures("streamed")


def batches(n=24, m=18, d=2, dtype=torch.float64):
    return problem(n, m, d, dtype=dtype)[:2]


def where(points, cloud):
    """The index in `cloud` of each of `points`, which are copies of its own."""
    distances = torch.cdist(points.flatten(1).double(), cloud.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances.min(1).values == 0).all()
    return distances.argmin(1)


# The plan


@pytest.mark.parametrize("normalize_cost", [False, True])
@pytest.mark.parametrize("method", ["sinkhorn", "unbalanced"])
def test_the_map_is_pots(method, normalize_cost):
    x0, x1 = batches()
    a, b, c = pot.unif(24), pot.unif(18), cost(x0, x1).numpy()
    c = c / c.max() if normalize_cost else c
    if method == "sinkhorn":
        expected = pot.sinkhorn(a, b, c, reg=0.1, stopThr=1e-13, numItermax=20000)
    else:
        expected = pot.unbalanced.sinkhorn_knopp_unbalanced(a, b, c, reg=0.1, reg_m=0.7, stopThr=1e-14, numItermax=20000)
    sampler = OTPlanSampler(method, 0.1, 0.7, normalize_cost, tol=1e-11)
    plan = sampler.get_map(x0, x1)
    assert (type(plan), plan.dtype, plan.shape) == (np.ndarray, np.float64, (24, 18))
    np.testing.assert_allclose(plan, expected, rtol=1e-6, atol=1e-12)
    assert OTPlanSampler(method, 0.1).get_map(x0.float(), x1.float()).dtype == np.float64


def test_the_signature_is_torchcfms():
    def names(function):
        return [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.KEYWORD_ONLY][1:]

    defaults = {name: p.default for name, p in inspect.signature(OTPlanSampler).parameters.items() if p.kind is not p.KEYWORD_ONLY}
    expected = {"reg": 0.05, "reg_m": 1.0, "normalize_cost": False, "num_threads": 1, "warn": True}
    assert defaults == {"method": "sinkhorn", **expected}
    assert names(OTPlanSampler.sample_plan) == ["x0", "x1", "replace"]
    assert names(OTPlanSampler.sample_plan_with_labels) == ["x0", "x1", "y0", "y1", "replace"]
    assert names(OTPlanSampler.sample_map) == ["pi", "batch_size", "replace"]
    assert names(OTPlanSampler.get_map) == ["x0", "x1"]
    assert names(OTPlanSampler.sample_trajectory) == ["X"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_unit_of_a_normalised_cost_is_its_maximum(seed, dtype):
    x0, x1 = (3.0 * torch.randn(size, 2, generator=seeded(seed), dtype=torch.float64).to(dtype) for size in (9, 40))
    largest = cost(x0.double(), x1.double()).max()
    assert _largest_cost(x0, x1 + 200) == pytest.approx(float(cost(x0.double(), (x1 + 200).double()).max()), rel=1e-5)
    assert _largest_cost(x0, x1) == pytest.approx(float(largest), rel=1e-5)


def test_one_point_many_times_has_no_cost_to_normalise():
    x = torch.full((5, 2), 3.0)
    x0, x1 = OTPlanSampler(normalize_cost=True).sample_plan(x, x)
    assert torch.equal(x0, x)
    assert torch.equal(x1, x)


# Pairs


@pytest.mark.parametrize("method", ["sinkhorn", "unbalanced"])
def test_pairs_follow_the_map_and_it_is_never_built(monkeypatch, method):
    x0, x1 = batches()
    sampler, generator = OTPlanSampler(method, reg=0.1, reg_m=0.5), seeded()
    plan = torch.from_numpy(sampler.get_map(x0, x1))
    monkeypatch.setattr(Solution, "plan", None)
    solved = sampler._solve(x0, x1)
    monkeypatch.setattr(sampler, "_solve", lambda *clouds: solved)
    counts = torch.zeros(24, 18)
    for _ in range(800):
        i, j = (where(points, cloud) for points, cloud in zip(sampler.sample_plan(x0, x1, generator=generator), (x0, x1)))
        assert len(i) == len(j) == 24
        counts.index_put_((i, j), torch.ones(24), accumulate=True)
    assert fit(counts, plan / plan.sum()) > LIKELY


def test_distinct_pairs_are_distinct_and_a_generator_repeats_them():
    x0, x1 = batches()
    sampler = OTPlanSampler(reg=0.05)
    first, again = (sampler.sample_plan(x0, x1, replace=False, generator=seeded(3)) for _ in range(2))
    pairs = where(first[0], x0) * 18 + where(first[1], x1)
    assert len(pairs.unique()) == 24
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_images_and_labels_follow_their_points(dtype):
    x0, x1 = (torch.rand(20, 3, 4, 5, generator=seeded(seed), dtype=torch.float64).to(dtype) for seed in (1, 2))
    y0, y1 = torch.arange(20), torch.rand(20, 2, generator=seeded(3))
    sampler = OTPlanSampler(reg=1.0)
    new0, new1, label0, label1 = sampler.sample_plan_with_labels(x0, x1, y0, y1, generator=seeded())
    assert (new0.shape, new1.shape, new0.dtype) == (x0.shape, x1.shape, dtype)
    i, j = where(new0, x0), where(new1, x1)
    assert torch.equal(label0, y0[i])
    assert torch.equal(label1, y1[j])
    assert len(i.unique()) > 5
    plain = sampler.sample_plan(x0, x1, generator=seeded())
    assert torch.equal(plain[0], new0)
    assert sampler.sample_plan_with_labels(x0, x1, None, y1, generator=seeded())[2] is None
    assert sampler.sample_plan_with_labels(x0, x1, y0, generator=seeded())[3] is None


def test_points_keep_their_history():
    x0, x1 = batches()
    x0.requires_grad_()
    new0, _ = OTPlanSampler(reg=0.1).sample_plan(x0, x1, generator=seeded())
    new0.sum().backward()
    torch.testing.assert_close(x0.grad[:, 0], torch.bincount(where(new0.detach(), x0.detach()), minlength=24).double())


def test_numpy_in_numpy_out():
    x0, x1 = (cloud.numpy() for cloud in batches())
    answers = OTPlanSampler(reg=0.1).sample_plan_with_labels(x0, x1, np.arange(24), np.arange(18), generator=seeded())
    assert [type(answer) for answer in answers] == [np.ndarray] * 4
    np.testing.assert_array_equal(x1[answers[3]], answers[1])


def test_a_small_reg_undoes_a_permutation():
    x0 = torch.cartesian_prod(torch.arange(8.0), torch.arange(5.0))
    order = torch.randperm(40, generator=seeded(1))
    new0, new1 = OTPlanSampler(reg=0.02).sample_plan(x0, x0[order], generator=seeded())
    assert torch.equal(new0, new1)


def test_dense_maps_are_drawn_from():
    pi = np.array([[1.0, 0.0, 3.0], [0.0, 2.0, 4.0]])
    sampler = OTPlanSampler()
    i, j = sampler.sample_map(pi, 20_000, generator=seeded())
    assert (type(i), type(j)) == (np.ndarray, np.ndarray)
    counts = torch.bincount(torch.from_numpy(i * 3 + j), minlength=6)
    assert counts[1] == counts[3] == 0
    assert fit(counts[[0, 2, 4, 5]], torch.tensor([0.1, 0.3, 0.2, 0.4])) > LIKELY
    i, j = sampler.sample_map(torch.from_numpy(pi), 4, replace=False, generator=seeded())
    assert sorted(i * 3 + j) == [0, 2, 4, 5]


# Trajectories


@pytest.mark.parametrize("tail", [(2,), (1, 2, 1)])
def test_trajectories_chain_and_follow_the_rows_of_each_plan(monkeypatch, tail):
    populations = torch.rand(6, 3, *tail, generator=seeded(4), dtype=torch.float64)
    sampler, generator = OTPlanSampler(reg=0.2), seeded()
    plans = [torch.from_numpy(sampler.get_map(populations[:, t], populations[:, t + 1])) for t in (0, 1)]
    solved = {t: sampler._solve(populations[:, t], populations[:, t + 1]) for t in (0, 1)}
    monkeypatch.setattr(sampler, "_solve", lambda x0, x1: solved[0 if torch.equal(x0, populations[:, 0]) else 1])
    counts = torch.zeros(2, 6, 6)
    for _ in range(600):
        paths = sampler.sample_trajectory(populations, generator=generator)
        at = [where(paths[:, t], populations[:, t]) for t in range(3)]
        for t in (0, 1):
            counts[t].index_put_((at[t], at[t + 1]), torch.ones(6), accumulate=True)
    assert paths.shape == populations.shape
    assert torch.equal(paths[:, 0], populations[:, 0])
    for table, plan in zip(counts, plans):
        rows = plan / plan.sum(1, keepdim=True) * table.sum(1, keepdim=True)
        assert fit(table, rows / rows.sum()) > LIKELY


def test_trajectories_of_numpy_arrays():
    populations = torch.rand(6, 4, 2, generator=seeded(4)).numpy()
    paths = OTPlanSampler(reg=0.2).sample_trajectory(populations, generator=seeded())
    assert (type(paths), paths.shape) == (np.ndarray, populations.shape)
    np.testing.assert_array_equal(paths[:, 0], populations[:, 0])


# What is refused, and what is said


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OTPlanSampler("exact"), UsageError, r"got 'exact', .* type ot\.emd of POT"),
        (lambda: OTPlanSampler("partial"), UsageError, r"got 'partial', .* type ot\.partial\.entropic_partial_wasserstein of POT"),
        (lambda: OTPlanSampler("sinkorn"), UsageError, "Did you mean 'sinkhorn'"),
        (lambda: OTPlanSampler(reg=0.0), InputError, "above 0 for reg"),
        (lambda: OTPlanSampler("unbalanced", reg_m=-1.0), InputError, "above 0 for reg_m"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x, y: s.sample_plan([[0.0]], y), "a torch tensor for x0; got list"),
        (lambda s, x, y: s.sample_plan(x, y[:0]), r"x1 of shape \(points, \.\.\.\), not empty; got \(0, 2\)"),
        (
            lambda s, x, y: s.sample_plan(x, torch.zeros(4, 3, dtype=torch.float64)),
            r"clouds of one dimension; got x0 \(24, 2\) and x1",
        ),
        (lambda s, x, y: s.sample_plan(x, y.float()), "expected x1 in x0's dtype float64; got float32"),
        (lambda s, x, y: s.sample_plan(x.long(), y), "floating-point points in x0"),
        (lambda s, x, y: s.sample_plan(x * torch.nan, y), "NaN or infinity in 24 of the 24 rows of x0"),
        (lambda s, x, y: s.sample_plan(x, y, generator=3), r"a torch\.Generator; got int"),
        (lambda s, x, y: s.sample_plan_with_labels(x, y, torch.zeros(23)), "a label in y0 for each of the 24 points of x0; got 23"),
        (lambda s, x, y: s.sample_trajectory(x), r"X of shape \(points, times, \.\.\.\); got \(24, 2\)"),
        (lambda s, x, y: s.sample_map(np.zeros((2, 2)), 3), "a matrix pi of finite weights"),
        (lambda s, x, y: s.sample_map(-np.eye(2), 3), "a matrix pi of finite weights"),
        (lambda s, x, y: s.sample_map(np.eye(2), 0), "at least 1 for batch_size; got 0"),
        (lambda s, x, y: s.sample_map(np.eye(2), 3, replace=False), "at most 2 distinct pairs"),
    ],
)
def test_what_cannot_be_paired_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(OTPlanSampler(reg=0.1), *batches())


def test_a_missed_tolerance_is_said_or_not():
    x0, x1 = batches(dtype=torch.float32)
    with pytest.warns(ConvergenceWarning):
        OTPlanSampler(reg=1e-3, tol=1e-6).sample_plan(x0, x1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OTPlanSampler(reg=1e-3, tol=1e-6, warn=False).sample_plan(x0, x1)


def test_it_says_the_same_as_the_solver_it_is_made_of():
    x0, x1 = batches()
    result = otgen.solve_sample(x0, x1, reg=0.1)
    i, j = result.sample(24, seeded(5))
    new0, new1 = OTPlanSampler(reg=0.1).sample_plan(x0, x1, generator=seeded(5))
    assert torch.equal(new0, x0[i])
    assert torch.equal(new1, x1[j])
