"""Double backward of a solved value: its gradients in the points as functions that can be differentiated once more.

A gradient s·G(x, y), s the derivative that came in, has by `otgen.solvers.curvature` the derivatives s·H v in the points, with both
components, and <v, G> in s, for a derivative v that comes in. These are linear in v and in s, and so far differentiable too, as
`torch.autograd.functional.hvp` needs. In the weights a gradient's derivatives are not implemented, nor third ones in the points:
tensors on which something depends in such a way come in through a gate that raises when a derivative is asked to pass.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from otgen.errors import InputError, UsageError
from otgen.solvers import curvature, options
from otgen.solvers.inputs import Given

if TYPE_CHECKING:
    from otgen.solvers.solution import Divergence

WEIGHTS = "expected derivatives of a gradient in points only; got one in the weights, or of theirs; type a.detach(), b.detach()"

THIRD = "expected two derivatives of OTResult.value at most; got a third; type .detach() on the second"


def gradient(divergence: Divergence, side: int, grad: Tensor, inputs: tuple[Tensor | None, ...]) -> Tensor:
    """grad times the gradient of a divergence in x (side 0) or y (side 1), differentiable in grad and in x and y.

    inputs  x, y, a and b of the caller, with their graph
    """
    x, y, *weights = inputs
    found: Tensor = _Gradient.apply(divergence, side, grad, x, y, *(gate(weight, WEIGHTS) for weight in weights))  # type: ignore[no-untyped-call]
    return found


def gate(tensor: Tensor | None, sentence: str) -> Tensor | None:
    """The tensor; a UsageError for who differentiates through it."""
    passed: Tensor | None = None if tensor is None else _Gate.apply(tensor, sentence)  # type: ignore[no-untyped-call]
    return passed


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sentence: str) -> Tensor:
        ctx.sentence = sentence
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UsageError(ctx.sentence)


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
        points = gate(x, THIRD), gate(y, THIRD)
        along = _Along.apply(ctx.divergence, ctx.side, ctx.needs_input_grad[3:5], slope, v, grad, *points, *weights)  # type: ignore[no-untyped-call]
        return None, None, *along, *(None for _ in weights)


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
        last = [_Last.apply(found, *inputs) for found in (in_v.to(v.dtype), in_grad)]  # type: ignore[no-untyped-call]
        return None, None, None, None, *last, *(None for _ in others)


class _Last(torch.autograd.Function):
    """What depends on `inputs` in a way that is not computed."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, *inputs: Tensor | None) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UsageError(THIRD)


def _products(
    divergence: Divergence, ways: tuple[Tensor | None, ...], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Both products along a direction, where wanted; warns of a system that was not solved."""
    if not any(wanted):
        return None, None
    with torch.no_grad():
        product = curvature.hvp(divergence, *ways, wanted=wanted)
    told(product)
    return product.x, product.y


def told(product: curvature.Product) -> None:
    """Warn of a product whose linear system was not solved."""
    if not product.met:
        from otgen.solvers.result import ConvergenceWarning

        warnings.warn(
            f"the linear system of a Hessian-vector product was left with a relative residual of {product.residual:.1e} after "
            f"{product.iterations} iterations; take a larger reg, or float64",
            ConvergenceWarning,
            stacklevel=options.caller(),
        )


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
        products = [
            curvature.hvp(divergence, *(None if way is None else way[k] for way in ways), wanted=wanted, tol=tol)
            for k in range(counts[0])
        ]
    told(max(products, key=lambda product: (not product.met, product.residual)))
    sides = [[product.x for product in products], [product.y for product in products]][: sum(wanted)]
    stacks = [torch.stack([part for part in side if part is not None]) for side in sides]
    answers = tuple(given.answer(stack if several else stack[0]) for stack in stacks)
    answer = answers if len(answers) > 1 else answers[0]
    if not log:
        return answer
    return answer, {
        "iterations": max(product.iterations for product in products),
        "passes": sum(product.passes for product in products),
        "residual": max(product.residual for product in products),
    }
