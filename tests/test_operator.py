"""The plan as an operator and as something to index, sums over it, and the divergence under POT's name.

Against dense formulas, POT, GeomLoss and OTT.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clouds import cost, geomloss_without_annealing, problem, uneven

import otgen
from otgen.errors import InputError, UsageError
from otgen.solvers import operator
from otgen.solvers.solution import Solution

pytestmark = pytest.mark.usefixtures("streamed")

REG = 0.1
CASES = {
    "balanced": {},
    "relaxed": {"unbalanced": 0.4},
    "half relaxed": {"unbalanced": (0.4, None)},
    "debiased": {"debias": True},
    "debiased, relaxed": {"unbalanced": 0.4, "debias": True},
}


def measures(options, dtype=torch.float64):
    """Clouds with a few points of no weight on either side, and of masses that differ if they may."""
    x, y, a, b = uneven() if "unbalanced" in options else problem()
    mass_a, mass_b = a.sum(), b.sum()
    a[[0, 7]] = 0.0
    b[[3, -1]] = 0.0
    return [tensor.to(dtype) for tensor in (x, y, a * mass_a / a.sum(), b * mass_b / b.sum())]


def solve(options, dtype=torch.float64, **more):
    tensors = measures(options, dtype)
    return otgen.solve_sample(*tensors, **{"reg": REG, "tol": 1e-10, **options, **more}), tensors


def dense(result, x, y, a, b):
    """(density, plan) by the formula, from the potentials of a result."""
    density = ((result.potential_a[:, None] + result.potential_b - cost(x, y)) / REG).exp()
    return density, a[:, None] * density * b


@pytest.fixture
def solved():
    return solve({})[0]


# What can be indexed

KEYS = {
    "row": 4,
    "last row": -1,
    "numpy integer": np.int64(3),
    "tensor integer": torch.tensor(3),
    "rows": slice(2, 9),
    "all": slice(None),
    "no rows": slice(9, 2),
    "rows beyond": slice(50, 1000),
    "strided rows": slice(None, None, 7),
    "rows backwards": slice(None, None, -1),
    "column": (slice(None), 5),
    "block": (slice(2, 9), slice(-4, None)),
    "row of a block": (2, slice(3, 8)),
    "entry": (2, -3),
    "empty tuple": (),
    "row in a tuple": (2,),
    "column of rows backwards": (slice(9, 2, -2), -1),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_gives_what_it_gives_of_the_dense_plan(solved, key):
    expected = torch.from_numpy(np.array(solved.plan.numpy()[key]))
    answer = solved.lazy_plan[key]
    assert answer.shape == expected.shape
    assert (answer.dtype, answer.requires_grad) == (torch.float64, False)
    torch.testing.assert_close(answer, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "kind", [torch.tensor, np.array, lambda v: torch.tensor(v, dtype=torch.uint8), lambda v: np.array(v, "<u4")]
)
def test_vectors_of_indices_stand_for_rows_columns_and_pairs(solved, kind):
    i, j = [5, 0, 59, 5], [44, 2, 0, 44]
    for key, dense_key in (
        (kind(i), i),
        ((kind(i), slice(3, 9)), (i, slice(3, 9))),
        ((slice(3, 9), kind(j)), (slice(3, 9), j)),
        ((7, kind(j)), (7, j)),
        ((kind(i), -2), (i, -2)),
        ((kind(i), kind(j)), (i, j)),
    ):
        expected = solved.plan[dense_key]
        answer = solved.lazy_plan[key]
        assert answer.shape == expected.shape
        torch.testing.assert_close(answer, expected, rtol=1e-11, atol=0)


def test_negative_indices_in_vectors_count_from_the_end(solved):
    torch.testing.assert_close(solved.lazy_plan[torch.tensor([-1, -60])], solved.plan[[59, 0]], rtol=1e-11, atol=0)


def test_pairs_drawn_are_read_off(solved):
    i, j = solved.sample(30, torch.Generator().manual_seed(0))
    values = solved.lazy_plan[i, j]
    assert (values > 0).all()
    torch.testing.assert_close(values, solved.plan[i, j], rtol=1e-11, atol=0)


def test_it_has_a_length_a_shape_and_rows(solved):
    lazy = solved.lazy_plan
    assert (len(lazy), lazy.shape, lazy.ndim, repr(lazy)) == (60, (60, 45), 2, "LazyPlan(shape=(60, 45))")
    rows = list(lazy)
    assert len(rows) == 60
    torch.testing.assert_close(torch.stack(rows), solved.plan, rtol=1e-11, atol=0)
    assert solved.lazy_plan is lazy


BAD = {
    "row": (60, "row indices from -60 to 59; got 60"),
    "row below": (-61, "got -61"),
    "row far beyond": (2**70, "row indices from -60 to 59"),
    "column": ((0, 45), "column indices from -45 to 44; got 45"),
    "column below": ((slice(None), -46), "got -46"),
    "in a vector": (np.array([0, 60]), "got 60"),
    "in a pair": ((np.array([0]), np.array([-46])), r"column indices .* got -46"),
    "three": ((0, 0, 0), r"at most 2 indices, .* got 3"),
    "float": (1.0, "row index; got float"),
    "name": ("a", "got str"),
    "vector of floats": (np.array([0.5]), r"got float64 of shape \(1,\)"),
    "pairs of two lengths": ((np.arange(3), np.arange(4)), "one length for pairs; got 3 and 4"),
}


@pytest.mark.parametrize(("key", "message"), BAD.values(), ids=BAD)
def test_a_wrong_index_is_an_index_error_as_in_numpy(solved, key, message):
    with pytest.raises(IndexError):
        solved.plan.numpy()[key]
    with pytest.raises(IndexError, match=message):
        solved.lazy_plan[key]


@pytest.mark.parametrize("key", [True, None, ..., [0, 1], np.zeros(60, bool), torch.zeros(60) > 0, np.zeros((2, 2), int)])
def test_what_numpy_takes_and_this_does_not_is_an_index_error(solved, key):
    with pytest.raises(IndexError, match="expected an integer, a slice or a vector of integers as row index; got"):
        solved.lazy_plan[key]


def test_blocks_are_refused_above_a_size_and_rows_are_not(solved, monkeypatch):
    plan = solved.plan.clone()
    monkeypatch.setattr(operator, "PLAN_LIMIT", 45 * 8)
    torch.testing.assert_close(solved.lazy_plan[3], plan[3], rtol=1e-11, atol=0)
    with pytest.raises(InputError, match=r"a block of at most 360 bytes; 2 × 45 entries take 720; type fewer rows"):
        solved.lazy_plan[3:5]
    with pytest.raises(InputError, match=r"a density of at most 360 bytes; 60 × 45 entries take 21,600; type result\.lazy_plan"):
        _ = solved.density


# What can be multiplied by


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_operator_multiplies_by_the_plan_and_is_never_dense(options, monkeypatch):
    result, tensors = solve(options)
    _, plan = dense(result, *tensors)
    monkeypatch.setattr(operator, "PLAN_LIMIT", 1)
    monkeypatch.setattr(Solution, "plan", lambda self: pytest.fail("dense"))
    forward = result.plan_operator
    assert (forward.shape, forward.T.shape, forward.T.T.shape) == ((60, 45), (45, 60), (60, 45))
    assert repr(forward.T) == "PlanOperator(shape=(45, 60))"
    generator = torch.Generator().manual_seed(1)
    for tail in ((), (1,), (6,)):
        v, u = (torch.randn(size, *tail, generator=generator, dtype=torch.float64) for size in (45, 60))
        torch.testing.assert_close(forward @ v, plan @ v, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(forward.T @ u, plan.T @ u, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(forward.T.T @ v, forward @ v, rtol=0, atol=0)


def test_what_does_not_fit_the_operator_is_refused(solved):
    forward = solved.plan_operator
    for map_, v, message in (
        (forward, torch.zeros(60).double(), r"shape \(45\) or \(45, k\); got \(60,\); type operator\.T @ v"),
        (forward.T, torch.zeros(45, 2).double(), r"shape \(60\) or \(60, k\); got \(45, 2\); type operator\.T @ v"),
        (forward, torch.zeros(44).double(), r"v of shape \(45\); got \(44,\)"),
        (forward, torch.zeros(45, 2, 2).double(), r"v of shape \(45, k\)"),
        (forward, torch.zeros(45).half(), "dtype"),
        (forward, np.zeros(45), "a torch tensor for v"),
        (forward, 3.0, "a torch tensor for v"),
    ):
        with pytest.raises(InputError, match=message):
            map_ @ v


# The density, and sums over the plan


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_density_has_no_weights(options):
    """Where there is none it is still that of a point outside the sample; the plan is zero there."""
    result, tensors = solve(options)
    density, plan = dense(result, *tensors)
    torch.testing.assert_close(result.density, density, rtol=1e-9, atol=0)
    assert result.density[0].min() > 0
    assert float(result.plan[0].abs().max()) == float(result.lazy_plan[:, 3].abs().max()) == 0.0
    torch.testing.assert_close(result.lazy_plan[:], plan, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["alternating", "symmetric", "anderson"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_sums_over_the_plan(options, method):
    result, (x, y, a, b) = solve(options, method=method)
    _, plan = dense(result, x, y, a, b)
    torch.testing.assert_close(result.marginal(1), plan.sum(1), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(result.marginal(0), plan.sum(0), rtol=1e-8, atol=1e-12)
    assert float(result.transport_mass) == pytest.approx(float(plan.sum()), rel=1e-8)
    assert float(result.primal_cost) == pytest.approx(float((plan * cost(x, y)).sum()), rel=1e-8)
    assert float(result.entropy) == pytest.approx(-float(torch.special.xlogy(plan, plan).sum()), rel=1e-8)
    logs = torch.special.xlogy(a, a).sum() + torch.special.xlogy(b, b).sum()
    expected = a @ result.potential_a + b @ result.potential_b + REG * logs
    assert float(result.dual_cost) == pytest.approx(float(expected), rel=1e-8)
    if "unbalanced" not in options and not options.get("debias"):
        assert float(result.dual_cost) == pytest.approx(float(result.value + REG * logs), rel=1e-8)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_weights_are_inside_f_and_g(options):
    result, (x, y, a, b) = solve(options)
    _, plan = dense(result, x, y, a, b)
    torch.testing.assert_close(((result.f[:, None] + result.g - cost(x, y)) / REG).exp(), plan, rtol=1e-9, atol=0)
    assert (result.f == -torch.inf).nonzero().flatten().tolist() == [0, 7]
    assert (result.g == -torch.inf).nonzero().flatten().tolist() == [3, 44]


def test_a_debiased_result_tells_of_the_plan_between_the_two_clouds():
    plain, debiased = solve({})[0], solve({"debias": True})[0]
    assert float(debiased.value) < float(plain.value)
    for name in ("f", "g", "density", "primal_cost", "dual_cost", "entropy", "transport_mass"):
        torch.testing.assert_close(getattr(debiased, name), getattr(plain, name), rtol=0, atol=0)


def test_what_needs_a_sweep_takes_one_and_is_kept(monkeypatch):
    result, _ = solve({})
    sweeps = []
    apply = Solution.apply
    monkeypatch.setattr(Solution, "apply", lambda *args, **options: (sweeps.append(1), apply(*args, **options))[1])
    for _ in range(2):
        _ = (result.primal_cost, result.entropy, result.value_linear, result.dual_cost, result.transport_mass, result.f, result.g)
        _ = (result.marginal(0), result.marginal(1), result.lazy_plan[2], result.plan_operator.shape)
    assert len(sweeps) == 1
    assert result.entropy is result.entropy
    assert result.density is result.density


@pytest.mark.parametrize("axis", [2, -1, None, "a"])
def test_a_marginal_has_one_of_two_axes(solved, axis):
    with pytest.raises(InputError, match=r"expected axis 0 .* or 1"):
        solved.marginal(axis)


def test_numpy_in_numpy_out():
    tensors = measures({})
    result = otgen.solve_sample(*(tensor.numpy() for tensor in tensors), reg=REG, tol=1e-10)
    expected, _ = solve({})
    v = tensors[3].numpy()
    for answer, tensor in (
        (result.lazy_plan[2:5, ::-1], expected.plan[2:5].flip(1)),
        (result.lazy_plan[np.array([1, 2]), np.array([0, 9])], expected.plan[[1, 2], [0, 9]]),
        (result.plan_operator @ v, expected.plan @ tensors[3]),
        (result.plan_operator.T @ tensors[2].numpy(), expected.plan.T @ tensors[2]),
        (result.density, expected.density),
        (result.f, expected.f),
        (result.marginal(0), expected.marginal_b),
    ):
        assert isinstance(answer, np.ndarray)
        np.testing.assert_allclose(answer, tensor.numpy(), rtol=1e-10)
    for name in ("transport_mass", "primal_cost", "dual_cost", "entropy"):
        assert isinstance(getattr(result, name), np.float64)
    assert isinstance(result.lazy_plan[1, 2], np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float32_answers_are_near_those_of_float64(dtype):
    x, y, _, _ = measures({}, dtype)
    a, b = (tensor.float() for tensor in measures({})[2:])
    result = otgen.solve_sample(x, y, a, b, reg=REG, tol=1e-5)
    a, b = a.double(), b.double()
    exact = otgen.solve_sample(x.double(), y.double(), a / a.sum(), b / b.sum(), reg=REG, tol=1e-5)
    for name in ("entropy", "dual_cost", "primal_cost", "transport_mass", "density"):
        assert getattr(result, name).dtype == torch.float32
        torch.testing.assert_close(getattr(result, name).double(), getattr(exact, name), rtol=2e-4, atol=2e-5)
    assert result.lazy_plan[0:9].dtype == torch.float32
    torch.testing.assert_close(result.lazy_plan[0:9], result.plan[0:9], rtol=1e-5, atol=0)


# What it cites


def test_the_papers_are_those_of_the_problem_solved():
    cited = {name: solve(options)[0].citation for name, options in CASES.items()}
    for name, text in cited.items():
        assert "@inproceedings{cuturi2013sinkhorn," in text
        assert ("feydy2019interpolating" in text) == ("debias" in name)
        assert ("chizat2018scaling" in text) == ("relaxed" in name)
        assert text.count("{") == text.count("}")


# POT


def test_lazy_plan_is_that_of_pot():
    """POT's own LazyTensor over its plan gives the same blocks, and POT's reduction takes ours."""
    bregman, utils = pytest.importorskip("ot.bregman"), pytest.importorskip("ot.utils")
    x, y, a, b = (tensor.numpy() for tensor in problem())
    result = otgen.solve_sample(x, y, a, b, reg=REG, tol=1e-12)
    plan = bregman.sinkhorn_log(a, b, utils.dist(x, y), REG, stopThr=1e-13, numItermax=10000)
    theirs = utils.LazyTensor(plan.shape, lambda i, j, P: P[i, j], P=plan)
    assert result.lazy_plan.shape == theirs.shape
    assert result.lazy_plan.ndim == theirs.ndim
    for key in (3, slice(4, 9), (slice(4, 9), slice(7, 11)), (3, 4), (slice(None), 2)):
        np.testing.assert_allclose(result.lazy_plan[key], theirs[key], rtol=1e-8)
    for axis, weights in ((1, a), (0, b)):
        np.testing.assert_allclose(utils.reduce_lazytensor(result.lazy_plan, np.sum, axis, batch_size=7), weights, rtol=1e-9)


def test_the_divergence_is_the_debiased_solve():
    x, y, a, b = (tensor.requires_grad_() for tensor in problem())
    result = otgen.empirical_sinkhorn_divergence(x, y, a, b, reg=REG, tol=1e-10)
    expected = otgen.solve_sample(x, y, a, b, reg=REG, tol=1e-10, debias=True)
    torch.testing.assert_close(result.value, expected.value, rtol=0, atol=0)
    for mine, theirs in zip(*(torch.autograd.grad(r.value, (x, y, a, b)) for r in (result, expected))):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    aliased = otgen.empirical_sinkhorn_divergence(x, y, a, b, blur=(REG / 2) ** 0.5, tol=1e-10, unbalanced=0.5)
    assert aliased.unbalanced == (0.5, 0.5)
    same = otgen.empirical_sinkhorn_divergence(x.detach(), x.detach(), reg=REG, tol=1e-10)
    assert float(same.value) == pytest.approx(0.0, abs=1e-10)


def test_pots_number_is_what_the_linear_costs_make():
    bregman = pytest.importorskip("ot.bregman")
    x, y, a, b = (tensor.numpy() for tensor in problem())
    theirs = float(bregman.empirical_sinkhorn_divergence(x, y, REG, a, b, stopThr=1e-13, numIterMax=20000))
    result = otgen.empirical_sinkhorn_divergence(x, y, a, b, reg=REG, tol=1e-11)
    own = [otgen.solve_sample(z, z, w, w, reg=REG, tol=1e-11).value_linear for z, w in ((x, a), (y, b))]
    assert result.value_linear - sum(own) / 2 == pytest.approx(theirs, rel=1e-8)
    assert abs(float(result.value) - theirs) > 1e-3


def test_pots_order_of_arguments_and_a_debias_are_refused():
    x, y, _, _ = problem()
    with pytest.raises(UsageError, match=r"third place; got 0\.1; type reg=0\.1"):
        otgen.empirical_sinkhorn_divergence(x, y, 0.1)
    with pytest.raises(UsageError, match=r"got debias=False; type otgen\.solve_sample"):
        otgen.empirical_sinkhorn_divergence(x, y, reg=REG, debias=False)
    with pytest.raises(InputError, match="one of reg and blur; got neither"):
        otgen.empirical_sinkhorn_divergence(x, y)


# GeomLoss


@pytest.mark.parametrize("unbalanced", [None, 0.6])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_operator_and_density_are_those_of_geomloss(monkeypatch, unbalanced, kind):
    """GeomLoss 0.3.1 takes `plan_operator.T` for square plans only."""
    ot = pytest.importorskip("geomloss.ot")
    geomloss_without_annealing(monkeypatch)
    tensors = measures({} if unbalanced is None else {"unbalanced": unbalanced})
    if kind == "numpy":
        tensors = [tensor.numpy() for tensor in tensors]
    mine = otgen.solve_sample(*tensors, reg=REG, unbalanced=unbalanced, tol=1e-12)
    theirs = ot.solve_sample(*tensors, reg=REG, unbalanced=unbalanced, max_iter=2)
    u, v = tensors[2][:, None] * tensors[0], tensors[1]
    assert mine.plan_operator.shape == theirs.plan_operator.shape
    assert mine.plan_operator.T.shape == theirs.plan_operator.T.shape
    for answer, expected in (
        (mine.density, theirs.density),
        (mine.plan_operator @ v, theirs.plan_operator @ v),
        (mine.plan_operator.T @ u, theirs.plan.T @ u),
        (mine.plan_operator @ v[:, 0], theirs.plan_operator @ v[:, 0]),
    ):
        assert type(answer) is type(expected)
        np.testing.assert_allclose(np.asarray(answer), np.asarray(expected), rtol=1e-6, atol=1e-14)


# OTT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("weightless", [False, True])
def test_ott_has_the_same_names_for_the_same_numbers(weightless):
    """Balanced: relaxed, OTT penalises KL(P | 1⊗1) and has another plan. Potentials are equal up to (f + t, g − t)."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("ott")
    from ott.geometry import pointcloud
    from ott.solvers import linear

    x, y, a, b = measures({}) if weightless else problem()
    v = torch.randn(45, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with jax.enable_x64(True):
        geometry, weights = [jax.numpy.asarray(t.numpy()) for t in (x, y)], [jax.numpy.asarray(t.numpy()) for t in (a, b)]
        cloud = pointcloud.PointCloud(*geometry, epsilon=REG)
        out = linear.solve(cloud, *weights, threshold=1e-12, max_iterations=5000)
        names = ("f", "g", "dual_cost", "primal_cost", "transport_mass", "entropy", "reg_ot_cost")
        theirs = {name: torch.from_numpy(np.array(getattr(out, name))) for name in names}
        sums = [torch.from_numpy(np.array(out.marginal(axis))) for axis in (0, 1)]
        applied = torch.from_numpy(np.array(out.apply(jax.numpy.asarray(v.numpy()), axis=1)))
    mine = otgen.solve_sample(x, y, a, b, reg=REG, tol=1e-12)
    t = theirs["f"][1] - mine.f[1]
    torch.testing.assert_close(mine.f + t, theirs["f"], rtol=0, atol=1e-9)
    torch.testing.assert_close(mine.g - t, theirs["g"], rtol=0, atol=1e-9)
    for name in ("dual_cost", "primal_cost", "transport_mass", "entropy"):
        torch.testing.assert_close(getattr(mine, name), theirs[name], rtol=1e-9, atol=0)
    torch.testing.assert_close(mine.value, theirs["reg_ot_cost"], rtol=1e-9, atol=0)
    for axis in (0, 1):
        torch.testing.assert_close(mine.marginal(axis), sums[axis], rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(mine.apply(v, axis=1), applied, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(mine.plan_operator @ v, applied, rtol=1e-8, atol=1e-13)
