"""What SamplesLoss refuses, and how it behaves as a module."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from clouds import measures

import otgen
from otgen.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("streamed")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "energy"}, r"geomloss\.SamplesLoss\(loss="),
        ({"loss": "gaussian"}, r"geomloss\.SamplesLoss"),
        ({"p": 1}, r"expected p=2; got 1; type geomloss\.SamplesLoss"),
        ({"cost": lambda x, y: 0}, r"expected cost=None.*geomloss"),
        ({"kernel": lambda x, y: 0}, r"expected kernel=None.*geomloss"),
        ({"backend": "keops"}, "expected backend to be one of 'auto'"),
        ({"backend": "alternating"}, "method='alternating'"),
        ({"method": "fast"}, "unknown method"),
        ({"blur": 0.0}, "above 0 for blur"),
        ({"blur": float("nan")}, "above 0 for blur"),
        ({"eps": -1.0}, "above 0 for eps"),
        ({"reach": 0.0}, "above 0 for reach"),
        ({"reach_x": -1.0}, "above 0 for reach_x"),
        ({"reach_y": "far"}, "above 0 for reach_y"),
        ({"scaling": 1.0}, "scaling between 0 and 1"),
        ({"scaling": 0.0}, "scaling between 0 and 1"),
        ({"scaling": None}, "scaling between 0 and 1"),
        ({"tol": -1.0}, "above 0 for tol"),
        ({"max_iter": 0}, "at least 1 for max_iter"),
        ({"warm_start": True}, "expected tol with warm_start"),
        ({"use_epsilon_scaling": False}, "expected n_iters"),
        ({"eps_list": []}, "at least one value in eps_list"),
        ({"tol": 1e-3, "n_iters": 5}, "expected a schedule for n_iters"),
        ({"max_iter": 5, "eps_list": [1.0]}, "expected a schedule for eps_list"),
        ({"method": "anderson", "threshold": 1e-3}, "expected a schedule for threshold"),
        ({"tol": 1e-3, "last_extrapolation": False}, "expected a schedule for last_extrapolation"),
        ({"allow_tf32": False, "precision": "tf32"}, "allow_tf32=False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        otgen.SamplesLoss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_iters": 0}, "at least 1 for n_iters"),
        ({"inner_iterations": 0, "threshold": 1.0}, "at least 1 for inner_iterations"),
        ({"threshold": -1.0}, "above 0 for threshold"),
        ({"diameter": 0.0}, "above 0 for diameter"),
        ({"eps_list": [1.0, 0.0]}, r"above 0 for eps_list\[1\]"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"precision": "fp64"}, "expected float64 points"),
    ],
)
def test_options_met_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        otgen.SamplesLoss(**options)(torch.rand(5, 2), torch.rand(6, 2))


def test_an_attribute_set_later_is_used_and_checked():
    tensors = measures()
    loss = otgen.SamplesLoss()
    loss.blur = 0.3
    assert loss(*tensors) == otgen.SamplesLoss(blur=0.3)(*tensors)
    loss.p = 1
    with pytest.raises(UsageError, match="expected p=2"):
        loss(*tensors)


X, Y, A, B = torch.rand(5, 2), torch.rand(6, 2), torch.full((5,), 0.2), torch.full((6,), 1 / 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X,), "got 1 arguments"),
        ((A, X, B), "got 3 arguments"),
        ((torch.zeros(5), A, X, torch.zeros(6), B, Y), "cluster labels"),
        ((X.numpy(), Y.numpy()), "torch tensor for x; got ndarray"),
        ((X, None), "torch tensor for y; got NoneType"),
        ((A.tolist(), X, B, Y), "torch tensor for a; got list"),
        ((X[:, 0], Y[:, 0]), r"type x\[:, None\]"),
        ((X, Y[None]), "both"),
        ((X[None, None], Y[None, None]), "both"),
        ((X, Y[:, :1]), r"one dimension; got x \(5, 2\) and y"),
        ((X, Y.double()), "expected y in x's dtype"),
        ((X.int(), Y.int()), r"floating-point points in x.*x\.float"),
        ((X[:0], Y), "at least one point"),
        ((X[None][:0], Y[None][:0]), "at least one problem"),
        ((X[None], Y[None].repeat(2, 1, 1)), r"expected y of shape \(1, 6, 2\)"),
        ((A, X[None], B[None], Y[None]), r"expected a of shape \(1, 5\)"),
        ((A[None], X[None], B[None, :3], Y[None]), r"expected b of shape \(1, 6\)"),
        ((X, A, Y, B), "loss.a, x, b, y."),
        ((A[:3], X, B, Y), "expected weights a"),
        ((2 * A, X, B, Y), r"equal masses.*reach=1\.0"),
        ((-A, X, B, Y), "not negative"),
        ((0 * A, X, B, Y), "positive total weight"),
        ((A / 0, X, B, Y), "finite weights"),
        ((X / 0, Y), "finite points.*rows of x"),
        ((1e25 * X, Y), "and blur by it"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"tol": 1e-3}])
def test_bad_input(arguments, message, options):
    with pytest.raises(ValueError, match=message) as caught:
        otgen.SamplesLoss(**options)(*arguments)
    assert isinstance(caught.value, (InputError, UsageError))
    assert "X_a" not in str(caught.value)
    assert "X_b" not in str(caught.value)


# Shapes, dtypes and the module


def test_columns_of_weights_and_empty_labels_are_taken():
    a, x, b, y = measures()
    value = otgen.SamplesLoss()(a, x, b, y)
    assert otgen.SamplesLoss()(a[:, None], x, b[:, None], y) == value
    assert otgen.SamplesLoss()(None, a, x, None, b, y) == value
    batch = (a[None, :, None], x[None], b[None, :, None], y[None])
    torch.testing.assert_close(otgen.SamplesLoss()(*batch), value[None])


def test_points_that_are_one_have_no_distance():
    x = torch.full((1, 2), 0.5, requires_grad=True)
    value = otgen.SamplesLoss()(x, x.detach())
    assert value.item() == pytest.approx(0.0, abs=1e-9)
    (gradient,) = torch.autograd.grad(value, x)
    assert (gradient == 0).all()


def test_half_precision_is_answered_in_float32():
    _, x, _, y = measures(torch.float32)
    x, y = x.half().requires_grad_(), y.half()
    value = otgen.SamplesLoss(blur=0.3)(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, otgen.SamplesLoss(blur=0.3)(x.float(), y.float()))
    value.backward()
    assert x.grad.dtype == torch.float16


def test_a_module_without_state():
    loss = torch.nn.Sequential(otgen.SamplesLoss(blur=0.1, reach=2.0, tol=1e-3, method="anderson"))[0]
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    assert repr(loss) == "SamplesLoss(blur=0.1, reach=2.0, tol=0.001, scaling=0.5, debias=True, method='anderson')"
    assert repr(otgen.SamplesLoss(eps=0.1)) == "SamplesLoss(eps=0.1, scaling=0.5, debias=True)"


def test_copies_leave_the_last_result_behind():
    a, x, b, y = measures()
    loss = otgen.SamplesLoss(blur=0.3)
    value = loss(a, x.requires_grad_(), b, y)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.last_result is None
        assert twin(a, x, b, y) == value
    assert loss.last_result is not None


def test_a_call_says_nothing_and_keeps_no_graph(capsys):
    a, x, b, y = measures()
    hidden = x.requires_grad_() * 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = otgen.SamplesLoss(verbose=True)
        loss(a, hidden, b, y)
        repr(loss.last_result)
    assert capsys.readouterr().out == ""
    assert not loss._solved.given.x.requires_grad


def test_importing_otgen_imports_no_loss():
    code = "import otgen, sys; assert 'SamplesLoss' in dir(otgen); assert not {'torch', 'numpy', 'otgen.losses'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
