"""Derivatives of functions of the potentials, by the implicit function theorem: one linear system, whatever the function.

The potentials are those of the points and weights for which, at points without weight too,

    κ_a f_i + eps·log Σ_j b_j exp((g_j − C_ij)/eps) = 0,   and with the sides exchanged;   balanced, <a, f>/Σa = <b, g>/Σb

For a function whose derivatives in (f, g) are (p, q), the system of `otgen.solvers.system` is solved for (s, t) with (p, q) on its
right hand side, p and q being shifted along (a, −b) first when balanced, so that constants have no share in them. Then

    in x_i   2·Σ_j P_ij (s_i + t_j)(x_i − y_j)          in a_i   −eps·Σ_j K_ij b_j t_j,   K = exp((f + g − C)/eps)

and with the sides exchanged in y and b; the derivatives of the means come on top. A point i without weight follows the others, and
nothing follows it: s_i = p_i/(κ_a·Σ_j K_ij b_j), and K_ij b_j is in the place of P_ij. A measure's transport to itself has one
potential and one side. Source: Eisenberger, Toker, Leal-Taixé, Bernard and Cremers 2022, of which this is the form without an
n × m matrix, with zero weights and relaxed marginals; checked against finite differences in tests/test_implicit.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from otgen.solvers import system
from otgen.solvers.conjugate import Limits
from otgen.solvers.steps import damping
from otgen.solvers.system import INNER, TOLERANCE, Plan

if TYPE_CHECKING:
    from otgen.solvers.solution import Solution


class Pulled(NamedTuple):
    """The derivatives of a function of the potentials in x (n, d), y (m, d), a (n,) and b (m,).

    Those of the second side are None for a measure's transport to itself: those of the first are all there is.
    """

    x: Tensor
    y: Tensor | None
    a: Tensor
    b: Tensor | None


def pullback(solution: Solution, p: Tensor, q: Tensor, *, tol: float | None = None, max_iter: int = INNER) -> tuple[Pulled, Limits]:
    """The derivatives of a function whose derivatives in f and g are p (n,) and q (m,), and what its linear system came to.

    tol  relative residual of the system; `otgen.solvers.system.TOLERANCE` when left out

    Takes one problem, not a batch, whose potentials are `Solution.f` and `Solution.g`; exact at a solution. K iterations of
    conjugate gradients cost 2K + 3 sweeps, and K + 1 a measure's transport to itself; points without weight cost a few more.
    """
    clouds, dtype = solution.clouds, solution.clouds.x.dtype
    p, q = p.to(dtype), q.to(dtype)
    limits = Limits(TOLERANCE[dtype] if tol is None else tol, max_iter, clouds, 1.0)
    plan = Plan.of(solution, limits)
    if solution.symmetric:
        p, size = _scaled(p + q, clouds.a)
        rows = _Side.of(plan, solution.f, p)
        s = rows.alone + system.own(plan, (rows.pull - rows.passed_on())[:, None])[:, 0]
        in_x, in_a = rows.gathered(s, rows, s)
        return Pulled(size * in_x, None, size * in_a, None), limits
    surplus = (p.sum(dtype=torch.float64) - q.sum(dtype=torch.float64)).to(dtype) if plan.steps.balanced else torch.zeros_like(p[0])
    spread = [surplus / (2.0 * w.sum()) for w in (clouds.a, clouds.b)]
    (p, size), (q, other) = _scaled(p - spread[0] * clouds.a, clouds.a), _scaled(q + spread[1] * clouds.b, clouds.b)
    whole = torch.maximum(size, other)
    rows, columns = _Side.of(plan, solution.f, p * (size / whole)), _Side.of(plan.swapped, solution.g, q * (other / whole))
    s, t = _solved(rows, columns) if len(p) <= len(q) else _solved(columns, rows)[::-1]
    (in_x, in_a), (in_y, in_b) = rows.gathered(s, columns, t), columns.gathered(t, rows, s)
    in_a, in_b = whole * in_a, whole * in_b
    if plan.steps.balanced:
        in_a = in_a - spread[0] * (solution.f - (clouds.a * solution.f).sum() / clouds.a.sum())
        in_b = in_b + spread[1] * (solution.g - (clouds.b * solution.g).sum() / clouds.b.sum())
    return Pulled(whole * in_x, whole * in_y, in_a, in_b), limits


def _scaled(p: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """p as a share of its size, and that: the largest solution that it could have by itself."""
    size = (p.abs() / torch.where(weights > 0, weights, 1.0)).max()
    size = torch.where(size > 0, size, 1.0)
    return p / size, size


@dataclass(frozen=True, eq=False)
class _Side:
    """The rows of a plan, and what is asked of their potential.

    pull   (n,): p at points of weight, zero at the others
    alone  (n,): s at points without weight, zero at the others;  empty  whether there are any
    """

    plan: Plan
    pull: Tensor
    alone: Tensor
    empty: bool

    @classmethod
    def of(cls, plan: Plan, potential: Tensor, p: Tensor) -> _Side:
        a, (eps, rho) = plan.clouds.a, (plan.steps.eps, plan.steps.rho_a)
        alone = damping(eps, rho) * p * torch.exp(potential / rho)
        return cls(plan, torch.where(a > 0, p, 0.0), torch.where(a > 0, 0.0, alone), bool((a == 0).any()))

    @property
    def weighty(self) -> Tensor:
        """(n,): 1 at points of weight, 0 at the others."""
        return (self.plan.clouds.a > 0).to(self.pull.dtype)

    @property
    def lifted(self) -> Tensor:
        """(n,): a, and 1 where that is zero."""
        return torch.where(self.plan.clouds.a > 0, self.plan.clouds.a, 1.0)

    def passed_on(self) -> Tensor | float:
        """(m,): what points without weight ask of the other side's potential, where it has weight."""
        if not self.empty:
            return 0.0
        over = self.plan.swapped
        return over.times(self.alone, b=1.0 - self.weighty)[0]

    def gathered(self, s: Tensor, columns: _Side, t: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives in x (n, d) and a (n,), the means' left out, from the solution (s, t)."""
        plan, eps = self.plan, self.plan.eps
        a, x, y = plan.clouds.a, plan.points, plan.swapped.points
        mean, moment, centre = plan.times(t, t[:, None] * y, columns.weighty[:, None] * y, a=self.weighty, b=columns.lifted)
        in_x = 2.0 * (x * (s * plan.r + a * mean)[:, None] - a[:, None] * (s[:, None] * centre + moment))
        if self.empty:
            none = 1.0 - self.weighty
            total, centre, beside = plan.times(torch.ones_like(t), y, t, a=none)
            in_x = in_x + 2.0 * s[:, None] * (x * total[:, None] - centre)
            mean = mean + beside
            if columns.empty and bool(columns.alone.any()):
                mean = mean + plan.times(columns.alone, a=none, b=1.0 - columns.weighty)[0]
        return in_x, -eps * mean


def _solved(rows: _Side, columns: _Side) -> tuple[Tensor, Tensor]:
    """(s, t), (n,) and (m,), the columns' being the larger side."""
    plan = rows.plan
    p, q = rows.pull - columns.passed_on(), columns.pull - rows.passed_on()
    below, counted = plan.swapped.diagonal
    share = torch.where(counted, q / below, 0.0)
    (across,) = plan.times(share)
    total, excess = q.sum(dtype=torch.float64), p.sum(dtype=torch.float64) - q.sum(dtype=torch.float64)
    s, t = system.joint(plan, (p - across)[:, None], share[:, None], system.mean(plan, total, excess))
    return rows.alone + s[:, 0], columns.alone + t[:, 0]
