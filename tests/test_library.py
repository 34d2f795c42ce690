"""Operators in graphs: what torch.compile, torch.export and torch.func make of launches and losses is what they are without."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from clouds import problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import otgen
from otgen import library, ops
from otgen.errors import ConvergenceWarning, InputError, UsageError

DTYPES = [torch.float64, torch.float32]

NUMBERS = {
    "sinkhorn_half_step": {"scale": 1.5, "damping": 0.9, "step": 0.75},
    "sinkhorn_symmetric_step": {"scale": 1.5, "damping_a": 0.9, "damping_b": 0.8, "step": 0.5},
    "sinkhorn_own_step": {"scale": 1.5, "damping": 0.9, "step": 0.75},
    "sinkhorn_debiased_step": {"scale": 1.5, "damping_a": 0.9, "damping_b": 0.8, "step": 0.5},
    "apply_plan": {"scale": 1.5},
    "apply_plan_both": {"scale": 1.5},
    "plan_gradient": {"scale": 1.5, "cost": 0.5},
    "hvp_matvec": {"scale": 1.5, "alpha": 0.3, "beta": 0.7},
    "hvp_assemble": {"scale": 1.5, "cost": 0.5, "inverse_eps": 2.0},
}

TENSORS = {
    "sinkhorn_half_step": ("x", "y", "u", "v", "b", "x_sq"),
    "sinkhorn_symmetric_step": ("x", "y", "u", "v", "a", "b", "x_sq", "y_sq"),
    "sinkhorn_own_step": ("x", "x", "u", "a", "x_sq"),
    "sinkhorn_debiased_step": ("x", "y", "u", "v", "p", "q", "a", "b", "x_sq", "y_sq"),
    "apply_plan": ("x", "y", "u", "v", "a", "b", "values"),
    "apply_plan_both": ("x", "y", "u", "v", "a", "b", "y", "x"),
    "plan_gradient": ("x", "y", "u", "v", "a", "b", "a"),
    "hvp_matvec": ("x", "y", "u", "v", "a", "b", "v", "u"),
    "hvp_assemble": ("x", "y", "u", "v", "a", "b", "a", "x", "u", "v"),
}

BATCHED = [name for name in TENSORS if not name.startswith("hvp")]

KINDS = [(name, None) for name in TENSORS] + [(name, 2) for name in BATCHED]

LOSSES = [
    ({}, 1.0, None),
    ({}, 1.0, 2),
    ({"debias": False, "scaling": 0.6}, 1.0, None),
    ({"reach": 0.5}, 1.6, None),
    ({"reach": 0.5, "tol": 1e-6}, 1.6, 2),
    ({"tol": 1e-6, "half_cost": False}, 1.0, None),
    ({"reach_x": 0.5, "method": "alternating", "debias": False}, 1.0, None),
    ({"potentials": True}, 1.0, None),
    ({"potentials": True, "debias": False}, 1.0, 2),
]


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own, in its forward mode


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests, and no forward-mode level that an error while tracing left open."""
    torch._dynamo.reset()
    yield
    while forward_ad._current_level >= 0:
        forward_ad.exit_dual_level()


def tensors(dtype=torch.float64, batch=None, n=9, m=7):
    """Every tensor a launch may ask for, by name; problems of a batch differ."""
    parts = []
    for seed in range(batch or 1):
        x, y, a, b = problem(n, m, 2, seed, dtype)
        u, v = 0.1 * x.sum(1) - seed, 0.2 * y.sum(1)
        squares = {"x_sq": x.square().sum(1), "y_sq": y.square().sum(1)}
        alone = {"p": 0.5 * u, "q": 0.5 * v}
        parts.append({"x": x, "y": y, "a": a, "b": b, "u": u, "v": v, **alone, **squares, "values": torch.cat((y, y[:, :1]), 1)})
    return parts[0] if batch is None else {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def launch(name, dtype=torch.float64, batch=None):
    """(tensors, numbers, extents and numbers of a batch as ops has them, the same as the operator has them)."""
    given = tensors(dtype, batch)
    if batch is not None:
        given["b"][0, 5:] = 0.0
        given["a"][1, 6:] = 0.0
    chosen, numbers = [given[key] for key in TENSORS[name]], NUMBERS[name]
    if batch is None:
        return chosen, numbers, {}, {}
    extents = torch.tensor([9, 6], dtype=torch.int32), torch.tensor([5, 7], dtype=torch.int32)
    scales = torch.tensor([[1.5], [0.7]], dtype=dtype)
    theirs = {"extents": extents, "scale": scales}
    return chosen, numbers, theirs, {"rows": extents[0], "columns": extents[1], "scales": scales}


def samples(mass=1.0, batch=None, dtype=torch.float64, n=12, m=10):
    """(a, x, b, y), the second weight of the mass given."""
    parts = [problem(n, m, 2, seed, dtype) for seed in range(batch or 1)]
    found = [(a, (1 + k) * x, mass * b, y) for k, (x, y, a, b) in enumerate(parts)]
    return found[0] if batch is None else tuple(torch.stack(own) for own in zip(*found))


def answers(loss, given, **labels):
    """What a loss says, and its gradients in all that it was given."""
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    said = loss(*leaves, **labels)
    said = said if isinstance(said, tuple) else (said,)
    total = sum((part.double() * torch.arange(1.0, 1 + part.numel()).view_as(part)).sum() for part in said)
    return said, torch.autograd.grad(total, leaves, allow_unused=True)


def same(ours, theirs, rtol=1e-14):
    for mine, other in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * float(other.detach().abs().max()))


# Launches


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "batch"), KINDS)
def test_pytorch_finds_nothing_wrong_with_a_launch(name, batch, dtype):
    given, numbers, _, extra = launch(name, dtype, batch)
    torch.library.opcheck(library.OPERATORS[name], given, {"modes": ["ieee"], **numbers, **extra})


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("name", "batch"), KINDS)
def test_a_traced_launch_is_one_operator_and_gives_what_it_gives(name, batch):
    given, numbers, extra, _ = launch(name, torch.float64, batch)
    function, held = getattr(ops, name), []

    def backend(graph, _):
        held.extend(node.target for node in graph.graph.nodes if node.op == "call_function" and "otgen" in str(node.target))
        return graph

    def run(*inputs):
        return function(*inputs, **{**numbers, **extra})

    found, expected = torch.compile(run, backend=backend, fullgraph=True)(*given), run(*given)
    assert [str(target) for target in held] == [f"otgen.{name}.default"]
    for mine, other in zip(*((out if isinstance(out, tuple) else (out,)) for out in (found, expected)), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("name", "batch"), KINDS)
def test_numbers_that_are_left_out_are_those_of_the_function(name, batch):
    given, numbers, extra, theirs = launch(name, torch.float64, batch)
    needed = numbers if name.startswith("hvp") else {"scale": 1.0}
    expected = getattr(ops, name)(*given, **{**needed, **extra})
    for stated in (needed, needed if name.startswith("hvp") else {}):
        found = library.OPERATORS[name](*given, modes=["ieee"], **stated, **theirs)
        for mine, other in zip(*((out if isinstance(out, tuple) else (out,)) for out in (found, expected)), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
@pytest.mark.parametrize(("name", "batch"), KINDS)
def test_interpreted_kernels_give_what_float64_does(name, batch):
    given, numbers, _, extra = launch(name, torch.float64, batch)
    single = [tensor.float() for tensor in given]
    extra32 = {key: value.float() if key == "scales" else value for key, value in extra.items()}
    expected = library.OPERATORS[name](*given, modes=["ieee"], **numbers, **extra)
    found = library.OPERATORS[name](*single, modes=["ieee"], **numbers, **extra32)
    for mine, other in zip(*((out if isinstance(out, tuple) else (out,)) for out in (found, expected)), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("name", "batch"), KINDS)
def test_fake_launches_have_the_shapes_and_dtypes_of_real_ones_for_any_strides(name, batch):
    given, numbers, _, extra = launch(name, torch.float32, batch)
    given = [t.mT.contiguous().mT if t.ndim > 1 else torch.stack((t, t), -1)[:, 0] for t in given]
    options = {"modes": ["ieee"], **numbers}
    real = library.OPERATORS[name](*given, **options, **extra)
    plain = library.OPERATORS[name](*(tensor.contiguous() for tensor in given), **options, **extra)
    with FakeTensorMode() as mode:
        fake = library.OPERATORS[name](
            *(mode.from_tensor(tensor) for tensor in given), **options, **{k: mode.from_tensor(v) for k, v in extra.items()}
        )
    for mine, other, straight in zip(*((out if isinstance(out, tuple) else (out,)) for out in (fake, real, plain)), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride())
        assert torch.equal(other, straight)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("batch", [None, 2])
def test_the_plan_applied_is_differentiable_in_its_values(batch):
    given, numbers, _, extra = launch("apply_plan", torch.float64, batch)
    values = given[-1].requires_grad_()

    def applied(own):
        return library.apply_plan(*given[:-1], own, modes=["ieee"], **numbers, **extra)

    assert torch.autograd.gradcheck(applied, values)
    torch.library.opcheck(library.apply_plan, given, {"modes": ["ieee"], **numbers, **extra})
    given[0].requires_grad_()
    with pytest.raises(UsageError, match=r"in values alone; got x with requires_grad; type x\.detach"):
        applied(values).sum().backward()


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("name", [name for name in TENSORS if name != "apply_plan"])
def test_no_other_derivative_is_a_zero(name):
    given, numbers, _, _ = launch(name)
    found = library.OPERATORS[name](given[0].requires_grad_(), *given[1:], modes=["ieee"], **numbers)
    with pytest.raises(UsageError, match=f"no derivative of otgen::{name}"):
        (found[0] if isinstance(found, tuple) else found).sum().backward()


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("name", list(TENSORS))
def test_a_forward_derivative_is_refused(name):
    given, numbers, _, _ = launch(name)

    def run(x):
        return library.OPERATORS[name](x, *given[1:], modes=["ieee"], **numbers)

    with pytest.raises(UsageError, match=f"no forward-mode derivative around otgen::{name}"):
        torch.func.jvp(run, (given[0],), (given[0],))


# Losses


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("options", "mass", "batch"), LOSSES)
def test_a_compiled_loss_is_the_eager_one_in_one_graph(options, mass, batch, dtype):
    given = samples(mass, batch, dtype)
    loss = otgen.SamplesLoss(blur=0.3, **options)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for own in (given, given[1::2]) if mass == 1.0 else (given,):
        same(answers(compiled, own), answers(loss, own), 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("batch", [None, 2])
def test_label_costs_are_compiled_too(batch):
    given = samples(1.0, batch)
    options = {"label_cost_matrix": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "lambda_x": 0.7, "lambda_y": 0.4}
    loss = otgen.SamplesLoss(blur=0.3, **options)
    labels = {"label_x": torch.arange(12).remainder(2), "label_y": torch.arange(10).remainder(2)}
    labels = {name: value if batch is None else value.expand(batch, -1) for name, value in labels.items()}
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    same(answers(compiled, given, **labels), answers(loss, given, **labels))
    assert float(compiled(*given, **labels).sum()) != pytest.approx(float(otgen.SamplesLoss(blur=0.3)(*given).sum()), rel=1e-3)


@pytest.mark.usefixtures("streamed")
def test_half_precision_answers_in_float32_with_gradients_in_half():
    given = tuple(tensor.bfloat16() for tensor in samples())[1::2]
    loss = otgen.SamplesLoss(blur=0.3)
    found = answers(torch.compile(loss, backend="aot_eager", fullgraph=True), given)
    same(found, answers(loss, given), 1e-6)
    assert (found[0][0].dtype, found[1][0].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.usefixtures("streamed")
def test_inductor_compiles_a_loss_with_what_is_around_it():
    loss, given = otgen.SamplesLoss(blur=0.3), samples()

    def run(a, x, b, y):
        return loss(a, torch.tanh(x.mT).mT, b, 2.0 * y).exp()

    same(answers(torch.compile(run, fullgraph=True), given), answers(run, given), 1e-12)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("options", "batch"), [({}, None), ({"tol": 1e-4}, None), ({"potentials": True}, 2)])
@pytest.mark.parametrize("wanted", [[True, True, True, True], [True, False, False, True], [False] * 4])
def test_pytorch_finds_nothing_wrong_with_a_loss(options, batch, wanted):
    a, x, b, y = samples(1.0, batch)
    leaves = [tensor.requires_grad_(own) for tensor, own in zip((x, y, a, b), wanted)]
    loss = otgen.SamplesLoss(blur=0.3, **options)
    operator = library.samples_potentials if loss.potentials else library.samples_loss
    arguments = (*leaves, None, None, None, loss._frozen[0], wanted)
    torch.library.opcheck(operator, arguments)
    said, slopes = (2, 2) if loss.potentials else (1, 4)
    assert [out.requires_grad for out in operator(*arguments)] == [any(wanted)] * said + [False] * slopes


@pytest.mark.usefixtures("streamed")
def test_derivatives_cost_nothing_when_nobody_may_ask_for_them(monkeypatch):
    sweeps = []
    kept = ops.plan_gradient
    monkeypatch.setattr(ops, "plan_gradient", lambda *args, **options: sweeps.append(1) or kept(*args, **options))
    a, x, b, y = samples()
    compiled = torch.compile(otgen.SamplesLoss(blur=0.3, debias=False), backend="aot_eager", fullgraph=True)
    compiled(a, x, b, y)
    with torch.no_grad():
        compiled(a, x.requires_grad_(), b, y)
    assert sweeps == []
    compiled(a, x, b, y)
    assert sweeps == [1]


@pytest.mark.usefixtures("streamed")
@torch._dynamo.config.patch(recompile_limit=20)
def test_changed_attributes_are_honoured():
    loss, given = otgen.SamplesLoss(blur=0.3, eps_list=None), samples()[1::2]
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    changes = [
        ("blur", 0.2),
        ("blur", np.float32(0.1)),
        ("reach", 0.7),
        ("debias", False),
        ("scaling", 0.7),
        ("tol", 1e-5),
        ("tol", None),
    ]
    changes += [("eps_list", [0.5, 0.1]), ("eps_list", [0.5, 0.2]), ("potentials", True), ("potentials", False)]
    seen = {float(compiled(*given))}
    for name, value in changes:
        setattr(loss, name, value)
        same((_tuple(compiled(*given)), ()), (_tuple(loss(*given)), ()))
        seen.add(float(_tuple(compiled(*given))[0].sum()))
    assert len(seen) >= len(changes) - 2
    loss.eps_list[0] = 0.9
    with pytest.raises((UsageError, torch._dynamo.exc.Unsupported), match="assign the list anew"):
        compiled(*given)
    loss.eps_list = loss.eps_list
    assert compiled(*given) == loss(*given)


def _tuple(said):
    return said if isinstance(said, tuple) else (said,)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_have_attributes_of_their_own(copied):
    loss, given = otgen.SamplesLoss(blur=0.3), samples()[1::2]
    other = copied(loss)
    other.blur = 0.1
    for own in (loss, other):
        assert torch.compile(own, backend="eager", fullgraph=True)(*given) == own(*given)
    assert loss(*given) != other(*given)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("batch", [None, 2])
def test_sizes_are_symbols_in_one_graph(batch):
    loss, counter = otgen.SamplesLoss(blur=0.3), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for k, (n, m) in enumerate([(12, 10), (9, 8), (7, 13), (20, 6)]):
        given = samples(1.0, batch, n=n, m=m)
        if k == 0:
            for tensor, axis in zip(given, (-1, -2, -1, -2)):
                torch._dynamo.mark_dynamic(tensor, tensor.ndim + axis)
        same(((compiled(*given),), ()), ((loss(*given),), ()))
    assert counter.frame_count == 1
    same(answers(compiled, given), answers(loss, given))


@pytest.mark.usefixtures("streamed")
def test_sizes_that_come_unannounced_compile_twice_at_most():
    loss, counter = otgen.SamplesLoss(blur=0.3), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for n, m in [(12, 10), (9, 8), (7, 13), (20, 6)]:
        given = samples(n=n, m=m)
        assert compiled(*given) == loss(*given)
    assert counter.frame_count == 2


@pytest.mark.usefixtures("streamed")
def test_an_exported_loss_is_the_loss():
    loss, given = otgen.SamplesLoss(blur=0.3), samples()[1::2]
    for strict in (True, False):
        exported = torch.export.export(loss, given, strict=strict)
        assert exported.module()(*given) == loss(*given)


@pytest.mark.usefixtures("streamed")
def test_the_last_result_is_that_of_the_last_eager_call():
    loss, given = otgen.SamplesLoss(blur=0.3), samples()[1::2]
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    compiled(*given)
    assert loss.last_result is None
    loss(*given)
    kept = loss.last_result
    compiled(2 * given[0], given[1])
    assert loss.last_result is kept


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_second_derivative_is_refused(backend):
    (x, y), loss = samples()[1::2], otgen.SamplesLoss(blur=0.3)
    x.requires_grad_()
    with torch._functorch.config.patch(donated_buffer=False):
        (slope,) = torch.autograd.grad(torch.compile(loss, backend=backend, fullgraph=True)(x, y), x, create_graph=True)
    with pytest.raises((UsageError, RuntimeError), match=r"got a second|does not currently support double backward"):
        (x * slope).sum().backward()


@pytest.mark.usefixtures("streamed")
def test_what_cannot_be_traced_is_refused():
    given = samples()[1::2]
    refused = [
        ({"tol": 1e-3, "warm_start": True}, {}, "warm_start=False"),
        ({"blur": torch.tensor(0.3)}, {}, "plain Python values in a traced SamplesLoss; got Tensor for blur"),
        ({"eps_list": [torch.tensor(1.0)]}, {}, r"got list for eps_list; type \[float\(eps\) for eps in eps_list\]"),
        ({"label_cost_matrix": torch.eye(2), "lambda_y": 1.0}, {"label_x": [0] * 12, "label_y": [0] * 10}, "tensor for label_x"),
    ]
    for options, labels, message in refused:
        compiled = torch.compile(otgen.SamplesLoss(**options), backend="eager", fullgraph=True)
        with pytest.raises((UsageError, torch._dynamo.exc.Unsupported), match=message):
            compiled(*given, **labels)


@pytest.mark.usefixtures("streamed")
def test_errors_and_warnings_are_those_of_the_eager_loss():
    a, x, b, y = samples()
    compiled = torch.compile(otgen.SamplesLoss(blur=0.3), backend="aot_eager", fullgraph=True)
    for given in ((a, x, 2 * b, y), (a, x * float("nan"), b, y), (a, x, b, y[:, :1])):
        with pytest.raises(InputError) as eager:
            otgen.SamplesLoss(blur=0.3)(*given)
        with pytest.raises(InputError) as traced:
            compiled(*given)
        assert str(traced.value) == str(eager.value)
    loss = otgen.SamplesLoss(blur=0.05, tol=1e-9, max_iter=2)
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(x, y)


# torch.func


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("options", [{}, {"tol": 1e-6, "debias": False}])
def test_transforms_of_a_loss_are_loops_over_it(options):
    a, x, b, y = samples()
    loss = otgen.SamplesLoss(blur=0.3, **options)
    slopes = answers(loss, (a, x, b, y))[1]
    for index, expected in enumerate(slopes):
        torch.testing.assert_close(torch.func.grad(loss, index)(a, x, b, y), expected, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(torch.func.jacrev(loss, 1)(a, x, b, y), slopes[1], rtol=1e-14, atol=1e-16)
    many, dims = torch.stack((x, x + 0.3, 2 * x)), (None, 0, None, None)
    values = torch.stack([loss(a, each, b, y) for each in many])
    each = torch.stack([answers(loss, (a, own, b, y))[1][1] for own in many])
    vmapped = torch.func.vmap(loss, dims)
    assert torch.equal(vmapped(a, many, b, y), values)
    assert torch.equal(torch.func.vmap(loss, (None, 1, None, None))(a, many.transpose(0, 1), b, y), values)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss, 1), dims)(a, many, b, y), each)
    assert torch.equal(torch.func.grad(lambda own: vmapped(a, own, b, y).sum())(many), each)
    twice = torch.func.vmap(torch.func.vmap(torch.func.grad(loss, 1), dims), dims)(a, torch.stack((many, many + 0.1)), b, y)
    assert torch.equal(twice[0], each)
    _, pull = torch.func.vjp(lambda own: vmapped(a, own, b, y), many)
    torch.testing.assert_close(pull(torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype))[0][2], 3.0 * each[2], rtol=1e-14, atol=1e-16)
    leaf = many.clone().requires_grad_()
    vmapped(a, leaf, b, y).sum().backward()
    assert torch.equal(leaf.grad, each)


@pytest.mark.usefixtures("streamed")
def test_potentials_are_transformed_too():
    a, x, b, y = samples()
    loss = otgen.SamplesLoss(blur=0.3, potentials=True)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(a, leaf, b, y)[0].square().sum(), leaf)
    found = torch.func.grad(lambda own: loss(a, own, b, y)[0].square().sum())(x)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)


@pytest.mark.usefixtures("streamed")
def test_a_compiled_vmap_is_the_vmap():
    _, x, _, y = samples()
    loss, many = otgen.SamplesLoss(blur=0.3), torch.stack((x, 2 * x))
    compiled = torch.compile(torch.func.vmap(loss, (0, None)), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(many, y), torch.stack([loss(x, y), loss(2 * x, y)]))
    same(answers(compiled, (many, y)), answers(torch.func.vmap(loss, (0, None)), (many, y)))


@pytest.mark.usefixtures("streamed")
def test_other_transforms_say_no():
    _, x, _, y = samples()
    loss = otgen.SamplesLoss(blur=0.3)
    with pytest.raises(UsageError, match="got a second"):
        torch.func.grad(lambda own: (own * torch.func.grad(loss)(own, y)).sum())(x)
    for forward in (lambda: torch.func.jvp(lambda own: loss(own, y), (x,), (x,)), lambda: torch.func.hessian(loss)(x, y)):
        with pytest.raises(UsageError, match=r"no forward-mode derivative .* type torch\.func\.grad"):
            forward()
    for inner in (loss, torch.func.vmap(loss, (0, None))):
        summed = torch.func.grad(lambda own, inner=inner: inner(own, y).sum())
        with pytest.raises(Exception, match="functorch transforms"):
            torch.compile(summed, backend="aot_eager", fullgraph=True)(x if inner is loss else x[None])


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("kind", ["loss", "launch", "dual"])
def test_a_forward_derivative_is_no_zero_in_a_graph_either(kind):
    given = tensors()
    x, y, loss = given["x"], given["y"], otgen.SamplesLoss(blur=0.3)
    rest = [given[name] for name in TENSORS["plan_gradient"][1:]]

    def along(own):
        return torch.func.jvp(
            (lambda z: loss(z, y)) if kind == "loss" else lambda z: ops.plan_gradient(z, *rest, scale=2.0), (x,), (own,)
        )

    def dual(own):
        with forward_ad.dual_level():
            return loss(forward_ad.make_dual(x, own), y)

    with pytest.raises(Exception, match="no forward-mode derivative around otgen::"):
        torch.compile(dual if kind == "dual" else along, backend="eager", fullgraph=True)(x)
