"""Batches: every problem ends where it would alone, one launch serves them all, and each stops by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import otgen
from otgen import ops
from otgen.errors import ConvergenceWarning, InputError, UsageError
from otgen.solvers import engine
from otgen.store import TuningWarning

pytestmark = pytest.mark.usefixtures("streamed")

REG = torch.tensor([0.5, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64)
MODES = [{}, {"unbalanced": 0.5}, {"unbalanced": (0.5, None)}, {"debias": True}, {"debias": True, "unbalanced": 1.0}]


def stacked(batch=5, n=40, m=33, d=3, dtype=torch.float64, seed=0):
    """Clouds of one size and random weights of mass one."""
    generator = torch.Generator().manual_seed(seed)
    x, y, a, b = (torch.rand(batch, *shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (m, d), (n,), (m,)))
    return tuple(t.to(dtype) for t in (x, 2 * y, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)))


def ragged(sizes=((40, 33), (1, 20), (17, 50), (25, 1)), d=3, dtype=torch.float64, seed=0):
    """Clouds of these sizes, shuffled together, with the problem of each point."""
    generator = torch.Generator().manual_seed(seed)
    parts = [stacked(1, n, m, d, dtype, seed=seed + i) for i, (n, m) in enumerate(sizes)]
    sides = []
    for points, weights, side in ((0, 2, 0), (1, 3, 1)):
        owner = torch.cat([torch.full((size[side],), i) for i, size in enumerate(sizes)])
        order = torch.randperm(len(owner), generator=generator)
        x, w = (torch.cat([part[k][0] for part in parts])[order] for k in (points, weights))
        sides.append((x, w, owner[order]))
    (x, a, batch_a), (y, b, batch_b) = sides
    return x, y, a, b, batch_a, batch_b


def level(potential):
    """A potential without the constant that a balanced problem leaves open."""
    return potential - potential.mean()


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("method", ["auto", "alternating", "symmetric"])
def test_every_problem_ends_where_it_would_alone(method, options):
    """In as many iterations, at its own reg, whatever the others do."""
    x, y, a, b = stacked()
    both = {"method": method, "tol": 1e-6, "max_iter": 20000, **options}
    result = otgen.solve_sample_batch(x, y, a, b, reg=REG, **both)
    for i in range(5):
        alone = otgen.solve_sample(x[i], y[i], a[i], b[i], reg=float(REG[i]), **both)
        assert (result.n_iters[i], result.stop[i]) == (alone.n_iters, "tol")
        assert result.passes[i] - alone.passes == (1 if method == "symmetric" else 0)
        assert result.marginal_error[i] == pytest.approx(alone.marginal_error, rel=1e-3)
        torch.testing.assert_close(result.value[i], alone.value, rtol=1e-12, atol=1e-12)
        for name in ("potential_a", "potential_b", "marginal_a", "marginal_b", "a_to_b", "b_to_a", "value_linear"):
            torch.testing.assert_close(getattr(result, name)[i], getattr(alone, name), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(getattr(result[i], name), getattr(result, name)[i], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_clouds_of_different_sizes_in_any_order(options):
    x, y, a, b, batch_a, batch_b = ragged()
    result = otgen.solve_sample_batch(x, y, a, b, batch_a=batch_a, batch_b=batch_b, reg=0.05, tol=1e-7, **options)
    assert result.potential_a.shape == a.shape
    for i in range(4):
        mine, other = batch_a == i, batch_b == i
        alone = otgen.solve_sample(x[mine], y[other], a[mine], b[other], reg=0.05, tol=1e-7, **options)
        torch.testing.assert_close(result.value[i], alone.value, rtol=1e-9, atol=1e-9)
        same = level if result[i]._solution.steps.balanced else torch.clone
        torch.testing.assert_close(same(result.potential_a[mine]), same(alone.potential_a), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.a_to_b[mine], alone.a_to_b, rtol=1e-5, atol=1e-6)
        assert result[i].plan.shape == alone.plan.shape
        torch.testing.assert_close(result[i].plan, alone.plan, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "swept"])
def test_kept_exponentials_change_nothing(monkeypatch, kept):
    calls = []
    monkeypatch.setattr(engine, "keepable", lambda steps: calls.append(1) or kept)
    x, y, a, b, batch_a, batch_b = ragged()
    result = otgen.solve_sample_batch(x, y, a, b, batch_a=batch_a, batch_b=batch_b, reg=0.01, tol=1e-8)
    assert calls
    assert result.converged.all()
    rows = [result[i].plan.sum(1) for i in range(4)]
    errors = [float((r - a[batch_a == i][:]).abs().sum()) for i, r in enumerate(rows)]
    assert max(errors) <= 1.01e-8


def test_interpreted_kernels_solve_a_ragged_batch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, y, a, b, batch_a, batch_b = ragged(((20, 9), (3, 17)), dtype=torch.float32)
    with pytest.warns(TuningWarning):
        result = otgen.solve_sample_batch(x, y, a, b, batch_a=batch_a, batch_b=batch_b, reg=0.2, tol=1e-4, debias=True)
    assert result.converged.all()
    monkeypatch.delenv("TRITON_INTERPRET")
    whole = (
        w.double() / torch.zeros(2).double().index_add(0, owner, w.double())[owner] for w, owner in ((a, batch_a), (b, batch_b))
    )
    expected = otgen.solve_sample_batch(
        x.double(), y.double(), *whole, batch_a=batch_a, batch_b=batch_b, reg=0.2, tol=1e-9, debias=True
    )
    torch.testing.assert_close(result.value.double(), expected.value, rtol=1e-4, atol=1e-5)


def test_a_step_is_one_launch_and_problems_that_are_done_rest(monkeypatch):
    """The number of launches is that of the slowest problem's sweeps; no launch works on a problem after its last iteration."""
    launches = []
    whole = ops.sinkhorn_half_step

    def counted(*args, **options):
        launches.append((options["extents"][0] > 0).tolist())
        return whole(*args, **options)

    monkeypatch.setattr(ops, "sinkhorn_half_step", counted)
    monkeypatch.setattr(engine, "keepable", lambda steps: False)
    x, y, a, b = stacked(dtype=torch.float32)
    result = otgen.solve_sample_batch(x, y, a, b, reg=REG, method="alternating")
    assert len(launches) == result.passes.max()
    assert [sum(awake) for awake in zip(*launches)] == result.passes.tolist()


@pytest.mark.parametrize("options", MODES, ids=str)
def test_gradients_are_those_of_single_problems(options):
    x, y, a, b, batch_a, batch_b = ragged()
    leaves = [t.clone().requires_grad_() for t in (x, y, a, b)]
    more = {"reg": 0.05, "tol": 1e-9, **options}
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    value = otgen.solve_sample_batch(*leaves, batch_a=batch_a, batch_b=batch_b, **more).value
    (factors * value).sum().backward()
    for i in range(4):
        mine, other = batch_a == i, batch_b == i
        alone = [t.clone().requires_grad_() for t in (x[mine], y[other], a[mine], b[other])]
        (factors[i] * otgen.solve_sample(*alone, **more).value).backward()
        for leaf, part, single in zip(leaves, (mine, other, mine, other), alone):
            same = level if single.ndim == 1 and "unbalanced" not in options else torch.clone
            torch.testing.assert_close(same(leaf.grad[part]), same(single.grad), rtol=1e-6, atol=1e-7)


def test_numpy_in_numpy_out():
    x, y, a, b = (t.numpy() for t in stacked())
    result = otgen.solve_sample_batch(x, y, a, b, reg=0.1)
    for answer in (result.value, result.potential_a, result.a_to_b, result.marginal_error, result[0].plan):
        assert isinstance(answer, np.ndarray)
    assert result[0].value == result.value[0]
    assert "5 problems, 5 stopped by tol" in repr(result)


def test_a_warm_start_takes_fewer_iterations():
    x, y, a, b, batch_a, batch_b = ragged()
    more = {"batch_a": batch_a, "batch_b": batch_b, "reg": 0.02, "tol": 1e-6}
    cold = otgen.solve_sample_batch(x, y, a, b, **more)
    warm = otgen.solve_sample_batch(x, y, a, b, potentials_init=cold.potentials, **more)
    assert cold.n_iters.max() > 20
    assert warm.n_iters.max() == 1


def test_problems_that_miss_the_tolerance_are_one_warning():
    x, y, a, b = stacked()
    seen = []
    with pytest.warns(ConvergenceWarning, match=r"2 of 5 problems missed tol=1e-06; problem 4: the marginal error is") as caught:
        result = otgen.solve_sample_batch(
            x, y, a, b, reg=REG, tol=1e-6, max_iter=40, callback=lambda n, error: seen.append((n, error))
        )
    assert len(caught) == 1
    assert result.stop.tolist() == ["tol"] * 3 + ["max_iter"] * 2
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)
    assert seen[-1][0] == 40
    assert any(seen[-1][1] == pytest.approx(error) for error in result.marginal_error)


def test_one_problem_out_of_range_does_not_disturb_the_others():
    x, y, a, b = stacked(dtype=torch.float32)
    y[2] += 1e19
    with pytest.warns(ConvergenceWarning, match="1 of 5 problems .*problem 2"):
        result = otgen.solve_sample_batch(x, y, a, b, reg=0.05)
    assert result.stop.tolist() == ["tol", "tol", "nan", "tol", "tol"]
    alone = otgen.solve_sample(x[3], y[3], a[3], b[3], reg=0.05)
    assert float(result.value[3]) == pytest.approx(float(alone.value), rel=1e-5)


def test_points_without_weight_count_for_nothing():
    x, y, a, b = stacked()
    a[1, ::2], b[3, :5] = 0.0, 0.0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    result = otgen.solve_sample_batch(x, y, a, b, reg=0.05, tol=1e-8)
    for i in (1, 3):
        mine, other = a[i] > 0, b[i] > 0
        alone = otgen.solve_sample(x[i][mine], y[i][other], a[i][mine], b[i][other], reg=0.05, tol=1e-8)
        torch.testing.assert_close(result.value[i], alone.value, rtol=1e-7, atol=1e-9)
        assert not result[i].plan[~mine].any()


@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((1, 7), (300, 2)), ((2, 2), (600, 500))], ids=str)
def test_awkward_sizes(sizes):
    x, y, a, b, batch_a, batch_b = ragged(sizes)
    result = otgen.solve_sample_batch(x, y, a, b, batch_a=batch_a, batch_b=batch_b, reg=0.1, tol=1e-6)
    assert result.converged.all()
    masses = torch.zeros(len(sizes), dtype=a.dtype).index_add(0, batch_a, result.marginal_a)
    torch.testing.assert_close(masses, torch.ones_like(masses))


def test_a_part_of_a_debiased_batch_has_its_own_potentials():
    """Also where the sides differ in size: own costs are of one side."""
    x, y, a, b, batch_a, batch_b = ragged()
    result = otgen.solve_sample_batch(x, y, a, b, batch_a=batch_a, batch_b=batch_b, reg=0.2, tol=1e-9, debias=True)
    for i in range(4):
        mine, other = batch_a == i, batch_b == i
        alone = otgen.solve_sample(x[mine], y[other], a[mine], b[other], reg=0.2, tol=1e-9, debias=True)
        torch.testing.assert_close(result[i].potential_aa, alone.potential_aa, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(result[i].potential_bb, alone.potential_bb, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("reg", "unbalanced"), [(0.06, 2000.0), (0.01, 1e4), (0.02, 1e5)])
def test_unequal_masses_under_a_large_strength_converge_in_float32(reg, unbalanced):
    """In a batch reg is a float32 tensor: what damping leaves of the lift, about reg/ρ, must not be a difference of ones."""
    x, y, a, b = stacked(2, dtype=torch.float32)
    both = {"reg": reg, "unbalanced": unbalanced, "tol": 3e-4}
    result = otgen.solve_sample_batch(x, y, a, 2 * b, **both)
    assert result.converged.all()
    for i in range(2):
        alone = otgen.solve_sample(x[i].double(), y[i].double(), a[i].double(), 2 * b[i].double(), **{**both, "tol": 1e-8})
        assert float(result.value[i]) == pytest.approx(float(alone.value), rel=1e-3)
        assert result.n_iters[i] <= 2 * alone.n_iters


def test_indices():
    x, y, a, b = stacked()
    result = otgen.solve_sample_batch(x, y, a, b, reg=0.1)
    assert len(result) == len(list(result)) == 5
    assert float(result[-1].value) == float(result.value[4])
    for wrong in (5, -6):
        with pytest.raises(IndexError, match="0 to 4"):
            result[wrong]


X, Y, A, _ = stacked(3)
FLAT = X.reshape(-1, 3)
OWNER = torch.arange(3).repeat_interleave(40)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((X[0], Y[0]), {}, r"X_a of shape \(batch, n, d\)"),
        ((X, Y[:2]), {}, "as many clouds on both sides; got 3 and 2"),
        ((X, Y[..., :2]), {}, "clouds of one dimension"),
        ((X, Y), {"reg": [0.1, 0.2]}, "for reg, or 3 of them"),
        ((X, Y), {"reg": [0.1, -0.2, 1.0]}, "above 0 for reg"),
        ((X, Y), {"reg": "small"}, "above 0 for reg"),
        ((X, Y), {"reg": True}, "above 0 for reg"),
        ((X, Y), {"reg": torch.tensor([True] * 3)}, "above 0 for reg"),
        ((X, Y), {"reg": None, "blur": 1e200}, "2·blur² in the range of float64"),
        ((X.float(), Y.float()), {"reg": 1e-60}, "reg in the range of float32"),
        ((X, Y), {"unbalanced": torch.ones(3)}, "above 0 for unbalanced"),
        ((X.to("meta"), Y.to("meta")), {}, "points with values in X_a"),
        ((X, Y), {"reg": None}, "one of reg and blur; got neither"),
        ((X, Y), {"blur": 0.1}, "one of reg and blur; got both"),
        ((X, Y, A[:, :5]), {}, r"weights a of shape \(3, 40\)"),
        ((X, Y, -A), {}, "non-negative weights a; got others in problem 0"),
        ((X, Y, 0 * A), {}, "some positive weights a; got others in problem 0"),
        ((X, Y, 2 * A), {}, r"equal masses; got sum\(a\) = 2 .* in problem 0"),
        ((X.int(), Y), {}, "floating-point points in X_a"),
        ((X, Y.float()), {}, "X_b in X_a's dtype"),
        ((X, Y.numpy()), {}, "a torch tensor for X_b"),
        ((X.index_fill(0, torch.tensor([1]), math.nan), Y), {}, "finite points .* in problem 1"),
        ((X, Y), {"batch_a": OWNER}, "batch_a and batch_b, or neither"),
        ((FLAT, FLAT), {"batch_a": OWNER[:5], "batch_b": OWNER}, r"batch_a of shape \(120,\)"),
        ((FLAT, FLAT), {"batch_a": OWNER.double(), "batch_b": OWNER}, "batch_a of shape .* got .*float64"),
        ((FLAT, FLAT), {"batch_a": OWNER - 1, "batch_b": OWNER}, "numbers from 0 without gaps in batch_a; got -1"),
        ((FLAT, FLAT), {"batch_a": OWNER, "batch_b": OWNER + 10**12}, "numbers from 0 without gaps in batch_b"),
        ((FLAT, FLAT), {"batch_a": OWNER.to(torch.uint64), "batch_b": OWNER}, "batch_a of shape .* got .*uint64"),
        ((FLAT, FLAT), {"batch_a": 2 * OWNER, "batch_b": OWNER}, "X_a has none in 1"),
        ((FLAT, FLAT), {"batch_a": OWNER, "batch_b": 0 * OWNER}, "X_b has none in 1"),
        ((X, X), {"potentials_init": (A,)}, "potentials"),
        ((X, X), {"potentials_init": ("f", "g")}, "a torch tensor for potentials_init"),
        ((X, X), {"potentials_init": A}, r"a pair \(f, g\)"),
        ((X, X), {"potentials_init": (A[:, :3], A)}, r"finite potentials of shape \(3, 40\); got \(3, 3\)"),
        ((X, X), {"potentials_init": (A * math.inf, A)}, "finite potentials"),
        ((X, X), {"tol": -1}, "above 0 for tol"),
        ((X, X), {"max_iter": 0}, "max_iter"),
        ((X, X), {"unbalanced": -1}, "above 0 for unbalanced"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(arguments, options, said):
    with pytest.raises(InputError, match=said):
        otgen.solve_sample_batch(*arguments, **{"reg": 0.1, **options})


def test_an_unknown_method_is_named():
    with pytest.raises(UsageError, match="unknown method 'fast'"):
        otgen.solve_sample_batch(X, Y, reg=0.1, method="fast")
    with pytest.raises(UsageError, match="'newton', which takes one problem"):
        otgen.solve_sample_batch(X, Y, reg=0.1, method="newton")
