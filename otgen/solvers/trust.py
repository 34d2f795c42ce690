"""Steps that second derivatives allow: conjugate gradients truncated at a trust region, and the inverse of a Hessian.

Within a radius of where one stands the model of a function is m(s) = <g, s> + <s, H s>/2, H known by its products only. Conjugate
gradients from s = 0 lower m, and lengthen s, with each iteration; they end where the residual H s + g is small, where s would leave
the ball, or along a direction of no positive curvature, on which m falls as far as the ball goes: H may be indefinite, as that of a
transport value in the points often is. Tensors may have any shape; sums over them are float64.

Source: Steihaug 1983, The conjugate gradient method and trust regions in large scale optimization, SIAM J. Numer. Anal. 20(3).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from otgen.errors import ConvergenceWarning, InputError
from otgen.solvers import curvature, options, system

if TYPE_CHECKING:
    from otgen.solvers.result import OTResult

Ended = Literal["tol", "boundary", "negative curvature", "max_iter"]

INNER = 1000
"""Most iterations of conjugate gradients, unless the caller asks for others."""

RESIDUAL = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative residuals of `inverse_hvp`, unless the caller asks for others: what the products' own tolerances leave within reach."""


@dataclass(frozen=True, eq=False)
class Step:
    """A step of `steihaug`.

    step        of the shape and dtype of the gradient, no longer than the radius, to rounding
    predicted   −(<g, s> + <s, H s>/2), by how much the model is lower there: never negative, zero only without a gradient
    iterations  products with H;  ended  "tol", the residual is small; "boundary", the step has the length of the radius; "negative
                curvature", it has, along a direction whose curvature is negative, zero, or lost in rounding; or "max_iter"
    """

    step: Tensor
    predicted: float
    iterations: int
    ended: Ended


def steihaug(
    product: Callable[[Tensor], Tensor], gradient: Tensor, radius: float, *, tol: float = 1e-3, max_iter: int = INNER
) -> Step:
    """A step s, |s| ≤ radius, that lowers <g, s> + <s, H s>/2 at least as far as steepest descent within the radius does.

    product   H times a tensor like `gradient`, H symmetric, definite or not; called once an iteration
    gradient  g, float64 or float32, of any shape;  radius  in units of the step, finite
    tol       relative residual |H s + g| ≤ tol·|g|. Far from a minimum 0.3 is enough; one that falls with |g| keeps Newton's method
              superlinear

    Raises InputError for a gradient that is not finite, or neither float64 nor float32, for a product that is not finite or has
    another shape, and for a radius, tol or max_iter that is no number above 0 (tol may be 0).
    """
    radius, tol, max_iter = options.positive("radius", radius), options.tolerance(tol), options.count_of(max_iter)
    if gradient.dtype not in RESIDUAL:
        raise InputError(f"expected a gradient in float64 or float32; got {gradient.dtype}; type gradient.float()")
    gradient = gradient.detach()
    if not bool(gradient.isfinite().all()):
        raise InputError("expected a finite gradient; got NaN or infinity; take a smaller step before this one")
    course = _truncated(product, gradient, radius, tol, max_iter)
    predicted = -(_dot(gradient, course.step) + 0.5 * _dot(course.step, course.image))
    return Step(course.step, predicted, course.iterations, course.ended)


def inverse_hvp(
    result: OTResult,
    v: Any,
    *,
    damping: float = 0.0,
    tol: float | None = None,
    max_iter: int = INNER,
    log: bool = False,
) -> Any:
    """(n, d): s with (H + damping·I) s = v, H the Hessian of `value` in X_a (`hvp`), v (n, d) of the kind of the points.

    damping  at least 0, in units of H: those of the cost per squared length
    tol      relative residual, each point's share divided by what it weighs, 2r + damping; 1e-8 in float64 and 1e-4 in float32 when
             left out. The residual is that of the answer, computed from it at the end, and a larger one is a ConvergenceWarning
    log      True: (answer, dict) with the "iterations", the "residual", and the "passes" over the pairs of all products

    Conjugate gradients preconditioned with 2r + damping; an iteration is a product. H is often indefinite, and then there is no
    minimum that s could lead to: a direction without positive curvature is an InputError that says how negative it is, never an
    answer. Only directions that v has a share of are met; an answer solves the equation whether H is definite elsewhere or not. For
    a step that makes use of such directions: `steihaug`. Points of zero weight have zero rows in H: v has to be zero there unless
    damping is positive. Raises InputError for v that does not fit or is not finite, too.
    """
    divergence, given = result._divergence, result._given
    solution = divergence.cross
    a, dimension, dtype = solution.clouds.a, solution.clouds.dimension, solution.clouds.x.dtype
    damping = 0.0 if damping == 0 else options.positive("damping", damping)
    tol, max_iter = RESIDUAL[dtype] if tol is None else options.tolerance(tol), options.count_of(max_iter)
    right = given.argument("v", v, (len(a), dimension))
    if not bool(right.isfinite().all()):
        raise InputError("expected a finite v; got NaN or infinity; type v.nan_to_num() or mend the data")
    if damping == 0.0 and bool((right[a == 0] != 0).any()):
        raise InputError("expected v to be 0 at points of zero weight; got others; type damping=1e-3, or v[a == 0] = 0")
    diagonal = 2.0 * solution.outcome.r + damping
    root = torch.where(diagonal > 0, diagonal, 1.0).sqrt()[:, None]
    passes, inner = 0, min(system.TOLERANCE[dtype], max(0.1 * tol, torch.finfo(dtype).eps))

    def product(p: Tensor) -> Tensor:
        nonlocal passes
        with torch.no_grad():
            found = curvature.hvp(divergence, p / root, None, wanted=(True, False), tol=inner)
        passes += found.passes
        assert found.x is not None
        return (found.x + damping * p / root) / root

    right = right / root
    course = _truncated(product, -right, math.inf, tol, max_iter)
    if course.ended == "negative curvature":
        bend = course.bend / _dot(course.way / root, course.way / root)
        wanted = 2.0 * max(damping - bend, torch.finfo(dtype).eps * float(diagonal.max()))
        raise InputError(
            f"expected H + damping·I positive definite; got a direction of curvature {bend:.3g}; type damping={wanted:.2g}, or more"
        )
    begun, left = _dot(right, right), right - product(course.step)
    residual = math.sqrt(_dot(left, left) / begun) if begun > 0.0 else 0.0
    if not residual <= 2.0 * tol:
        said = f"inverse_hvp was left with a relative residual of {residual:.1e} after {course.iterations} iterations"
        warnings.warn(f"{said}; raise damping or max_iter, or take float64", ConvergenceWarning, stacklevel=options.caller())
    answer = given.answer(course.step / root)
    if not log:
        return answer
    return answer, {"iterations": course.iterations, "passes": passes, "residual": residual}


@dataclass(frozen=True, eq=False)
class _Course:
    """Where conjugate gradients ended: the step s and its image H s, the last direction and <p, H p>."""

    step: Tensor
    image: Tensor
    iterations: int
    ended: Ended
    way: Tensor
    bend: float


def _truncated(product: Callable[[Tensor], Tensor], g: Tensor, radius: float, tol: float, max_iter: int) -> _Course:
    """Steihaug's iteration; where a radius is infinite, a direction without positive curvature ends it before it is taken.

    A curvature counts as none below what rounding makes of the largest one met.
    """
    s = image = torch.zeros_like(g)
    residual, p = g, -g
    first = size = _dot(g, g)
    bend = largest = 0.0
    for k in range(max_iter + 1):
        if size <= tol**2 * first:
            return _Course(s, image, k, "tol", p, bend)
        if k == max_iter:
            break
        along = _image(product, p)
        bend, length = _dot(p, along), _dot(p, p)
        largest = max(largest, abs(bend) / length)
        flat = bend <= torch.finfo(g.dtype).eps * largest * length
        ahead = math.inf if flat else size / bend
        if flat and math.isinf(radius):
            return _Course(s, image, k + 1, "negative curvature", p, bend)
        here, across = _dot(s, s), _dot(s, p)
        if flat or here + ahead * (2.0 * across + ahead * length) >= radius**2:
            room = max(radius**2 - here, 0.0)
            most = room / (across + math.sqrt(across**2 + length * room)) if room > 0.0 else 0.0
            ended: Ended = "negative curvature" if flat else "boundary"
            return _Course(s + most * p, image + most * along, k + 1, ended, p, bend)
        s, image, residual = s + ahead * p, image + ahead * along, residual + ahead * along
        last, size = size, _dot(residual, residual)
        p = (size / last) * p - residual
    return _Course(s, image, max_iter, "max_iter", p, bend)


def _image(product: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    found = product(p).detach()
    if found.shape != p.shape:
        raise InputError(f"expected a product of shape {tuple(p.shape)}; got {tuple(found.shape)}; type .reshape(p.shape) on it")
    if not bool(found.isfinite().all()):
        raise InputError("expected a finite product with H; got NaN or infinity; take a smaller step before this one")
    return found.to(p.dtype)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one.double().flatten() @ other.double().flatten())
