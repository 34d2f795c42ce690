"""Second derivatives of the transport cost in the points: products of the Hessian with a direction, by sweeps.

A direction moves x by A (n, d) and y by B (m, d), so the cost by dC_ij = 2<x_i − y_j, A_i − B_j>. The potentials follow by
(w_f, w_g), from the marginals' equations differentiated at the solution, and the plan by Q/eps (implicit function theorem):

    κ_a r∘w_f + P w_g = (P∘dC)·1        Q_ij = P_ij (w_f_i + w_g_j − dC_ij)        κ = 1 balanced, 1 + eps/ρ relaxed
    κ_b c∘w_g + Pᵀw_f = (P∘dC)ᵀ·1       (H (A, B))_x = 2(r∘A − P B) + (2/eps)·(x∘(Q·1) − Q y),  and with the sides exchanged in y

w_g is eliminated, y being the larger side; what is left is solved by conjugate gradients, preconditioned with κ_a diag(r), two
sweeps an iteration. Constants are eigenvectors, of 1 − 1/(κ_a κ_b) after preconditioning: directions are held orthogonal to them
in the measure r, their share has a formula when relaxed, and when balanced Q does not see it; nothing is added to the matrix. A
measure's transport to itself, whose sides move together and share one potential, has (κ diag(r) + P) w = (P∘dC)·1: definite, one
sweep an iteration.

Only coordinates of the points move: label costs (`otgen.solvers.labels`) are constants. Sources: docs/second_order.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from otgen import ops
from otgen.solvers.conjugate import Limits, solved
from otgen.solvers.inputs import Clouds
from otgen.solvers.newton import LOST
from otgen.solvers.steps import Steps, damping, scale

if TYPE_CHECKING:
    from otgen.solvers.solution import Divergence, Solution

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Relative residuals of the linear system, in the norm of its preconditioner, unless the caller asks for others."""

INNER = 1000
"""Most iterations of conjugate gradients."""

EXACT = ("ieee", "tf32x3")
"""Precision modes that round as float32 does. The value of a solve survives coarser ones, its second derivatives do not."""


@dataclass(frozen=True, eq=False)
class Product:
    """The Hessian times a direction.

    x, y        (n, d), (m, d): the derivatives of the gradients in x and y along the direction; None where not asked for
    iterations  of conjugate gradients, the most that one of the systems took;  passes  sweeps of all of them together
    residual    the largest relative residual left;  met  whether all systems were solved to the tolerance, or to rounding
    """

    x: Tensor | None
    y: Tensor | None
    iterations: int
    passes: int
    residual: float
    met: bool


def hvp(
    divergence: Divergence,
    a_way: Tensor | None,
    b_way: Tensor | None,
    *,
    wanted: tuple[bool, bool] = (True, True),
    tol: float | None = None,
    max_iter: int = INNER,
) -> Product:
    """The derivatives of the gradients (in x, in y) of a divergence along (a_way, b_way), at the potentials it was solved to.

    a_way, b_way  (n, d), (m, d) in the dtype of the clouds: how x and y move; None for a side that rests, not both. Points of zero
                  weight have zero products, and where they go does not matter
    wanted        which of the two are computed, at least one: a sweep each
    tol           relative residual of the linear systems; TOLERANCE when left out

    Takes one direction, of one problem, not a batch. K iterations cost 2K + 3 sweeps: two for the right hand side, whichever sides
    move, two each, and one for the product; the second product costs one more, and debiased each own problem K + 2. The direction
    is scaled to a largest entry of 1 first, so products are homogeneous down to tiny and up to huge ones.
    """
    clouds = divergence.cross.clouds
    tol = TOLERANCE[clouds.x.dtype] if tol is None else tol
    ways = [None if way is None else torch.where(w[:, None] > 0, way, 0.0) for way, w in ((a_way, clouds.a), (b_way, clouds.b))]
    size = torch.stack([way.abs().max() for way in ways if way is not None]).max()
    size = torch.where(size == 0, 1.0, size)
    moves = _Moves(*(None if way is None else way / size for way in ways))
    limits = Limits(tol, max_iter, clouds)
    found: list[Tensor | None] = list(_cross(divergence.cross, moves, wanted, limits))
    for side, own in enumerate((divergence.own_a, divergence.own_b)):
        total, way = found[side], moves[side]
        if own is not None and total is not None and way is not None:
            found[side] = total - _own(own, way, limits)
    in_x, in_y = (None if total is None else size * total for total in found)
    return Product(in_x, in_y, limits.iterations, limits.passes, limits.residual, limits.met)


class _Moves(NamedTuple):
    """How the points of a problem move: (n, d) and (m, d), None for a side that rests."""

    x: Tensor | None
    y: Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """The plan of a solution, as what multiplies: one sweep for each product with it."""

    steps: Steps
    u: Tensor
    v: Tensor
    r: Tensor
    c: Tensor
    limits: Limits

    @classmethod
    def of(cls, solution: Solution, limits: Limits) -> _Plan:
        modes = tuple(mode for mode in solution.steps.modes if mode in EXACT) or EXACT[:1]
        found = solution.outcome
        return cls(replace(solution.steps, modes=modes), found.u, found.v, found.r, found.c, limits)

    @property
    def swapped(self) -> _Plan:
        return _Plan(self.steps.swapped, self.v, self.u, self.c, self.r, self.limits)

    @property
    def clouds(self) -> Clouds:
        return self.steps.clouds

    @property
    def points(self) -> Tensor:
        """x (n, d) without what label costs append."""
        return self.clouds.x[:, : self.clouds.dimension]

    @property
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """κ_a r (n,), zero where a row has no mass to speak of, and where it has."""
        diagonal = self.r / damping(self.steps.eps, self.steps.rho_a)
        counted = diagonal > LOST * self.clouds.a
        return torch.where(counted, diagonal, 0.0), counted

    def times(self, *columns: Tensor) -> list[Tensor]:
        """P times each of the columns, (m,) or (m, k)."""
        self.limits.passes += 1
        c, widths = self.clouds, [1 if column.ndim == 1 else column.shape[1] for column in columns]
        values = torch.cat([column.reshape(len(column), -1) for column in columns], 1)
        product = ops.apply_plan(c.x, c.y, self.u, self.v, c.a, c.b, values, **self.steps.launch)
        return [part.reshape(-1, *column.shape[1:]) for part, column in zip(torch.split_with_sizes(product, widths, 1), columns)]

    def matvec(self, left: Tensor, right: Tensor, w: Tensor, z: Tensor, alpha: float, beta: float) -> Tensor:
        """beta·z + alpha·left∘(2^S (right∘w)), where P = diag(a) 2^S diag(b)."""
        c, by = self.clouds, float(scale(self.steps.eps))
        sums = ops.hvp_matvec(c.x, c.y, self.u, self.v, left, right, w, z, scale=by, alpha=alpha, beta=beta, modes=self.steps.modes)
        return sums

    def assembled(self, moves: _Moves, w_f: Tensor, w_g: Tensor, spread: Tensor | None) -> Tensor:
        """(n, d): the product in x, from the solution (w_f, w_g) and spread = P B.

        The kernel knows a direction of x only, dC_ij = 2(<x_i, A_i> − <y_j, A_i>). With B_j appended to y_j, zeros to x_i, and x_i
        to A_i, that is 2(<x_i, A_i> − <y_j, A_i> − <x_i, B_j>), and the rest of dC, 2<y_j, B_j>, counts as part of w_g.
        """
        self.limits.passes += 1
        c, points = self.clouds, self.points
        still = torch.zeros_like(c.x[:, c.dimension :])
        x, y, way = c.x, c.y, torch.cat((torch.zeros_like(points) if moves.x is None else moves.x, still), 1)
        if moves.y is not None:
            x, y, way = torch.cat((x, torch.zeros_like(points)), 1), torch.cat((y, moves.y), 1), torch.cat((way, points), 1)
            w_g = w_g - 2.0 * _dots(self.swapped.points, moves.y)
        options: dict[str, Any] = {"scale": float(scale(self.steps.eps)), "cost": 1.0, "inverse_eps": 1.0 / float(self.steps.eps)}
        plan = x, y, self.u, self.v, c.a, c.b
        whole = ops.hvp_assemble(*plan, self.r, way.contiguous(), w_f, w_g, **options, modes=self.steps.modes)[:, : c.dimension]
        return whole if spread is None else whole - 2.0 * spread


def _cross(solution: Solution, moves: _Moves, wanted: tuple[bool, bool], limits: Limits) -> tuple[Tensor | None, Tensor | None]:
    """The products in x and y of one problem, where wanted."""
    plan = _Plan.of(solution, limits)
    if len(plan.clouds.y) < len(plan.clouds.x):
        in_y, in_x = _eliminated(plan.swapped, _Moves(moves.y, moves.x), wanted[::-1])
        return in_x, in_y
    return _eliminated(plan, moves, wanted)


def _eliminated(plan: _Plan, moves: _Moves, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """`_cross`, by the linear system of the rows.

    Each half of the right hand side is one sweep, in which all columns that it needs share the exponentials. Conjugate gradients
    meet Pᵀ of every direction they take, so Pᵀ w_f, and with it w_g, comes without a sweep.
    """
    x, y, a_way, b_way, over = plan.points, plan.swapped.points, moves.x, moves.y, plan.swapped
    u_g, in_rows, in_columns = torch.zeros_like(plan.c), None, None
    columns = ([] if a_way is None else [a_way, _dots(x, a_way)]) + ([] if b_way is None else [x])
    sums = over.times(*columns)
    if a_way is not None:
        in_columns, u_g = sums[0], 2.0 * (sums[1] - _dots(y, sums[0]))
    if b_way is not None:
        u_g = u_g + 2.0 * (plan.c * _dots(y, b_way) - _dots(sums[-1], b_way))
    below, counted = over.diagonal
    share = torch.where(counted, u_g / below, 0.0)
    rest = -share if b_way is None else 2.0 * _dots(y, b_way) - share
    sums = plan.times(*([rest] if a_way is None else [rest, y]), *([] if b_way is None else [b_way]))
    right = sums[0]
    if a_way is not None:
        right = right + 2.0 * (plan.r * _dots(x, a_way) - _dots(sums[1], a_way))
    if b_way is not None:
        in_rows = sums[-1]
        right = right - 2.0 * _dots(x, in_rows)
    diagonal, rows = plan.diagonal
    inverse = torch.where(counted, over.clouds.a / below, 0.0)

    def product(p: Tensor) -> tuple[Tensor, Tensor]:
        across = over.matvec(inverse, plan.clouds.a, p, inverse, 1.0, 0.0)
        return plan.matvec(plan.clouds.a, plan.clouds.b, across, diagonal * p, -1.0, 1.0), across

    w_f, across = solved(product, right, diagonal, rows, torch.zeros_like(share), plan.limits, sweeps=2)
    if not plan.steps.balanced:
        constant = _constant(plan, u_g)
        w_f = w_f + torch.where(rows, constant, 0.0)
        across = across + torch.where(counted, damping(plan.steps.eps, plan.steps.rho_b) * constant, 0.0)
    w_g = share - across
    in_x = plan.assembled(moves, w_f, w_g, in_rows) if wanted[0] else None
    in_y = over.assembled(_Moves(b_way, a_way), w_g, w_f, in_columns) if wanted[1] else None
    return in_x, in_y


def _constant(plan: _Plan, u_g: Tensor) -> Tensor:
    """The mean of w_f in the measure r, relaxed: e_b·Σu_g / ((e_a + e_b + e_a e_b)·Σr) with e = eps/ρ.

    It is the mean of the right hand side over the eigenvalue, from which what would cancel under a large ρ has been taken out.
    """
    first, second = plan.steps.eps / plan.steps.rho_a, plan.steps.eps / plan.steps.rho_b
    weight = second / (first + second + first * second)
    constant: Tensor = weight * u_g.sum(dtype=torch.float64) / plan.r.sum(dtype=torch.float64)
    return constant.to(u_g.dtype)


def _own(solution: Solution, way: Tensor, limits: Limits) -> Tensor:
    """(n, d): the product for half of a measure's transport to itself, both sides of which move."""
    plan, both = _Plan.of(solution, limits), _Moves(way, way)
    if not solution.symmetric:
        in_x, in_y = _eliminated(plan, both, (True, True))
        assert in_x is not None
        assert in_y is not None
        return 0.5 * (in_x + in_y)
    x, a, dots = plan.points, plan.clouds.a, _dots(plan.points, way)
    spread, means, sums = plan.times(way, x, dots)
    right = 2.0 * (plan.r * dots - _dots(x, spread) + sums - _dots(means, way))
    diagonal, rows = plan.diagonal

    def product(p: Tensor) -> tuple[Tensor, Tensor]:
        return plan.matvec(a, a, p, diagonal * p, 1.0, 1.0), p

    w, _ = solved(product, right, diagonal, rows, torch.zeros_like(right), limits, sweeps=1, definite=True)
    return plan.assembled(both, w, w, spread)


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """(n,): the products of the rows of two (n, d)."""
    return (one * other).sum(1)
