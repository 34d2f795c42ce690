"""Conjugate gradients for the linear systems of `otgen.solvers.system`, whose products are sweeps.

Vectors are float32 or float64 as the points are, sums over them float64, residuals measured in the norm of the preconditioner's
inverse, as if they were potentials in the measure of the diagonal. Sources: Hestenes and Stiefel 1952; Nicolaides 1987 (deflation).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from otgen.errors import ConvergenceWarning
from otgen.solvers import options
from otgen.solvers.inputs import Clouds
from otgen.solvers.newton import LOOK
from otgen.solvers.sinkhorn import interval


class Limits:
    """When conjugate gradients stop, and what they, and the sweeps around them, came to.

    size        how large a solution may be, a number or a tensor (): no residual falls below what rounding makes of that
    look        iterations between two looks at the residual: one on a CPU, a few on a GPU
    iterations  the most that a system took;  passes  sweeps in all;  residual  the largest left, relative;  met  whether all met it
    """

    def __init__(self, tol: float, max_iter: int, clouds: Clouds, size: float) -> None:
        self.tol, self.max_iter = tol, max_iter
        self.size: float | Tensor = size
        self.look = min(interval(clouds.x), LOOK)
        self.iterations, self.passes, self.residual, self.met = 0, 0, 0.0, True

    def done(self, iterations: int, residual: float, met: bool) -> None:
        self.iterations = max(self.iterations, iterations)
        self.residual = residual if math.isnan(residual) else max(self.residual, residual)
        self.met &= met


def solved(
    product: Callable[[Tensor], tuple[Tensor, Tensor]],
    right: Tensor,
    diagonal: Tensor,
    counted: Tensor,
    beside: Tensor,
    limits: Limits,
    *,
    definite: bool = False,
) -> tuple[Tensor, Tensor]:
    """(w, more): the solutions (n, k) of a symmetric system for k right hand sides, and `beside` plus what `product` tells of w.

    product   the matrix times p (n, k), and something else that is linear in p, of the shape of `beside`
    diagonal  the preconditioner (n,), zero where not `counted`; there w is zero too
    definite  False: constants are eigenvectors, and are left out, of w and of what is asked of it
    A column rests at the tolerance, at rounding, or where a curvature is lost in rounding: then what is left cannot be told.
    """
    diagonal, counted, mass = diagonal[:, None], counted[:, None], diagonal.sum(dtype=torch.float64)

    def preconditioned(q: Tensor) -> Tensor:
        z = torch.where(counted, q / diagonal, 0.0)
        return z if definite else torch.where(counted, z - (_dots(diagonal, z) / mass).to(z.dtype), 0.0)

    z = p = preconditioned(right)
    q = diagonal * z
    w = torch.zeros_like(z)
    first = size = _dots(q, z)
    enough = torch.maximum(limits.tol**2 * first, (torch.finfo(z.dtype).eps * limits.size) ** 2 * mass)
    going, tiny, k = size > enough, torch.finfo(torch.float64).tiny, 0
    while k < limits.max_iter and (k % limits.look or bool(going.any())):
        image, more = product(p)
        curvature = _dots(p, image)
        going = going & (curvature > torch.finfo(w.dtype).eps * _dots(p, diagonal * p))
        step = torch.where(going, size / curvature.clamp(min=tiny), 0.0).to(w.dtype)
        w, beside, q = w + step * p, beside + step * more, q - step * image
        z = preconditioned(q)
        last, size = size, _dots(q, z)
        going = going & (size > enough)
        p = z + torch.where(going, size / last.clamp(min=tiny), 0.0).to(w.dtype) * p
        k += 1
    left = torch.where(first > 0, size.clamp(min=0.0) / first.clamp(min=tiny), first).sqrt().max()
    met, residual = torch.stack(((size <= enough).all().double(), left)).tolist()
    limits.done(k, residual, bool(met))
    return w, beside


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """(k,): the products of columns (n, k), in float64; `one` may be a single column."""
    return (one.double() * other.double()).sum(0)


class Ended(Protocol):
    """What is told of a linear system: `Limits`, or what was read off them."""

    @property
    def iterations(self) -> int: ...
    @property
    def residual(self) -> float: ...
    @property
    def met(self) -> bool: ...


def told(what: str, ended: Ended) -> None:
    """Warn of a linear system that was not solved."""
    if not ended.met:
        warnings.warn(
            f"the linear system of {what} was left with a relative residual of {ended.residual:.1e} after "
            f"{ended.iterations} iterations; take a larger reg, or float64",
            ConvergenceWarning,
            stacklevel=options.caller(),
        )
