"""Data no transport problem can be made of: one sentence each, saying what was expected, what came and what to type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import otgen
from otgen.errors import InputError, OtgenError, UsageError


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def clouds(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 2, generator=generator).to(dtype), torch.rand(4, 2, generator=generator).to(dtype)


def with_value(tensor, value, index=0):
    tensor = tensor.clone()
    tensor.view(-1)[index] = value
    return tensor


X, Y = clouds()
A, B = torch.full((6,), 1 / 6), torch.full((4,), 1 / 4)

CASES = {
    "NaN point": ((with_value(X, torch.nan, 3), Y), {}, r"NaN or infinity in 1 of the 6 rows of X_a; type X_a\[torch\.isfinite"),
    "infinite point": ((X, with_value(Y, torch.inf)), {}, r"NaN or infinity in 1 of the 4 rows of X_b"),
    "NaN point in numpy": ((with_value(X, torch.nan).numpy(), Y.numpy()), {}, r"numpy\.isfinite\(X_a\)\.all\(axis=1\)"),
    "points too large": ((X * 1e25, Y), {}, r"coordinates up to .*e\+2[45]; divide"),
    "NaN weight": ((X, Y, with_value(A, torch.nan), B), {}, "expected finite weights a"),
    "infinite weight": ((X, Y, A, with_value(B, torch.inf)), {}, "expected finite weights b"),
    "negative weight": ((X, Y, A, with_value(B, -0.5)), {}, r"got -0\.5; type b\.clip\(0\)"),
    "no weight at all": ((X, Y, A * 0, B), {}, "expected a positive total weight in a; got zeros"),
    "unequal masses": (
        (X, Y, A * 1.2, B),
        {},
        r"sum\(a\) = 1\.2\d* and sum\(b\) = 1; type a / a\.sum\(\) and .* or unbalanced=1\.0",
    ),
    "unequal to uniform": ((X, Y, A * 1.2), {}, r"expected equal masses"),
    "n = 0": ((X[:0], Y), {}, r"at least one point and one dimension in X_a; got \(0, 2\)"),
    "m = 0": ((X, Y[:0]), {}, r"at least one point and one dimension in X_b; got \(0, 2\)"),
    "d = 0": ((X[:, :0], Y[:, :0]), {}, r"one dimension in X_a; got \(6, 0\)"),
    "points on a line": ((X[:, 0], Y), {}, r"got \(6,\); type X_a\[:, None\]"),
    "a batch": ((X[None], Y), {}, r"got \(1, 6, 2\); type one cloud at a time"),
    "two dimensions": ((X, Y[:, :1]), {}, r"clouds of one dimension; got X_a \(6, 2\) and X_b \(4, 1\)"),
    "too many weights": ((X, Y, B, B), {}, r"weights a of shape \(6,\), one for each point of X_a; got \(4,\)"),
    "weights as a column": ((X, Y, A, B[:, None]), {}, r"got \(4, 1\); type b\.reshape\(-1\)"),
    "integer points": ((X.long(), Y.long()), {}, r"floating-point points in X_a; got int64; type X_a\.float\(\)"),
    "integer points in numpy": ((X.long().numpy(), Y.numpy()), {}, r"type X_a\.astype\(numpy\.float32\)"),
    "text": ((np.array([["a"]]), Y.numpy()), {}, "expected numbers in X_a; got dtype <U1"),
    "two dtypes": ((X, Y.double()), {}, r"expected X_b in X_a's dtype float32; got float64; type X_b\.to\(X_a\.dtype\)"),
    "weights of another dtype": ((X, Y, A.double(), B), {}, "expected a in X_a's dtype float32; got float64"),
    "two devices": ((X, Y.to("meta")), {}, r"expected X_b on X_a's device cpu; got meta; type X_b\.to\(X_a\.device\)"),
    "weights elsewhere": ((X, Y, A, B.to("meta")), {}, "expected b on X_b's device cpu; got meta"),
    "lists": ((X.tolist(), Y.tolist()), {}, r"a torch tensor for X_a; got builtins\.list; type torch\.as_tensor\(X_a\)"),
    "numpy beside torch": ((X, Y.numpy()), {}, r"a torch tensor for X_b; got numpy\.ndarray; type torch\.as_tensor"),
    "torch beside numpy": ((X.numpy(), Y), {}, r"a numpy array, as X_a is, for X_b; got torch\.Tensor; type numpy\.asarray"),
    "reg = 0": ((X, Y), {"reg": 0.0}, r"above 0 for reg; got 0\.0; type for example reg=0\.1"),
    "reg < 0": ((X, Y), {"reg": -1}, "above 0 for reg; got -1"),
    "reg = NaN": ((X, Y), {"reg": float("nan")}, "above 0 for reg; got nan"),
    "reg of the wrong type": ((X, Y), {"reg": "small"}, "above 0 for reg; got 'small'"),
    "neither reg nor blur": ((X, Y), {"reg": None}, "expected one of reg and blur; got neither"),
    "both reg and blur": ((X, Y), {"blur": 0.1}, "expected one of reg and blur; got both"),
    "blur = 0": ((X, Y), {"reg": None, "blur": 0.0}, "above 0 for blur; got 0"),
    "unbalanced < 0": ((X, Y), {"unbalanced": -1.0}, r"above 0 for unbalanced; got -1\.0"),
    "three strengths": ((X, Y), {"unbalanced": (1.0, 2.0, 3.0)}, "one number or a pair for unbalanced; got 3 of them"),
    "both unbalanced and reach": ((X, Y), {"unbalanced": 1.0, "reach": 1.0}, "one of unbalanced and reach; got both"),
    "reach of the wrong type": ((X, Y), {"reach": "far"}, "above 0 for reach; got 'far'"),
    "tol < 0": ((X, Y), {"tol": -1e-3}, r"above 0 for tol; got -0\.001"),
    "max_iter = 0": ((X, Y), {"max_iter": 0}, "at least 1 for max_iter; got 0"),
    "max_iter of the wrong type": ((X, Y), {"max_iter": 1e3}, r"at least 1 for max_iter; got 1000\.0"),
    "a flag for max_iter": ((X, Y), {"max_iter": True}, "at least 1 for max_iter; got True"),
    "a flag for reg": ((X, Y), {"reg": np.True_}, "above 0 for reg; got .*True"),
    "a flag for tol": ((X, Y), {"tol": False}, "above 0 for tol; got False"),
    "sparse points": ((X.to_sparse(), Y), {}, r"a dense tensor for X_a; got a sparse_coo one; type X_a\.to_dense\(\)"),
    "points without values": ((X.to("meta"), Y.to("meta")), {}, "points with values in X_a; got a meta tensor; type device='cpu'"),
    "one potential": ((X, Y), {"potentials_init": A}, r"a pair \(f, g\) for potentials_init; got Tensor"),
    "potentials exchanged": ((X, Y), {"potentials_init": (B, A)}, r"potentials_init\[0\] of shape \(6\); got \(4,\)"),
    "NaN potentials": ((X, Y), {"potentials_init": (A * torch.nan, B)}, "expected finite potentials_init"),
    "scaling = 0": ((X, Y), {"scaling": 0.0}, r"between 0 and 1 for scaling; got 0\.0; type for example scaling=0\.5"),
    "scaling = 1": ((X, Y), {"scaling": 1}, "between 0 and 1 for scaling; got 1"),
    "scaling = NaN": ((X, Y), {"scaling": float("nan")}, "between 0 and 1 for scaling; got nan"),
    "a flag for scaling": ((X, Y), {"scaling": True}, "between 0 and 1 for scaling; got True"),
    "scaling of the wrong type": ((X, Y), {"scaling": "slow"}, "between 0 and 1 for scaling; got 'slow'"),
    "both scaling and potentials": (
        (X, Y),
        {"scaling": 0.5, "potentials_init": (A, B)},
        "one of scaling and potentials_init; got both; leave scaling out",
    ),
    "a variant on a CPU": ((X, Y), {"variant": {}}, "on a GPU for variant; got float32 points on cpu.* type variant='auto'"),
    "fp64 of float32 points": ((X, Y), {"precision": "fp64"}, r"float64 points for precision='fp64'.*type X_a\.double\(\)"),
    "fp32 of float64 points": ((X.double(), Y.double()), {"precision": "fp32"}, r"float32 points .* got float64; type X_a\.float"),
    "a tensor-core mode on a CPU": (
        (X, Y),
        {"precision": "tf32"},
        r"points on a GPU for .*; got cpu; type precision='fp32'",
    ),
}


@pytest.mark.parametrize(("args", "options", "message"), CASES.values(), ids=CASES)
def test_bad_data_is_refused_in_one_sentence(args, options, message):
    with pytest.raises(InputError, match=message) as caught:
        otgen.solve_sample(*args, **{"reg": 0.1, **options})
    text = str(caught.value)
    assert text.startswith("expected ")
    assert "; " in text
    assert "\n" not in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "alternatin"},
            "unknown method 'alternatin'; known: alternating, anderson, auto, newton, symmetric. Did you mean 'alternating'?",
        ),
        ({"metric": "euclidean"}, "unknown metric 'euclidean'; known: sqeuclidean. Did you mean 'sqeuclidean'?"),
        ({"precision": "tf23"}, "unknown precision 'tf23'; known: auto, bf16"),
        ({"precision": None}, "unknown precision 'None'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(options, message):
    with pytest.raises(UsageError) as caught:
        otgen.solve_sample(X, Y, reg=0.1, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "axis", "message"),
    [
        (torch.ones(5), 0, r"expected v of shape \(6\); got \(5,\)"),
        (torch.ones(6), 1, r"expected v of shape \(4\) or \(4, k\) for axis=1; got \(6,\); type axis=0"),
        (torch.ones(4, 2), 0, r"expected v of shape \(6\) .*; got \(4, 2\); type axis=1"),
        (torch.ones(6, 0), 0, r"expected v of shape \(6, k\); got \(6, 0\)"),
        (torch.ones(6, dtype=torch.float64), 0, "expected v in X_a's dtype float32"),
        (torch.ones(6), 2, r"expected axis 0 \(sums over X_a\) or 1"),
    ],
)
def test_apply_refuses_what_does_not_fit(values, axis, message):
    result = otgen.solve_sample(X, Y, reg=0.1)
    with pytest.raises(InputError, match=message):
        result.apply(values, axis=axis)


def test_what_rounding_explains_is_accepted():
    """Weights normalised in their own precision are equal in mass, whatever their number."""
    weights = torch.rand(6, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        a = weights.to(dtype) / weights.to(dtype).sum()
        assert otgen.solve_sample(X.to(dtype), Y.to(dtype), a, reg=0.1, tol=2e-2).converged


def test_numbers_may_be_numpy_s():
    result = otgen.solve_sample(X, Y, reg=np.float32(0.1), tol=np.float64(1e-3), max_iter=np.int64(50))
    assert result.converged


def test_a_refusal_costs_no_sweep(monkeypatch):
    monkeypatch.setattr("otgen.ops.run", lambda *_: pytest.fail("a sweep was run"))
    for args, options, _ in CASES.values():
        with pytest.raises(OtgenError):
            otgen.solve_sample(*args, **{"reg": 0.1, **options})
