"""The linear system behind every derivative of a solved pair of potentials, by sweeps.

As the problem changes the potentials follow by (w_f, w_g), so that both marginals stay what they have to be:

    κ_a r∘w_f + P w_g = u_f        κ = 1 balanced, 1 + eps/ρ relaxed
    κ_b c∘w_g + Pᵀw_f = u_g

The matrix is symmetric: it answers for how potentials change (`otgen.solvers.curvature`) and for how a function of them does
(`otgen.solvers.implicit`). w_g is eliminated, y being the larger side; what is left is solved by conjugate gradients,
preconditioned with κ_a diag(r), two sweeps an iteration. Constants are eigenvectors, of 1 − 1/(κ_a κ_b) after preconditioning:
directions are held orthogonal to them in the measure r, their share has a formula when relaxed, and when balanced it is left at
zero; nothing is added to the matrix. A measure's transport to itself, whose sides share one potential, has
(κ diag(r) + P) w = u: definite, one sweep an iteration.

Right hand sides and solutions are (n, k), (m, k): k systems are solved together, and share the exponentials of each sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otgen import ops
from otgen.solvers.conjugate import Limits, solved
from otgen.solvers.inputs import Clouds
from otgen.solvers.newton import LOST
from otgen.solvers.steps import Steps, damping, scale

if TYPE_CHECKING:
    from otgen.solvers.solution import Solution

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Relative residuals of the linear system, in the norm of its preconditioner, unless the caller asks for others."""

INNER = 1000
"""Most iterations of conjugate gradients."""

EXACT = ("ieee", "tf32x3")
"""Precision modes that round as float32 does. The value of a solve survives coarser ones, its second derivatives do not."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of a solution, as what multiplies: one sweep for each product with it."""

    steps: Steps
    u: Tensor
    v: Tensor
    r: Tensor
    c: Tensor
    limits: Limits

    @classmethod
    def of(cls, solution: Solution, limits: Limits) -> Plan:
        modes = tuple(mode for mode in solution.steps.modes if mode in EXACT) or EXACT[:1]
        found = solution.outcome
        return cls(replace(solution.steps, modes=modes), found.u, found.v, found.r, found.c, limits)

    @cached_property
    def swapped(self) -> Plan:
        return Plan(self.steps.swapped, self.v, self.u, self.c, self.r, self.limits)

    @property
    def clouds(self) -> Clouds:
        return self.steps.clouds

    @property
    def points(self) -> Tensor:
        """x (n, d) without what label costs append."""
        return self.clouds.x[:, : self.clouds.dimension]

    @property
    def eps(self) -> float:
        return float(self.steps.eps)

    @property
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """κ_a r (n,), zero where a row has no mass to speak of, and where it has."""
        diagonal = self.r / damping(self.steps.eps, self.steps.rho_a)
        counted = diagonal > LOST * self.clouds.a
        return torch.where(counted, diagonal, 0.0), counted

    def times(self, *columns: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> list[Tensor]:
        """P times each of the columns, (m,) or (m, …); with other weights in the place of a and b if given."""
        self.limits.passes += 1
        c, values = self.clouds, torch.cat([column.reshape(len(column), -1) for column in columns], 1)
        weights = c.a if a is None else a, c.b if b is None else b
        product = ops.apply_plan(c.x, c.y, self.u, self.v, *weights, values, **self.steps.launch)
        return _parts(product, columns)

    def times_both(
        self, columns: Sequence[Tensor], columns_t: Sequence[Tensor], a: Tensor, b: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """diag(a) 2^S diag(b) times each of `columns`, (m,) or (m, …), and its transpose times `columns_t`: both in one launch.

        The two must be equally wide.
        """
        self.limits.passes += 1
        c, values = self.clouds, [torch.cat([one.reshape(len(one), -1) for one in side], 1) for side in (columns, columns_t)]
        products = ops.apply_plan_both(c.x, c.y, self.u, self.v, a, b, *values, **self.steps.launch)
        rows, rows_t = (_parts(product, side) for product, side in zip(products, (columns, columns_t)))
        return rows, rows_t

    def matvec(self, left: Tensor, right: Tensor, w: Tensor, z: Tensor, alpha: float, beta: float) -> Tensor:
        """beta·z + alpha·left∘(2^S (right∘w)), where P = diag(a) 2^S diag(b)."""
        self.limits.passes += 1
        c, by = self.clouds, float(scale(self.steps.eps))
        return ops.hvp_matvec(c.x, c.y, self.u, self.v, left, right, w, z, scale=by, alpha=alpha, beta=beta, modes=self.steps.modes)

    def differences(
        self,
        direction: Tensor,
        w_f: Tensor,
        w_g: Tensor,
        beside: Tensor | None = None,
        *,
        marginal: Tensor | None = None,
        inverse_eps: float,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(n, d): 2·(r∘A + Σ_j Q_ij (x_i − y_j)·inverse_eps), Q_ij = P_ij (w_f_i + w_g_j − 2<x_i − y_j, A_i>) for a direction A.

        beside    (m, k) appended to y_j; A is (n, d + k) then, and <x_i, A_i> that of the first d
        marginal  r, unless it is that of the plan;  weights  in the place of (a, b)
        """
        self.limits.passes += 1
        c = self.clouds
        still = torch.zeros_like(c.x[:, c.dimension :])
        x, y, way = c.x, c.y, torch.cat((direction[:, : c.dimension], still, direction[:, c.dimension :]), 1)
        if beside is not None:
            x, y = torch.cat((x, torch.zeros_like(way[:, c.x.shape[1] :])), 1), torch.cat((y, beside), 1)
        options: dict[str, Any] = {"scale": float(scale(self.steps.eps)), "cost": 1.0, "inverse_eps": inverse_eps}
        plan = x, y, self.u, self.v, *((c.a, c.b) if weights is None else weights), self.r if marginal is None else marginal
        return ops.hvp_assemble(*plan, way.contiguous(), w_f, w_g, **options, modes=self.steps.modes)[:, : c.dimension]


def _parts(product: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    """What a product holds of each of the tensors whose columns it was taken of."""
    parts = torch.split_with_sizes(product, [column[0].numel() for column in columns], 1)
    return [part.reshape(-1, *column.shape[1:]) for part, column in zip(parts, columns)]


def joint(plan: Plan, right: Tensor, share: Tensor, constant: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(w_f, w_g), (n, k) and (m, k), of the system above; zero where there is no mass.

    share     u_g/(κ_b c), zero in columns without mass;  right  u_f − P share
    constant  (k,), the mean of w_f in the measure r (`mean`); None when balanced

    Conjugate gradients meet Pᵀ of every direction they take, so Pᵀw_f, and with it w_g, comes without a sweep.
    """
    over, (diagonal, rows) = plan.swapped, plan.diagonal
    below, counted = over.diagonal
    inverse = torch.where(counted, over.clouds.a / below, 0.0)

    def product(p: Tensor) -> tuple[Tensor, Tensor]:
        if p.shape[1] > 1:
            (across,) = over.times(p)
            across = torch.where(counted[:, None], across / below[:, None], 0.0)
            return diagonal[:, None] * p - plan.times(across)[0], across
        across = over.matvec(inverse, plan.clouds.a, p[:, 0], inverse, 1.0, 0.0)
        image = plan.matvec(plan.clouds.a, plan.clouds.b, across, diagonal * p[:, 0], -1.0, 1.0)
        return image[:, None], across[:, None]

    w_f, across = solved(product, right, diagonal, rows, torch.zeros_like(share), plan.limits)
    if constant is not None:
        w_f = w_f + torch.where(rows[:, None], constant, 0.0)
        across = across + torch.where(counted[:, None], damping(plan.steps.eps, plan.steps.rho_b) * constant, 0.0)
    return w_f, share - across


def mean(plan: Plan, over_g: Tensor, excess: Tensor | float = 0.0) -> Tensor | None:
    """(k,): the mean of w_f in the measure r, (e_b·Σu_f + Σu_f − Σu_g) / ((e_a + e_b + e_a e_b)·Σr) with e = eps/ρ.

    over_g  Σu_g (k,), float64;  excess  Σu_f − Σu_g, which would cancel under a large ρ if it were not known to be zero

    It is the mean of the right hand side over the eigenvalue. None when balanced: any will do.
    """
    if plan.steps.balanced:
        return None
    first, second = plan.steps.eps / plan.steps.rho_a, plan.steps.eps / plan.steps.rho_b
    total = (second * (over_g + excess) + excess) / (first + second + first * second)
    found: Tensor = total / plan.r.sum(dtype=torch.float64)
    return found.to(plan.r.dtype)


def own(plan: Plan, right: Tensor) -> Tensor:
    """w (n, k) with (κ diag(r) + P) w = right, for a measure's transport to itself."""
    diagonal, rows = plan.diagonal

    def product(p: Tensor) -> tuple[Tensor, Tensor]:
        if p.shape[1] > 1:
            return diagonal[:, None] * p + plan.times(p)[0], p
        a = plan.clouds.a
        return plan.matvec(a, a, p[:, 0], diagonal * p[:, 0], 1.0, 1.0)[:, None], p

    w, _ = solved(product, right, diagonal, rows, torch.zeros_like(right), plan.limits, definite=True)
    return w
