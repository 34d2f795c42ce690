"""Conjugate gradients for the linear systems of `otgen.solvers.curvature`, whose products are sweeps.

Vectors are float32 or float64 as the points are, sums over them float64, residuals measured in the norm of the preconditioner's
inverse, as if they were potentials in the measure of the diagonal. Sources: Hestenes and Stiefel 1952; Nicolaides 1987 (deflation).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from otgen.solvers.inputs import Clouds
from otgen.solvers.newton import LOOK, dot
from otgen.solvers.sinkhorn import interval


class Limits:
    """When conjugate gradients stop, and what they, and the sweeps around them, came to.

    look        iterations between two looks at the residual: one on a CPU, a few on a GPU
    noise       what rounding makes of a potential that a direction of size 1 moves, squared: no residual falls below it
    iterations  the most that a system took;  passes  sweeps in all;  residual  the largest left, relative;  met  whether all met it
    """

    def __init__(self, tol: float, max_iter: int, clouds: Clouds) -> None:
        self.tol, self.max_iter = tol, max_iter
        self.look = min(interval(clouds.x), LOOK)
        self.noise = (torch.finfo(clouds.x.dtype).eps * 2.0 * clouds.reach) ** 2
        self.iterations, self.passes, self.residual, self.met = 0, 0, 0.0, True

    def done(self, iterations: int, sweeps: int, residual: float, met: bool) -> None:
        self.iterations = max(self.iterations, iterations)
        self.passes += sweeps * iterations
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
    sweeps: int,
    definite: bool = False,
) -> tuple[Tensor, Tensor]:
    """(w, more): the solution (n,) of a symmetric system, and `beside` plus what `product` tells of w.

    product   the matrix times p (n,), and something else that is linear in p, of the shape of `beside`; so many `sweeps`
    diagonal  the preconditioner (n,), zero where not `counted`; there w is zero too
    definite  False: constants are eigenvectors, and are left out, of w and of what is asked of it
    It ends at the tolerance, at rounding, or where a curvature is lost in rounding: then what is left cannot be told.
    """
    mass = diagonal.sum(dtype=torch.float64)

    def preconditioned(q: Tensor) -> Tensor:
        z = torch.where(counted, q / diagonal, 0.0)
        return z if definite else torch.where(counted, z - (dot(diagonal, z) / mass).to(z.dtype), 0.0)

    z = p = preconditioned(right)
    q = diagonal * z
    w = torch.zeros_like(z)
    first = size = dot(q, z)
    enough = torch.maximum(limits.tol**2 * first, limits.noise * mass)
    curvature, tiny, k = torch.ones_like(first), torch.finfo(torch.float64).tiny, 0
    while True:
        if k % limits.look == 0 or k == limits.max_iter:
            left, least, begun, bend = torch.stack((size, enough, first, curvature)).tolist()
            if not left > least or not bend > 0.0 or k == limits.max_iter:
                break
        image, more = product(p)
        curvature = dot(p, image)
        curvature = torch.where(curvature > torch.finfo(w.dtype).eps * dot(p, diagonal * p), curvature, 0.0)
        step = torch.where(curvature > 0, size / curvature.clamp(min=tiny), 0.0).to(w.dtype)
        w, beside, q = w + step * p, beside + step * more, q - step * image
        z = preconditioned(q)
        last, size = size, dot(q, z)
        p = z + (size / last.clamp(min=tiny)).to(w.dtype) * p
        k += 1
    residual = math.sqrt(max(left, 0.0) / begun) if begun > 0.0 else begun
    limits.done(k, sweeps, residual, left <= least)
    return w, beside
