"""SamplesLoss as one operator, for what traces PyTorch programs or transforms them: torch.compile, torch.export, torch.func.

A solve decides by numbers how it goes on, which no graph can. So a graph holds it whole, ``torch.ops.otgen.samples_loss`` or
``samples_potentials``: its kernel runs the eager loss, its fake kernel knows shapes and dtypes. Derivatives that may be asked
for come with the value, from one sweep each: a graph has no place for what the eager loss keeps until its backward pass.

The operators are functions: what a loss was told comes as JSON, which torch.compile compares before it takes a graph again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from otgen.errors import Unsupported, UsageError
from otgen.solvers.inputs import working_dtype
from otgen.solvers.problems import Solved, problem_of
from otgen.solvers.value import derivatives
from otgen.tracing import REFUSED

if TYPE_CHECKING:
    from otgen.losses import SamplesLoss

UNCAPTURED: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
"""CUDA graphs are made around the operators: a solve waits for its GPU, and a first launch compiles."""

ARGUMENTS = (
    "(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? label_x, Tensor? label_y, Tensor? label_cost_matrix, "
    "str options, bool[] wanted)"
)

TENSORS = 7
"""How many of the arguments are tensors, or None."""


def call(loss: SamplesLoss, args: tuple[Tensor | None, ...], label_x: Any, label_y: Any) -> Tensor | tuple[Tensor, Tensor]:
    """``loss(*args)`` as an operator. Raises UsageError for what it cannot do."""
    text, eps_list = loss._frozen
    if text.startswith(REFUSED):
        raise UsageError(text.removeprefix(REFUSED))
    if loss.eps_list is not None and tuple(loss.eps_list) != eps_list:
        raise UsageError("expected eps_list as it was given in a traced SamplesLoss; got changed items; assign the list anew")
    if loss.warm_start:
        raise UsageError("expected warm_start=False in a traced SamplesLoss, which keeps no last result; got True; leave it out")
    labels = {"label_x": label_x, "label_y": label_y, "label_cost_matrix": loss.label_cost_matrix}
    for name, value in labels.items():
        if value is not None and not isinstance(value, Tensor):
            raise UsageError(f"expected a tensor for {name} in a traced SamplesLoss; type torch.as_tensor({name})")
    problem = problem_of(args)
    given = (problem.x, problem.y, problem.a, problem.b)
    wanted = [torch.is_grad_enabled() and tensor is not None and _differentiated(tensor) for tensor in given]
    operator, function = (samples_potentials, Potentials) if loss.potentials else (samples_loss, Value)
    apply: Any = operator if torch.compiler.is_compiling() else function.apply
    found: tuple[Tensor, ...] = apply(*given, *labels.values(), text, wanted)
    return (found[0], found[1]) if loss.potentials else found[0]


def _differentiated(tensor: Tensor) -> bool:
    """Whether somebody may ask for a derivative in it, be it in a transform further out."""
    if torch.compiler.is_compiling():
        return tensor.requires_grad or torch._C._are_functorch_transforms_active()
    from torch._C import _functorch

    while _functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def refuse_forward_mode(name: str) -> None:
    """Raise Unsupported inside torch.func.jvp, jacfwd or forward_ad.dual_level: PyTorch would take the derivative for zero."""
    if forward_ad._current_level >= 0:
        raise Unsupported(f"expected no forward-mode derivative around otgen::{name}; got one; type torch.func.grad or jacrev")


def _solved(tensors: tuple[Tensor | None, ...], options: str) -> Solved:
    from otgen.losses import SamplesLoss

    x, y, a, b, label_x, label_y, costs = tensors
    loss = SamplesLoss(**json.loads(options), label_cost_matrix=costs)
    return loss._solve((a, x, b, y), label_x, label_y)[1]


def _slopes(unit: float, like: Tensor, found: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Derivatives per unit of the loss; empty for those that are not wanted."""
    return tuple(like.new_empty(0) if of is None else (unit * of).to(like.dtype).contiguous() for of in found)


def _value(*args: Any) -> tuple[Tensor, ...]:
    """(value (…,), its derivatives in x, y, a and b)."""
    refuse_forward_mode("samples_loss")
    solved = _solved(args[:TENSORS], args[TENSORS])
    found, dtype = solved.found, working_dtype(args[0])
    value = solved.unit * found.dual().to(dtype)
    return value, *_slopes(solved.unit, value, derivatives(found, args[TENSORS + 1]))


def _potentials(*args: Any) -> tuple[Tensor, ...]:
    """(F (…, n), G (…, m), the derivative of each F_i in x_i, of each G_j in y_j)."""
    refuse_forward_mode("samples_potentials")
    solved = _solved(args[:TENSORS], args[TENSORS])
    found = solved.found
    wanted = enumerate(args[TENSORS + 1][:2])
    slopes = [found.potential_gradient(transposed=bool(side)) if asked else None for side, asked in wanted]
    f, g = ((solved.unit * potential).contiguous() for potential in found.potentials())
    return f, g, *_slopes(solved.unit, f, slopes)


def _fake(count: int, shapes: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The fake kernel of an operator with answers of these `shapes`, and the derivatives of the first `count` arguments."""

    def fake(*args: Any) -> tuple[Tensor, ...]:
        refuse_forward_mode("samples_loss")
        x, y, wanted = args[0], args[1], args[TENSORS + 1]
        dtype = working_dtype(x)
        leaves = (x.shape, y.shape, x.shape[:-1], y.shape[:-1])
        slopes = (shape if asked else (0,) for shape, asked in zip(leaves[:count], wanted))
        return tuple(x.new_empty(shape, dtype=dtype) for shape in (*shapes(x, y), *slopes))

    return fake


samples_loss = torch.library.custom_op(
    "otgen::samples_loss", _value, mutates_args=(), schema=f"{ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)", **UNCAPTURED
)
samples_potentials = torch.library.custom_op(
    "otgen::samples_potentials",
    _potentials,
    mutates_args=(),
    schema=f"{ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)",
    **UNCAPTURED,
)
samples_loss.register_fake(_fake(4, lambda x, y: (x.shape[:-2],)))
samples_potentials.register_fake(_fake(2, lambda x, y: (x.shape[:-1], y.shape[:-1])))


class Value(torch.autograd.Function):
    """`samples_loss` for torch.func, which takes no operator's own derivative."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return samples_loss(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output, answers=1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _derivatives(ctx, (grads[0],) * 4)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(Value.apply, info.batch_size, in_dims, args)


class Potentials(torch.autograd.Function):
    """`samples_potentials` for torch.func."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return samples_potentials(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output, answers=2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _derivatives(ctx, grads[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(Potentials.apply, info.batch_size, in_dims, args)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], answers: int) -> None:
    slopes = output[answers:]
    ctx.mark_non_differentiable(*slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *slopes)


def _derivatives(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments, whose values have the gradients `grads`."""
    leaves, slopes = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    found: list[Tensor | None] = []
    for grad, leaf, slope, needed in zip(grads, leaves, slopes, ctx.needs_input_grad):
        if grad is None or not needed:
            found.append(None)
        elif slope.shape[-1:] == (0,):
            raise UsageError("expected `wanted` for each argument of otgen::samples_loss that is differentiated; pass True for it")
        else:
            apply: Any = Gradient.apply if torch._C._are_functorch_transforms_active() else samples_gradient
            found.append(apply(grad, slope, leaf, *leaves))
    return *found, *(None,) * (TENSORS + 2 - len(found))


def _scaled(grad: Tensor, slope: Tensor, leaf: Tensor, *inputs: Tensor | None) -> Tensor:
    """The gradient of `leaf`: that of the value times the derivative, which depends on `inputs` in a way that is not computed."""
    return (grad.reshape(grad.shape + (1,) * (slope.ndim - grad.ndim)) * slope).to(leaf.dtype)


def _refuse_second(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise Unsupported("expected one derivative of a traced SamplesLoss at most; got a second; type .detach() on the gradient")


samples_gradient = torch.library.custom_op(
    "otgen::samples_gradient",
    _scaled,
    mutates_args=(),
    schema="(Tensor grad, Tensor slope, Tensor leaf, Tensor x, Tensor y, Tensor? a, Tensor? b) -> Tensor",
)
samples_gradient.register_fake(_scaled)
samples_gradient.register_autograd(_refuse_second)


class Gradient(torch.autograd.Function):
    """`samples_gradient` for torch.func."""

    generate_vmap_rule = True
    forward = staticmethod(_scaled)
    backward = staticmethod(_refuse_second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass


def _one_by_one(apply: Callable[..., Any], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Under torch.func.vmap: a solve for each. Side by side is what (batch, n, d) asks for, under one common schedule."""
    moved = [arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args[:TENSORS], in_dims)]
    each = [apply(*(arg if dim is None else arg[i] for arg, dim in zip(moved, in_dims)), *args[TENSORS:]) for i in range(size)]
    return tuple(torch.stack(outputs) for outputs in zip(*each)), (0,) * len(each[0])


def _register(operator: Any, function: Any) -> None:
    operator.register_autograd(function.backward, setup_context=function.setup_context)
    if hasattr(operator, "register_vmap"):
        operator.register_vmap(lambda info, in_dims, *args: _one_by_one(operator, info.batch_size, in_dims, args))


_register(samples_loss, Value)
_register(samples_potentials, Potentials)
