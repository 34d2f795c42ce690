"""Derivatives of functions of the potentials, by the implicit function theorem: one linear system, whatever the function.

The potentials are those of the points and weights for which, at points without weight too,

    κ_a f_i + eps·log Σ_j b_j exp((g_j − C_ij)/eps) = 0,   and with the sides exchanged;   balanced, <a, f>/Σa = <b, g>/Σb

For a function whose derivatives in (f, g) are (p, q), the system of `otgen.solvers.system` is solved for (s, t) with (p, q) on its
right hand side, p and q being shifted along (a, −b) first when balanced, so that constants have no share in them. Then

    in x_i   2·Σ_j P_ij (s_i + t_j)(x_i − y_j)          in a_i   −eps·Σ_j K_ij b_j t_j,   K = exp((f + g − C)/eps)

and with the sides exchanged in y and b; the derivatives of the means come on top. Points without weight, or without mass to speak
of, follow the others and nothing follows them: s_i Σ_j K_ij b_j = p_i/κ_a, with rows of K that are made to sum to 1. A measure's
transport to itself has one potential and one side. Source: Eisenberger, Toker, Leal-Taixé, Bernard and Cremers 2022, of which this
is the form without an n × m matrix, with zero weights and relaxed marginals; checked against finite differences in
tests/test_implicit.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from otgen import ops
from otgen.solvers import system
from otgen.solvers.conjugate import Limits
from otgen.solvers.steps import damping
from otgen.solvers.system import INNER, TOLERANCE, Plan

if TYPE_CHECKING:
    from otgen.solvers.solution import Solution


MASSLESS = 1e-20
"""Rows with a smaller share of their weight, r/a, have no mass to speak of: outliers under relaxed marginals."""


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
    conjugate gradients cost 2K + 3 sweeps, the last of which serves both sides, and K + 2 a measure's transport to itself; points
    without mass cost a few more.
    """
    clouds, p, q = solution.clouds, p.double(), q.double()
    limits = Limits(TOLERANCE[clouds.x.dtype] if tol is None else tol, max_iter, clouds, 0.0)
    plan = Plan.of(solution, limits)
    if solution.symmetric:
        rows = _Side(plan, p + q)
        s = _own(rows)
        in_x, in_a = rows.gathered(rows, rows.sums(rows, s), s, s, 0.0, 0.0)
        return Pulled(in_x, None, in_a, None), limits
    a, b = clouds.a.double(), clouds.b.double()
    surplus = 0.5 * (p.sum() - q.sum()) if plan.steps.balanced else torch.zeros_like(p[0])
    rows, columns = _Side(plan, p - surplus * a / a.sum()), _Side(plan.swapped, q + surplus * b / b.sum())
    if len(p) <= len(q):
        s, t, of_s, of_t = _solved(rows, columns)
    else:
        t, s, of_t, of_s = _solved(columns, rows)
    of_rows, of_columns = _both_sums(rows, columns, s, t)
    in_x, in_a = rows.gathered(columns, of_rows, s, t, of_s, of_t)
    in_y, in_b = columns.gathered(rows, of_columns, t, s, of_t, of_s)
    if plan.steps.balanced:
        in_a = in_a - (surplus / a.sum() * (solution.f - (a * solution.f).sum() / a.sum())).to(in_a.dtype)
        in_b = in_b + (surplus / b.sum() * (solution.g - (b * solution.g).sum() / b.sum())).to(in_b.dtype)
    return Pulled(in_x, in_y, in_a, in_b), limits


@dataclass(frozen=True, eq=False)
class _Side:
    """The rows of a plan, and what is asked of their potential: p (n,), float64."""

    plan: Plan
    p: Tensor

    @cached_property
    def counted(self) -> Tensor:
        """(n,): the points that have mass."""
        a = self.plan.clouds.a
        return (a > 0) & (self.plan.r > MASSLESS * a)

    @cached_property
    def some_alone(self) -> bool:
        """Whether there are others."""
        return not bool(self.counted.all())

    @property
    def pull(self) -> Tensor:
        """(n,), float64: p of the points with mass."""
        return torch.where(self.counted, self.p, 0.0)

    @property
    def alone(self) -> Tensor:
        """(n,), float64: p/κ of those without, the solution for rows that sum to 1."""
        return torch.where(self.counted, 0.0, damping(self.plan.steps.eps, self.plan.steps.rho_a) * self.p)

    @cached_property
    def mask(self) -> Tensor:
        """(n,): 1 at points with mass, 0 at the others."""
        return self.counted.to(self.plan.u.dtype)

    @cached_property
    def level(self) -> Tensor:
        """u (n,), at points without mass that for which their rows sum to 1."""
        if not self.some_alone:
            return self.plan.u
        c = self.plan.clouds
        self.plan.limits.passes += 1
        u, _ = ops.sinkhorn_half_step(c.x, c.y, self.plan.u, self.plan.v, c.b, c.x_sq, **self.plan.steps.launch)
        return torch.where(self.counted, self.plan.u, u)

    def passed_on(self) -> Tensor | float:
        """(m,): what points without mass ask of the other side's potential; it sums up to that of `alone`."""
        if not self.some_alone:
            return 0.0
        return replace(self.plan, u=self.level).swapped.times(self.alone.to(self.mask.dtype), b=1.0 - self.mask)[0]

    def values(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `sums` sums up of these points, (m,), (m, d) and (m, d): t, t∘y, and y where there is mass."""
        every, y = torch.where(self.counted, t, self.alone.to(self.mask.dtype)), self.plan.points
        return every, every[:, None] * y, self.mask[:, None] * y

    def sums(self, columns: _Side, t: Tensor) -> list[Tensor]:
        """Those of the columns' `values` in each row with mass: the mean of t, the moment of t and the centre of y."""
        lifted = torch.where(columns.counted, columns.plan.clouds.a, 1.0)
        return replace(self.plan, v=columns.level).times(*columns.values(t), a=self.mask, b=lifted)

    def gathered(
        self, columns: _Side, sums: Sequence[Tensor], s: Tensor, t: Tensor, of_s: float, of_t: float
    ) -> tuple[Tensor, Tensor]:
        """The derivatives in x (n, d) and a (n,), the means' left out, from the solution (s + of_s, t + of_t) at points with mass.

        of_s, of_t  constants that nearly cancel in s_i + t_j under a large ρ
        """
        plan, a, dtype = self.plan, self.plan.clouds.a, self.mask.dtype
        x, y, constant = plan.points, plan.swapped.points, of_s + of_t
        mean, moment, centre = sums
        own = s + constant
        in_x = 2.0 * (x * (own * plan.r + a * mean)[:, None] - a[:, None] * (own[:, None] * centre + moment))
        share = torch.where(self.counted, plan.r / a, 0.0)
        if self.some_alone:
            none, alone = 1.0 - self.mask, self.alone.to(dtype)
            centre, beside = replace(plan, u=self.level).times(y, t * columns.mask, a=none)
            in_x = torch.where(self.counted[:, None], in_x, 2.0 * alone[:, None] * (x - centre))
            lost = torch.where(self.counted, 0.0, torch.exp2(plan.u - self.level))
            mean, share = mean + lost * beside, share + lost
            if columns.some_alone and bool(columns.alone.any()):
                (further,) = replace(plan, v=columns.level).times(columns.alone.to(dtype), a=none, b=1.0 - columns.mask)
                mean = mean + further
        return in_x, -plan.eps * (mean + of_t * share)


def _both_sums(rows: _Side, columns: _Side, s: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The `sums` of both sides, from one sweep where all points have mass: the exponentials are the same."""
    if rows.some_alone or columns.some_alone:
        return rows.sums(columns, t), columns.sums(rows, s)
    plan, over = rows.plan, columns.plan
    of_columns, of_rows = (
        [value * side.plan.clouds.a.reshape(-1, *[1] * (value.ndim - 1)) for value in side.values(w)]
        for side, w in ((columns, t), (rows, s))
    )
    return plan.times_both(of_columns, of_rows, torch.ones_like(plan.u), torch.ones_like(over.u))


def _solved(rows: _Side, columns: _Side) -> tuple[Tensor, Tensor, float, float]:
    """(s, t), (n,) and (m,), and the constants that are to be added to them, the columns' being the larger side.

    With s⁰ = p/(κ_a r) taken off, what is left is (0, q − Pᵀs⁰): means over the plan, in which no point of tiny weight, whose s⁰ is
    as large as its weight is small, makes the others' residuals look small.
    """
    plan, dtype = rows.plan, rows.mask.dtype
    (diagonal, _), (below, _) = plan.diagonal, plan.swapped.diagonal
    first = torch.where(rows.counted, (rows.pull - columns.passed_on()) / diagonal, 0.0).to(dtype)
    (spread,) = plan.swapped.times(first)
    share = torch.where(columns.counted, (columns.pull - rows.passed_on() - spread) / below, 0.0).to(dtype)
    (across,) = plan.times(share)
    plan.limits.size = share.abs().max()
    w, t = system.joint(plan, -across[:, None], share[:, None])
    asked = rows.pull.sum() - columns.alone.sum(), columns.pull.sum() - rows.alone.sum()
    left = asked[1] - asked[0] + float(plan.steps.eps / (plan.steps.rho_a + plan.steps.eps)) * asked[0]
    constant = system.mean(plan, left, -left)
    of_s = 0.0 if constant is None else float(constant)
    return first + w[:, 0], t[:, 0], of_s, -of_s * float(damping(plan.steps.eps, plan.steps.rho_b))


def _own(rows: _Side) -> Tensor:
    """s (n,) of a measure's transport to itself, likewise."""
    plan, dtype = rows.plan, rows.mask.dtype
    diagonal, counted = plan.diagonal
    first = torch.where(rows.counted, (rows.pull - rows.passed_on()) / diagonal, 0.0).to(dtype)
    (spread,) = plan.times(first)
    plan.limits.size = torch.where(counted, spread / diagonal, 0.0).abs().max()
    return first + system.own(plan, -spread[:, None])[:, 0]
