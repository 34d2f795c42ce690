"""The value of a solved problem, and potentials, as nodes of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otgen.solvers import second
from otgen.solvers.inputs import Given, working_dtype
from otgen.solvers.refused import once
from otgen.solvers.solution import Divergence

TWICE = (
    "expected one derivative of this value at most, or two of a problem solved to a tolerance; "
    "got another second one; type .detach() on the gradient"
)


class DualValue(torch.autograd.Function):
    """The dual objective with the gradient of the transport cost: by the envelope theorem the potentials count as constants.

    Of a problem solved to a tolerance that gradient has a graph of its own (`otgen.solvers.second`).
    """

    @staticmethod
    def forward(ctx: Any, solution: Divergence, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        ctx.solution = solution
        ctx.save_for_backward(x, y, a, b)
        return solution.dual().to(working_dtype(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        solution, inputs = ctx.solution, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if isinstance(solution, Divergence) and torch.is_grad_enabled():
            sides = [side if needed else None for side, needed in enumerate(wanted)]
            return None, *(None if side is None else second.gradient(solution, side, grad, inputs) for side in sides)
        with torch.no_grad():
            pairs = zip(derivatives(solution, wanted), inputs)
            found = [None if slope is None else _scaled(grad, slope).to(tensor.dtype) for slope, tensor in pairs]
        return None, *(None if gradient is None else once(TWICE, gradient, grad, *inputs) for gradient in found)


def derivatives(solution: Any, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Those of a value in x, y, a and b, where wanted, without a graph; in x and y from one launch where one plan gives both."""
    points, weights = wanted[:2], wanted[2:]
    if all(points) and isinstance(solution, Divergence):
        slopes: list[Tensor | None] = [*solution.gradients()]
    else:
        slopes = [solution.gradient(transposed=bool(side)) if needed else None for side, needed in enumerate(points)]
    return slopes + [solution.weight_gradient(transposed=bool(side)) if needed else None for side, needed in enumerate(weights)]


class Potentials(torch.autograd.Function):
    """The potentials, each with the derivative in its own point that GeomLoss gives: of its last update, all else held."""

    @staticmethod
    def forward(ctx: Any, solution: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.solution = solution
        ctx.save_for_backward(x, y)
        f, g = solution.potentials()
        return f, g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for transposed, (grad, points) in enumerate(zip(grads, ctx.saved_tensors)):
            if not ctx.needs_input_grad[1 + transposed]:
                found.append(None)
                continue
            with torch.no_grad():
                slope = ctx.solution.potential_gradient(transposed=bool(transposed))
                gradient = (grad[..., None] * slope).to(points.dtype)
            found.append(once(TWICE, gradient, grad, points))
        return None, *found


def _scaled(grad: Tensor, derivative: Tensor) -> Tensor:
    """The derivatives of values (…,) by points or weights (…, n, …), each times the gradient of its value."""
    return grad.reshape(grad.shape + (1,) * (derivative.ndim - grad.ndim)) * derivative


def value(solution: Divergence, given: Given) -> Tensor:
    """The dual objective as a scalar of the working dtype, differentiable in the caller's points and weights."""
    result: Tensor = DualValue.apply(solution, given.x, given.y, given.a, given.b)  # type: ignore[no-untyped-call]
    return result
