"""Double backward of a solved value: its gradients as functions that can be differentiated once more.

A gradient s·G(x, y) in the points, s the derivative that came in, has by `otgen.solvers.curvature` the derivatives s·H v in the
points, with both components, and <v, G> in s, for a derivative v that comes in. These are linear in v and in s, and so far
differentiable too, as `torch.autograd.functional.hvp` needs. What a gradient in the points is to the weights, and one in the
weights to anything, comes from `otgen.solvers.differentiable`, where it is put together of potentials and products. Of a batch each
problem is taken by itself. Third derivatives are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otgen.errors import InputError, UsageError
from otgen.solvers import curvature, options
from otgen.solvers.conjugate import told
from otgen.solvers.differentiable import differentiable
from otgen.solvers.inputs import Given
from otgen.solvers.refused import once
from otgen.solvers.solution import Divergence

THIRD = "expected two derivatives of OTResult.value at most; got a third; type .detach() on the second"

PRODUCT = "a Hessian-vector product"

Inputs = tuple[Tensor | None, ...]


def gradient(divergence: Divergence, side: int, grad: Tensor, inputs: Inputs) -> Tensor:
    """grad times the gradient of a divergence in x, y, a or b (side 0 to 3), differentiable in grad and in all of them.

    inputs  x, y, a and b of the caller, with their graph; of a batch, grad is (batch,), and they are padded (batch, n, …)
    """
    if divergence.cross.clouds.extents is not None:
        return _of_batch(divergence, side, grad, inputs)
    if side < 2:
        found: Tensor = _Gradient.apply(divergence, side, grad, *inputs)  # type: ignore[no-untyped-call]
        return found
    tensor, traced = inputs[side], differentiable(divergence, *inputs)  # type: ignore[arg-type]
    assert tensor is not None
    return (grad * traced.weight_gradient(transposed=side == 3)).to(tensor.dtype)


def _of_batch(divergence: Divergence, side: int, grad: Tensor, inputs: Inputs) -> Tensor:
    tensor = inputs[side]
    assert tensor is not None
    rows = []
    for i, each in enumerate(grad):
        part = divergence.part(i)
        sizes = [len(weights) for weights in (part.cross.a, part.cross.b)]
        one = tuple(None if given is None else given[i, : sizes[k % 2]] for k, given in enumerate(inputs))
        found = gradient(part, side, each, one)
        rows.append(torch.cat((found, tensor.new_zeros((tensor.shape[1] - len(found), *tensor.shape[2:])))))
    return torch.stack(rows)


class _Gradient(torch.autograd.Function):
    """s·G, (n, d) in x or (m, d) in y."""

    @staticmethod
    def forward(ctx: Any, divergence: Divergence, side: int, grad: Tensor, x: Tensor, y: Tensor, *weights: Tensor | None) -> Tensor:
        slope = divergence.gradient(transposed=bool(side))
        ctx.divergence, ctx.side = divergence, side
        ctx.save_for_backward(grad, x, y, slope, *weights)
        return (grad * slope).to((x, y)[side].dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, y, slope, *weights = ctx.saved_tensors
        inputs = (once(THIRD, tensor) for tensor in (x, y, *weights))
        along = _Along.apply(ctx.divergence, ctx.side, ctx.needs_input_grad[3:5], slope, v, grad, *inputs)  # type: ignore[no-untyped-call]
        mixed = _in_weights(ctx.divergence, ctx.side, grad * v, (x, y, *weights), ctx.needs_input_grad[5:])
        return None, None, *along, *(once(THIRD, found, grad, v, x, y, *weights) for found in mixed)


def _in_weights(divergence: Divergence, side: int, v: Tensor, inputs: Inputs, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """The derivatives of <v, G> in a and b, where wanted."""
    if not any(wanted):
        return [None, None]
    given = [None if tensor is None else tensor.detach() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor, needed in zip(given[2:], wanted) if tensor is not None and needed]
    with torch.enable_grad():
        slope = differentiable(divergence, *given).gradient(transposed=bool(side))  # type: ignore[arg-type]
        found = iter(torch.autograd.grad(slope, leaves, v.detach().to(slope.dtype)))
    return [next(found) if needed else None for needed in wanted]


class _Along(torch.autograd.Function):
    """<v, G>, s·(H v)_x and s·(H v)_y of a direction v of x, or of y when side = 1."""

    @staticmethod
    def forward(
        ctx: Any,
        divergence: Divergence,
        side: int,
        wanted: tuple[bool, bool],
        slope: Tensor,
        v: Tensor,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        *weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        along = v.to(slope.dtype)
        in_x, in_y = _products(divergence, (None, along) if side else (along, None), wanted)
        ctx.divergence, ctx.side = divergence, side
        ctx.save_for_backward(slope, v, grad, in_x, in_y, x, y, *weights)
        ctx.set_materialize_grads(False)
        scaled = [None if found is None else (grad * found).to(p.dtype) for found, p in ((in_x, x), (in_y, y))]
        return (along * slope).sum().to(grad.dtype), *scaled

    @staticmethod
    def backward(ctx: Any, of_inner: Tensor | None, of_x: Tensor | None, of_y: Tensor | None) -> tuple[Tensor | None, ...]:
        slope, v, grad, in_x, in_y, *others = ctx.saved_tensors
        with torch.no_grad():
            in_v, in_grad = torch.zeros_like(slope), torch.zeros_like(grad)
            if of_inner is not None:
                in_v += of_inner * slope
            ways = tuple(None if way is None else way.to(slope.dtype) for way in (of_x, of_y))
            if any(way is not None for way in ways):
                found = _products(ctx.divergence, ways, (ctx.side == 0, ctx.side == 1))[ctx.side]
                assert found is not None
                in_v += grad * found
            for way, product in zip(ways, (in_x, in_y)):
                if way is not None and product is not None:
                    in_grad += (way * product).sum().to(grad.dtype)
        inputs = v, grad, of_inner, of_x, of_y, *others
        last = [once(THIRD, found, *inputs) for found in (in_v.to(v.dtype), in_grad)]
        return None, None, None, None, *last, *(None for _ in others)


def _products(
    divergence: Divergence, ways: tuple[Tensor | None, ...], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Both products along a direction, where wanted; warns of a system that was not solved."""
    if not any(wanted):
        return None, None
    with torch.no_grad():
        product = curvature.hvp(divergence, *ways, wanted=wanted)
    told(PRODUCT, product)
    return product.x, product.y


def answered(divergence: Divergence, given: Given, v: Any, v_b: Any, tol: float | None, log: bool) -> Any:
    """What OTResult.hvp answers."""
    clouds, tol = divergence.cross.clouds, None if tol is None else options.tolerance(tol)
    if v is None and v_b is None:
        raise UsageError("expected a direction; got None for both sides; type v for X_a, v_b for X_b, or both")
    several = getattr(v_b if v is None else v, "ndim", 2) == 3
    ways: list[Tensor | None] = []
    for name, way, weights in (("v", v, clouds.a), ("v_b", v_b, clouds.b)):
        shape = (len(weights), clouds.dimension)
        found = None if way is None else given.argument(name, way, (None, *shape) if several else shape)
        if found is not None and not bool(found[..., weights > 0, :].isfinite().all()):
            raise InputError(f"expected a finite direction {name}; got NaN or infinity; type {name}.nan_to_num() or mend the data")
        ways.append(None if found is None else found.reshape(-1, *shape))
    counts = [len(way) for way in ways if way is not None]
    if counts[0] != counts[-1]:
        raise InputError(f"expected as many directions v as v_b; got {counts[0]} and {counts[-1]}; pass pairs of them")
    wanted = (True, v_b is not None)
    with torch.no_grad():
        product = curvature.hvp(divergence, *ways, wanted=wanted, tol=tol)
    told(PRODUCT, product)
    answers = tuple(given.answer(part if several else part[0]) for part in (product.x, product.y) if part is not None)
    answer = answers if len(answers) > 1 else answers[0]
    return (answer, {name: getattr(product, name) for name in ("iterations", "passes", "residual")}) if log else answer
