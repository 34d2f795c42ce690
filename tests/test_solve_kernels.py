"""The kernels of a solve: a variant the caller names, and what nothing was tuned for."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from clouds import batch, problem

import otgen
from otgen import dispatch, ops, tuner
from otgen.dispatch import Choice
from otgen.errors import InputError, NoValidVariant, UsageError
from otgen.families import family
from otgen.problem import Problem, Variant
from otgen.ranking import centre
from otgen.solvers import kernels
from otgen.solvers.engine import METHODS
from otgen.store import TuningWarning, default_path

pytestmark = pytest.mark.usefixtures("streamed")

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 2, "num_stages": 1, "precision": "ieee", "stabiliser": "running"}
HALF, BOTH = {**SMALL, "fusion": "half_step"}, {**SMALL, "fusion": "one_launch", "SPLITS": 1}
"""Variants of the alternating and of the symmetric sinkhorn kernels that nobody would choose."""


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels under the interpreter, and nothing tuned or pinned."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch._DISPATCHER, "_databases", ())
    monkeypatch.setattr(dispatch._DISPATCHER, "_pins", {})
    monkeypatch.setattr(kernels, "_SEEN", set())
    dispatch.forget()
    yield
    dispatch.forget()


# variant


@pytest.mark.parametrize(
    ("method", "solve"),
    [("newton", otgen.solve_sample)]
    + [(method, solve) for method in METHODS[:3] for solve in (otgen.solve_sample, otgen.solve_sample_batch)],
)
@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_a_loop_takes_the_variant_it_is_given(interpreted, monkeypatch, method, solve):
    """All launches of its sinkhorn kernels do, no other launch does, and no later solve."""
    variant = BOTH if method == "symmetric" else HALF
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    x, y = (x, y) if solve is otgen.solve_sample else (x[None], y[None])
    taken, chosen = [], []
    named, kernel = dispatch.named, dispatch.kernel
    monkeypatch.setattr(dispatch, "named", lambda *asked: taken.append(asked) or named(*asked))
    monkeypatch.setattr(dispatch, "kernel", lambda *asked: chosen.append(asked) or kernel(*asked))
    given = {"reg": 0.2, "tol": 1e-5 if method == "newton" else 1e-2, "method": method}
    result = solve(x.requires_grad_(), y, variant=variant, **given)
    assert result.variant == Variant(variant)
    assert (result.cache, result.precision) == ("pinned", "fp32")
    assert len(taken) >= (4 if method == "newton" else np.max(result.passes) / (2 if method == "symmetric" else 1))
    assert {asked[0] for asked in taken} == {"sinkhorn"}
    assert {asked[0] for asked in chosen} == ({"hvp"} if method == "newton" else set())
    count = len(taken)
    result.value.sum().backward()
    other = solve(x, y, **given)
    assert other.variant != result.variant
    assert other.cache == "default"
    assert len(taken) == count
    torch.testing.assert_close(other.value, result.value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_its_precision_is_the_precision(interpreted):
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    coarse = {**HALF, "precision": "tf32x3"}
    for precision in ("auto", "tf32x3"):
        result = otgen.solve_sample(x, y, reg=0.2, tol=1e-2, variant=coarse, precision=precision)
        assert result.precision == "tf32x3"
        assert result._solution.steps.modes == ("tf32x3",)
    with pytest.raises(InputError, match=r"expected one precision; got precision='fp32' and a variant in tf32x3; leave precision"):
        otgen.solve_sample(x, y, reg=0.2, variant=coarse, precision="fp32")
    with pytest.raises(InputError, match="coordinates inside the range of fp16"):
        otgen.solve_sample(1e5 * x, 1e5 * y, reg=1e9, variant={**HALF, "precision": "fp16"})


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_what_a_callback_launches_is_its_own(interpreted):
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    met = []

    def callback(n, error):
        met.append(ops.kernel("sinkhorn", x, y, ops.ALTERNATING, ("ieee",)).choice.cache)

    otgen.solve_sample(x, y, reg=0.2, tol=1e-2, variant=HALF, callback=callback)
    assert set(met) == {"default"}


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_a_variant_is_dropped_when_the_solve_fails(interpreted):
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError):
        otgen.solve_sample(x, y, reg=0.2, variant=HALF, callback=lambda n, error: n / 0)
    assert otgen.solve_sample(x, y, reg=0.2, tol=1e-2).cache == "default"


MISTAKES = {
    "a name": ("fast", UsageError, r"expected variant='auto' or a mapping of axes.*got 'fast'; type variant=dict\(result"),
    "an unknown axis": ({**HALF, "BLOCK_Q": 1}, UsageError, "unknown axis of sinkhorn 'BLOCK_Q'"),
    "a missing axis": ({k: v for k, v in HALF.items() if k != "num_warps"}, UsageError, "missing num_warps"),
    "another value": ({**HALF, "num_warps": 3}, UsageError, "expected num_warps among 2, 4, 8; got 3"),
    "another schedule's": (BOTH, UsageError, "expected fusion among half_step, split_step; got 'one_launch'"),
    "a misfit": ({**HALF, "num_warps": 8}, NoValidVariant, "does not: a warp would have no 16×8 fragment"),
}


@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
@pytest.mark.parametrize(("variant", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_no_variant_of_the_problem_is_refused(interpreted, monkeypatch, solve, variant, error, message):
    monkeypatch.setattr("otgen.render.load", lambda *_: pytest.fail("a kernel was rendered"))
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    x, y = (x, y) if solve is otgen.solve_sample else (x[None], y[None])
    with pytest.raises(error, match=message):
        solve(x, y, reg=0.2, variant=variant)


@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_is_no_variant_of_what_pytorch_computes(solve, dtype):
    x, y = problem(dtype=dtype)[:2] if solve is otgen.solve_sample else batch(dtype)
    came = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"got {came} points on cpu, where there is no kernel to choose; type variant='auto'"):
        solve(x, y, reg=0.2, variant=HALF)


# tune


def test_off_refuses_a_default_variant_before_it_is_rendered(interpreted, monkeypatch):
    monkeypatch.setattr("otgen.render.load", lambda *_: pytest.fail("a kernel was rendered"))
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningWarning)
        with pytest.raises(NoValidVariant) as caught:
            otgen.solve_sample(x, y, reg=0.2, tune="off")
        with pytest.raises(NoValidVariant, match=r"batch=2"):
            otgen.solve_sample_batch(x[None], y[None], reg=0.2, tune="off")
    text = str(caught.value)
    assert text.startswith("expected a tuned variant of sinkhorn[schedule=alternating] ")
    assert "run `otgen tune --gpu a100 --family sinkhorn --shape " in text
    assert text.endswith("or type tune='cache'")


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_off_accepts_whatever_was_tuned(interpreted, monkeypatch):
    """With a stand-in for the databases: a row of another GPU will do."""
    target = family("sinkhorn").problem(9, 7, 2, schedule="alternating")
    choice = Choice(family("sinkhorn").default(target), "ported")
    asked = []

    def explain(problem, gpu, modes):
        asked.append(problem)
        return dispatch.Explanation((), (), choice)

    monkeypatch.setattr(dispatch, "explain", explain)
    x, y, _, _ = problem(12, 7, 2, dtype=torch.float32)
    for _ in range(2):
        assert otgen.solve_sample(x, y, reg=0.2, tol=1e-2, tune="off").converged
    assert sorted((p.family, p.n, p.m) for p in asked) == [("sinkhorn", 7, 12), ("sinkhorn", 12, 7)], "asked once, not per call"


@pytest.mark.parametrize(
    ("method", "options", "refused"),
    [
        ("anderson", {}, ""),
        ("alternating", {"scaling": 0.5}, ""),
        ("alternating", {"debias": True}, "sinkhorn[schedule=own]"),
        ("newton", {}, "hvp[product=matvec]"),
        ("symmetric", {}, ""),
        ("symmetric", {"scaling": 0.5}, "sinkhorn[schedule=alternating]"),
        ("symmetric", {"debias": True}, "sinkhorn[schedule=own]"),
    ],
)
def test_off_refuses_what_a_named_variant_does_not_serve(interpreted, monkeypatch, method, options, refused):
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    variant = BOTH if method == "symmetric" else HALF
    given = {"reg": 0.05, "tol": 1e-2, "method": method, "variant": variant, "tune": "off", **options}
    if not refused:
        with warnings.catch_warnings():
            warnings.simplefilter("error", TuningWarning)
            assert otgen.solve_sample(x, y, **given).cache == "pinned"
        return
    monkeypatch.setattr("otgen.render.load", lambda *_: pytest.fail("a kernel was rendered"))
    with pytest.raises(NoValidVariant) as caught:
        otgen.solve_sample(x, y, **given)
    assert f"expected a tuned variant of {refused} " in str(caught.value)


def test_off_accepts_a_pin(interpreted):
    otgen.pin("sinkhorn", schedule="alternating", variant=HALF)
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    assert otgen.solve_sample(x, y, reg=0.2, tol=1e-2, tune="off").variant == Variant(HALF)


@pytest.fixture
def tuned(monkeypatch):
    """Stands for the tuner: what it was asked, and "forget" whenever dispatch was told to read again."""
    asked = []

    def tune(problems, gpu, store, settings, listener):
        asked.append((list(problems), gpu.slug, store.path, settings))
        yield from ()

    forget = dispatch.forget
    monkeypatch.setattr(tuner, "tune", tune)
    monkeypatch.setattr(dispatch, "forget", lambda: asked.append("forget") or forget())
    return asked


@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_now_tunes_what_the_loop_launches_once(interpreted, tuned):
    x, y, _, _ = problem(12, 7, 2, dtype=torch.float32)
    otgen.solve_sample(x, y, reg=0.2, tol=1e-2, tune="now")
    flags = (("schedule", "alternating"),)
    expected = [Problem("sinkhorn", 7, 12, 2, flags=flags), Problem("sinkhorn", 12, 7, 2, flags=flags)]
    assert [call[0][0] for call in tuned[::2]] in (expected, expected[::-1])
    assert tuned[1::2] == ["forget", "forget"]
    for problems, gpu, path, settings in tuned[::2]:
        assert (len(problems), gpu, path) == (1, "a100", default_path())
        assert settings == tuner.Settings(measured=False), "the interpreter has no GPU to measure on"
    otgen.solve_sample(x, y, reg=0.2, tol=1e-2, tune="now")
    assert len(tuned) == 4
    otgen.solve_sample(x, y, reg=0.2, tol=1e-2, tune="now", method="newton", debias=True)
    assert {centre(call[0][0]) for call in tuned[4::2]} == {
        centre(Problem("hvp", n, m, 2, flags=(("product", "matvec"),))) for n, m in ((12, 7), (7, 12))
    } | {centre(Problem("sinkhorn", n, n, 2, flags=ops.OWN)) for n in (12, 7)}


@pytest.mark.parametrize(("cache", "tunes"), [("exact", False), ("pinned", False), ("nearest", True), ("predicted", True)])
@pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")
def test_now_leaves_what_was_measured_alone(interpreted, tuned, monkeypatch, cache, tunes):
    x, y, _, _ = problem(9, 7, 2, dtype=torch.float32)
    default = family("sinkhorn").default(family("sinkhorn").problem(9, 7, 2))
    monkeypatch.setattr(dispatch, "explain", lambda *_: dispatch.Explanation((), (), Choice(default, cache)))
    otgen.solve_sample(x, y, reg=0.2, tol=1e-2, tune="now")
    assert bool(tuned) == tunes


@pytest.mark.parametrize("tune", ["cache", "now", "off"])
@pytest.mark.parametrize("solve", [otgen.solve_sample, otgen.solve_sample_batch])
def test_there_is_nothing_to_tune_in_pytorch(tuned, solve, tune):
    x, y = problem()[:2] if solve is otgen.solve_sample else batch()
    assert np.all(solve(x, y, reg=0.2, tune=tune).converged)
    assert not tuned
