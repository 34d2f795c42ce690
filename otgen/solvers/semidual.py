"""The update of a potential as a function of the point: soft, from a solved problem, and hard, the c-transform.

    soft   f(x) = −eps·log Σ_j b_j exp((g_j − |x − y_j|²)/eps)        hard   ψ^c(x) = min_j |x − y_j|² − ψ_j

Their gradients in x are 2(x − T(x)), with T the barycentric map and the nearest point in the sense of the minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otgen.chunked import left_factor, right_factor
from otgen.errors import InputError
from otgen.solvers.inputs import Given, as_tensor, require_alike, working_dtype
from otgen.solvers.labels import without_labels
from otgen.solvers.plan import largest
from otgen.solvers.refused import once
from otgen.solvers.solution import Solution
from otgen.solvers.steps import Steps, damping

SECOND = "expected one derivative of a potential at most; got a second; type .detach() on the gradient"


@dataclass(frozen=True, eq=False)
class DualPotentials:
    """The potentials of a solved problem at any points, by one update from the other side's.

    Points have the kind, device and dtype of those the problem was given; answers are as in `OTResult`. NaN gives NaN. The solution
    is a constant here, whatever `grad` it was solved with.
    """

    _solution: Solution
    _given: Given

    def f(self, x: Any) -> Any:
        """(k,) at x (k, d):  −reg·log Σ_j b_j exp((g_j − |x − y_j|²)/reg), times ρ/(ρ + reg) for a marginal relaxed with ρ.

        Differentiable once in x: the gradient is 2(x − transport(x)), times the same factor. At the problem's own points it is the
        result's potential after one more update. Raises InputError for points that do not fit.
        """
        return self._potential("x", x, transposed=False)

    def g(self, y: Any) -> Any:
        """(k,) at y (k, d), from f and a likewise."""
        return self._potential("y", y, transposed=True)

    def transport(self, x: Any, forward: bool = True) -> Any:
        """(k, d): where points x (k, d) go on average, Σ_j w_j y_j with w_j ∝ b_j exp((g_j − |x − y_j|²)/reg); not differentiable.

        forward  from X_a's side to X_b's;  False: the way back
        """
        return self._given.answer(_outside(self._solution, self._points("x", x), not forward).barycentres())

    def _potential(self, name: str, x: Any, *, transposed: bool) -> Any:
        points = self._points(name, x)
        source = points if self._given.numpy else x
        return self._given.answer(_Potential.apply(source, self._solution, transposed))  # type: ignore[no-untyped-call]

    def _points(self, name: str, x: Any) -> Tensor:
        without_labels(self._solution.clouds, "potentials outside the sample")
        return self._given.argument(name, x, (None, self._solution.clouds.dimension))


def _outside(solution: Solution, points: Tensor, transposed: bool) -> Solution:
    """The solution with `points` (k, d), in the caller's frame, in place of X_a, or of X_b when transposed, as its rows."""
    steps, (u, v) = solution.steps, (solution.outcome.u, solution.outcome.v)
    if transposed:
        steps, v = steps.swapped, u
    x = (points.detach().to(v.dtype) - steps.clouds.shift).contiguous()
    x_sq = x.square().sum(1)
    clouds = replace(steps.clouds, x=x, x_sq=x_sq, a=torch.ones_like(x_sq))
    steps = Steps(clouds, steps.eps, steps.modes, steps.rho_a, steps.rho_b)
    u, _ = steps.scaled(torch.zeros_like(x_sq), v)
    return Solution(steps, replace(solution.outcome, u=u, v=v), solution.choice)


class _Potential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, solution: Solution, transposed: bool) -> Tensor:
        ctx.solution, ctx.transposed = solution, transposed
        ctx.save_for_backward(points)
        outside = _outside(solution, points, transposed)
        u, _ = outside.steps.rows(outside.outcome.u, outside.outcome.v)
        potential: Tensor = outside.steps.potential(u) + (-solution.constant if transposed else solution.constant)
        return potential

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (points,) = ctx.saved_tensors
        with torch.no_grad():
            outside = _outside(ctx.solution, points, ctx.transposed)
            moved = points.to(working_dtype(points)) - outside.barycentres()
            factor = 2.0 * damping(outside.eps, outside.steps.rho_a)
            gradient = (factor * grad[:, None] * moved).to(points.dtype)
        return once(SECOND, gradient, grad, points), None, None


def c_transform(x: Any, y: Any, psi: Any) -> tuple[Any, Any]:
    """min_j |x_i − y_j|² − psi_j  (n,) and the j that attains it (n,), in O((n + m) d) memory.

    x, y, psi  (n, d), (m, d), (m,): tensors on one device and of one dtype, or numpy arrays, and so are the answers. Half precision
               is computed, and answered, in float32
    ties       the first j, in the arithmetic of scores 2<x, y> − |y|² + psi of centred points

    The value is differentiable in x, y and psi with j fixed, which is its derivative wherever the minimum is attained once
    (Danskin): 2(x_i − y_j) in x_i, minus that in y_j, −1 in psi_j. <a, value> + <b, psi> is the semi-dual of unregularised
    transport, concave in psi. Raises InputError for points or values that do not fit together.
    """
    numpy = isinstance(x, np.ndarray)
    x, y, psi = (as_tensor(name, value, numpy) for name, value in (("x", x), ("y", y), ("psi", psi)))
    _check(x, y, psi, numpy)
    dtype = working_dtype(x)
    x, y, psi = x.to(dtype), y.to(dtype), psi.to(dtype)
    with torch.no_grad():
        shift = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
        left, centred = x - shift, y - shift
        scores = psi - centred.square().sum(1)
        if not math.isfinite(float(left.square().sum(1).max() + scores.abs().max())):
            raise InputError(_not_finite(x, y, psi))
        nearest = largest(left_factor(left, torch.zeros_like(left[:, 0]), 2.0), right_factor(centred, scores))
    value = (x - y[nearest]).square().sum(1) - psi[nearest]
    return (value.numpy(), nearest.numpy()) if numpy else (value, nearest)


def _check(x: Tensor, y: Tensor, psi: Tensor, numpy: bool) -> None:
    for name, points in (("x", x), ("y", y)):
        if points.ndim != 2 or 0 in points.shape:
            came = tuple(points.shape)
            raise InputError(f"expected {name} of shape (points, dimensions), not empty; got {came}; type {name}.reshape(-1, d)")
    if not x.is_floating_point():
        cure = "x.astype(numpy.float32)" if numpy else "x.float()"
        raise InputError(f"expected floating-point points in x; got {str(x.dtype).removeprefix('torch.')}; type {cure}")
    if y.shape[1] != x.shape[1]:
        raise InputError(
            f"expected clouds of one dimension; got x {tuple(x.shape)} and y {tuple(y.shape)}; pass clouds of one space"
        )
    if psi.shape != y.shape[:1]:
        raise InputError(
            f"expected psi of shape ({len(y)},), one for each point of y; got {tuple(psi.shape)}; type psi.reshape(-1)"
        )
    require_alike("y", y, x, "x")
    require_alike("psi", psi, x, "x", working_dtype(x))


def _not_finite(x: Tensor, y: Tensor, psi: Tensor) -> str:
    for name, tensor in (("x", x), ("y", y), ("psi", psi)):
        if not bool(tensor.isfinite().all()):
            return f"expected finite values in {name}; got NaN or infinite ones; drop those points, or mend the data"
    return "expected points whose squared norms are finite; got larger ones; divide the points by their largest norm"
