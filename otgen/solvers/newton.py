"""Truncated Newton-CG on the semi-dual: quadratic convergence where the Sinkhorn loops converge linearly.

With v the best for u (one half step), the columns fit, and what is left is a fixed point u = T(u), with T the alternation of
`otgen.solvers.sinkhorn`. Its derivative is that of two softmins, so a Newton step d solves

    (κ_a diag(r) − P diag(1/(κ_b c)) Pᵀ) d = κ_a r ∘ (T(u) − u),        κ = 1 balanced, 1 + eps/ρ relaxed

with the Hessian of the semi-dual, up to a factor, on the left. T(u) − u is log2(a/r) when balanced, where the gradient has a − r:
equal to first order, but a row whose mass is far off asks for a step in bits instead of one in multiples of its mass.

The matrix is never formed: a product with it is two sweeps (`otgen.ops.hvp_matvec`), and all that is kept are a dozen vectors.
Conjugate gradients are preconditioned with κ_a diag(r), so their first direction is the plain alternation. When balanced the matrix
is singular along constants, and right hand side and directions are held orthogonal to them, in the measure r.

Sources: Steihaug 1983 (truncation at a radius), Eisenstat and Walker 1996 (how exactly to solve), Cuturi and Peyré 2016 (the
semi-dual and its derivatives).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from otgen import ops
from otgen.precision import LOG2_E
from otgen.solvers.sinkhorn import Outcome, Watch
from otgen.solvers.steps import Steps, damping, kappa, scale

START = 3
"""Plain alternations before the first Newton step and after a refused one; after each further one in a row, twice as many."""

LOOSEST, TIGHTEST = 0.5, 1e-3
"""Relative residuals at which conjugate gradients may stop: far from the solution, and near it."""

FORCING = 0.9
"""The relative residual asked for, per square of the factor by which the last step lowered the error (Eisenstat and Walker's
second choice)."""

INNER = 150
"""Most iterations of conjugate gradients in a step: two sweeps each. What is left then is an ascent direction all the same."""

LOOK = 4
"""Iterations of conjugate gradients between two looks at their residual on a GPU; on a CPU it is looked at every time."""

TRIES, SHORTEST, SHORTER = 4, 0.05, 0.5
"""Lengths of a step that are tried before it is refused, two sweeps each, and bounds of the share by which each is shorter than the
last. The share is where the slope of the semi-dual would vanish if it changed evenly."""

GAIN, SHRUNK = 1e-4, 0.9
"""Progress: the dual gains this share of what its slope promises, or the error falls to this share of the smallest so far."""

WIDER = 2.0
"""Growth of the radius, how far a step may move any potential, after a step that was kept at full length."""

NEAREST = 1.0
"""The smallest radius, a factor of two for every entry of the plan: so far a linear model of an exponential can be trusted."""

LOST = 1e-25
"""Share of its weight below which the mass of a point counts for nothing in the linear system: its reciprocal would overflow."""


@dataclass(frozen=True, eq=False)
class _Point:
    """A potential u with the v that is best for it, and what the two sweeps say of the pair.

    image   (n,) T(u);  residual  (n,) T(u) − u
    r       (n,) the row marginal;  target  (n,) what it should be;  missed  (1,) Σ|r − target| as a share of the mass
    c       (m,) the column marginal, which fits
    """

    steps: Steps
    u: Tensor
    v: Tensor
    image: Tensor
    residual: Tensor
    r: Tensor
    c: Tensor
    missed: Tensor

    @classmethod
    def at(cls, steps: Steps, u: Tensor, v: Tensor) -> _Point:
        """Two sweeps."""
        v, _ = steps.columns(u, v)
        image, rho = steps.rows(u, v)
        r, missed = steps.row_miss(u, rho)
        residual = torch.where(rho.isinf() | (rho == 0), image - u, -rho.log2()) if steps.balanced else image - u
        return cls(steps, u, v, image, residual, r, steps.swapped.row_target(v), missed)

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """The pair that an alternation goes on from."""
        return self.steps.translated(self.image, self.v)

    def slope(self, direction: Tensor) -> Tensor:
        """The derivative of the semi-dual along a direction of u, times kappa."""
        return dot(self.steps.row_target(self.u) - self.r, direction)

    def gain(self, other: _Point) -> Tensor:
        """By how much the semi-dual at `other` is larger, times kappa; from differences, so that little is lost to rounding."""
        terms = _gain(self.steps, self.u, other.u) + _gain(self.steps.swapped, self.v, other.v)
        return terms - LOG2_E * (other.c.double() - self.c.double()).sum()

    def noise(self) -> Tensor:
        """What rounding of the potentials may add to `gain`."""
        clouds = self.steps.clouds
        return torch.finfo(self.u.dtype).eps * (dot(clouds.a, self.u.abs()) + dot(clouds.b, self.v.abs()))


def newton(steps: Steps, u: Tensor, v: Tensor, watch: Watch) -> Outcome:
    """Newton's method from (u, v), scaled potentials; the columns of its outcome fit exactly, so the error is that of the rows.

    With fewer points in y than in x the sides are exchanged: the linear system is that of the smaller one, and then the rows fit.

    It takes one problem, not a batch. It begins with START alternations. A Newton step is kept when the dual or the error says that
    it is progress; shorter steps are tried before it is refused, and alternations follow, which cannot fail. The sums that judge a
    step are those that the next one starts from, so a step costs two sweeps, and two for each iteration of conjugate gradients.

    watch  iterations are updates of the pair, of either kind. An alternation reads the error when that is due; a Newton step reads
           three scalars for each length tried, in one transfer, and as many for each look that conjugate gradients take
    """
    if len(steps.clouds.y) < len(steps.clouds.x):
        return newton(steps.swapped, v, u, watch).swapped
    u, _ = steps.rows(u, v)
    point, n, passes = _Point.at(steps, u, v), 1, 3
    plain = rest = START
    radius = largest = float(steps.span) / 2
    forcing, error = LOOSEST, None
    while True:
        if plain == 0 or watch.due(n):
            error = float(point.missed) if error is None else error
            watch.look(torch.tensor([error], dtype=torch.float64), n)
            if not watch.running.any():
                u = torch.where(steps.clouds.a > 0, point.u, point.image)
                return watch.outcome(u, point.v, point.r, point.c, np.array([passes]))
        n += 1
        if plain == 0 and error is not None:
            enough = max(forcing, 0.5 * watch.tol / error)
            direction, inner = _direction(point, enough, radius, min(watch.interval, LOOK))
            found, met, tried, length = _search(point, direction, float(watch.best[0]))
            passes += 2 * (inner + tried)
            radius = min(WIDER * radius, largest) if length == 1.0 else max(length * radius, NEAREST)
            if found is not None:
                forcing = _forcing(forcing, met / error)
                point, error, rest = found, met, START
                continue
            plain, rest, forcing = rest, 2 * rest, LOOSEST
        point, error = _Point.at(steps, *point.plain), None
        passes += 2
        plain -= 1


def _forcing(last: float, factor: float) -> float:
    """The relative residual for the next step, after one that changed the error by `factor`; it falls no faster than squared."""
    wanted, held = FORCING * factor**2, FORCING * last**2
    return min(LOOSEST, max(TIGHTEST, wanted, held if held > 0.1 else 0.0))


def _search(point: _Point, direction: Tensor, best: float) -> tuple[_Point | None, float, int, float]:
    """The first point along the direction that is progress, None if none is; the last error met, the points tried, and the length.

    best  the smallest error so far
    """
    length, slope, noise = 1.0, point.slope(direction), point.noise()
    for tried in range(1, TRIES + 1):
        found = _Point.at(point.steps, point.u + length * direction, point.v)
        ahead = point.gain(found) - torch.maximum(GAIN * length * slope, noise)
        share = slope / (slope - found.slope(direction))
        met, gained, even = torch.stack((found.missed.double().sum(), ahead, share)).tolist()
        if met <= SHRUNK * best or gained > 0.0:
            return found, met, tried, length
        length *= min(max(even, SHORTEST), SHORTER) if even > 0.0 else SHORTEST
    return None, met, TRIES, length


def _direction(point: _Point, forcing: float, radius: float, look: int) -> tuple[Tensor, int]:
    """The Newton step (n,) to a relative residual of `forcing`, and the iterations of conjugate gradients, two sweeps each.

    radius  what no entry may exceed: the iterations end where one does, and the step is cut to it. Between groups of points that
            hardly any mass joins there is next to no curvature, and without it the step would have no bounds
    look    iterations between two looks at where they stand

    Residuals are measured as if they were potentials in the measure r. A curvature below what rounding makes of it ends the
    iterations too. Points without mass take the plain step.
    """
    system, dtype = _System.of(point), point.u.dtype
    z = system.projected(torch.where(system.counted, point.residual, 0.0))
    q = system.diagonal * z
    d, p = torch.zeros_like(z), z
    first = size = dot(q, z)
    for inner in range(1, INNER + 1):
        product = system.product(p)
        rounding = torch.finfo(dtype).eps * dot(p, system.diagonal * p)
        curvature = dot(p, product) - rounding
        step = (size / curvature.clamp(min=rounding)).to(dtype)
        d, q = d + step * p, q - step * product
        z = system.preconditioned(q)
        last, size = size, dot(q, z)
        if inner % look == 0:
            room = radius - d.abs().max().double()
            if not min(torch.stack((size - forcing**2 * first, curvature, room)).tolist()) > 0.0:
                break
        p = z + (size / last.clamp(min=torch.finfo(torch.float64).tiny)).to(dtype) * p
    d = d * (radius / d.abs().max().clamp(min=radius))
    return torch.where(system.counted, d, point.residual), inner


@dataclass(frozen=True, eq=False)
class _System:
    """The matrix of the Newton step at a point, in float32 or float64 as the point is; sums of vectors are float64.

    diagonal  (n,) κ_a r, zero where a row has no mass to speak of;  counted  (n,) where it has;  mass  Σ diagonal
    inverse   (m,) b/(κ_b c):  inverse ∘ (2^Sᵀ (a∘w)) = diag(1/(κ_b c)) Pᵀ w
    """

    point: _Point
    diagonal: Tensor
    counted: Tensor
    mass: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, point: _Point) -> _System:
        steps, clouds = point.steps, point.steps.clouds
        diagonal, columns = point.r / damping(steps.eps, steps.rho_a), point.c / damping(steps.eps, steps.rho_b)
        counted = diagonal > LOST * clouds.a
        diagonal = torch.where(counted, diagonal, 0.0)
        inverse = torch.where(columns > LOST * clouds.b, clouds.b / columns, 0.0)
        return cls(point, diagonal, counted, diagonal.sum(dtype=torch.float64), inverse)

    def product(self, w: Tensor) -> Tensor:
        """(n,): two sweeps."""
        u, v, steps = self.point.u, self.point.v, self.point.steps
        x, y, a, b, by = steps.clouds.x, steps.clouds.y, steps.clouds.a, steps.clouds.b, float(scale(steps.eps))
        across = ops.hvp_matvec(y, x, v, u, self.inverse, a, w, self.inverse, scale=by, alpha=1.0, beta=0.0, modes=steps.modes)
        return ops.hvp_matvec(x, y, u, v, a, b, across, self.diagonal * w, scale=by, alpha=-1.0, beta=1.0, modes=steps.modes)

    def preconditioned(self, q: Tensor) -> Tensor:
        return self.projected(torch.where(self.counted, q / self.diagonal, 0.0))

    def projected(self, z: Tensor) -> Tensor:
        """z (n,) without its mean in the measure of the rows, when balanced; zeros stay where nothing counts."""
        if not self.point.steps.balanced:
            return z
        return torch.where(self.counted, z - (dot(self.diagonal, z) / self.mass).to(z.dtype), 0.0)


def _gain(steps: Steps, old: Tensor, new: Tensor) -> Tensor:
    """The growth of <a, φ(f)>, times kappa, as u goes from `old` to `new`; φ(f) = f, or ρ(1 − exp(−f/ρ)) when relaxed."""
    moved, target = new.double() - old.double(), steps.row_target(old).double()
    if math.isfinite(steps.rho_a):
        strength = kappa(steps.eps) * steps.rho_a
        moved = -strength * torch.expm1(-moved / strength)
    return torch.where(target > 0, target * moved, 0.0).sum()


def dot(one: Tensor, other: Tensor) -> Tensor:
    return one.double() @ other.double()
