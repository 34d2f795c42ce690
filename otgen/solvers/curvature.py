"""Second derivatives of the transport cost in the points: products of the Hessian with a direction, by sweeps.

A direction moves x by A (n, d) and y by B (m, d), so the cost by dC_ij = 2<x_i − y_j, A_i − B_j>. The potentials follow by
(w_f, w_g), which the linear system of `otgen.solvers.system` has for (P∘dC)·1 and (P∘dC)ᵀ·1, and the plan by Q/eps (implicit
function theorem):

    Q_ij = P_ij (w_f_i + w_g_j − dC_ij)
    (H (A, B))_x = 2(r∘A − P B) + (2/eps)·(x∘(Q·1) − Q y),  and with the sides exchanged in y

Only coordinates of the points move: label costs (`otgen.solvers.labels`) are constants. Sources: docs/second_order.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from otgen.solvers import system
from otgen.solvers.conjugate import Limits
from otgen.solvers.system import INNER, TOLERANCE, Plan

if TYPE_CHECKING:
    from otgen.solvers.solution import Divergence, Solution


@dataclass(frozen=True, eq=False)
class Product:
    """The Hessian times a direction, or several.

    x, y        (n, d), (m, d), or (k, n, d), (k, m, d): the derivatives of the gradients in x and y along the direction; None where
                not asked for
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
                  weight have zero products, and where they go does not matter. Or k of them, (k, n, d) and (k, m, d)
    wanted        which of the two are computed, at least one: a sweep each
    tol           relative residual of the linear systems; TOLERANCE when left out

    Takes one problem, not a batch. K iterations cost 2K + 3 sweeps: two for the right hand side, whichever sides move, two each,
    and one for the product; the second product costs one more, and debiased each own problem K + 2. Several directions share all
    sweeps but those for their products. A direction is scaled to a largest entry of 1 first, so products are homogeneous down to
    tiny and up to huge ones.
    """
    clouds = divergence.cross.clouds
    tol = TOLERANCE[clouds.x.dtype] if tol is None else tol
    several = (b_way if a_way is None else a_way).ndim == 3  # type: ignore[union-attr]
    ways = [_masked(way, w) for way, w in ((a_way, clouds.a), (b_way, clouds.b))]
    size = torch.stack([way.abs().amax((0, 2)) for way in ways if way is not None]).amax(0)[:, None]
    size = torch.where(size == 0, 1.0, size)
    moves = _Moves(*(None if way is None else way / size for way in ways))
    limits = Limits(tol, max_iter, clouds, 2.0 * clouds.reach)
    found: list[Tensor | None] = list(_cross(divergence.cross, moves, wanted, limits))
    for side, own in enumerate((divergence.own_a, divergence.own_b)):
        total, way = found[side], moves[side]
        if own is not None and total is not None and way is not None:
            found[side] = total - _own(own, way, limits)
    products = [None if total is None else (size * total).transpose(0, 1) for total in found]
    in_x, in_y = (total if total is None or several else total[0] for total in products)
    return Product(in_x, in_y, limits.iterations, limits.passes, limits.residual, limits.met)


def _masked(way: Tensor | None, weights: Tensor) -> Tensor | None:
    """(n, k, d): directions (n, d) or (k, n, d), zero where there is no weight."""
    if way is None:
        return None
    way = way[:, None] if way.ndim == 2 else way.transpose(0, 1)
    return torch.where(weights[:, None, None] > 0, way, 0.0)


class _Moves(NamedTuple):
    """How the points of a problem move: (n, k, d) and (m, k, d), None for a side that rests."""

    x: Tensor | None
    y: Tensor | None


def _cross(solution: Solution, moves: _Moves, wanted: tuple[bool, bool], limits: Limits) -> tuple[Tensor | None, Tensor | None]:
    """The products in x and y of one problem, where wanted."""
    plan = Plan.of(solution, limits)
    if len(plan.clouds.y) < len(plan.clouds.x):
        in_y, in_x = _eliminated(plan.swapped, _Moves(moves.y, moves.x), wanted[::-1])
        return in_x, in_y
    return _eliminated(plan, moves, wanted)


def _eliminated(plan: Plan, moves: _Moves, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """`_cross`, with y as the larger side.

    Each half of the right hand side is one sweep, in which all columns that it needs share the exponentials.
    """
    x, y, a_way, b_way, over = plan.points, plan.swapped.points, moves.x, moves.y, plan.swapped
    u_g, in_rows, in_columns = x.new_zeros(()), None, None
    columns = ([] if a_way is None else [a_way, _dots(x, a_way)]) + ([] if b_way is None else [x])
    sums = over.times(*columns)
    if a_way is not None:
        in_columns, u_g = sums[0], 2.0 * (sums[1] - _dots(y, sums[0]))
    if b_way is not None:
        u_g = u_g + 2.0 * (plan.c[:, None] * _dots(y, b_way) - _dots(sums[-1], b_way))
    below, counted = over.diagonal
    share = torch.where(counted[:, None], u_g / below[:, None], 0.0)
    rest = -share if b_way is None else 2.0 * _dots(y, b_way) - share
    sums = plan.times(*([rest] if a_way is None else [rest, y]), *([] if b_way is None else [b_way]))
    right = sums[0]
    if a_way is not None:
        right = right + 2.0 * (plan.r[:, None] * _dots(x, a_way) - _dots(sums[1], a_way))
    if b_way is not None:
        in_rows = sums[-1]
        right = right - 2.0 * _dots(x, in_rows)
    w_f, w_g = system.joint(plan, right, share, system.mean(plan, u_g.sum(0, dtype=torch.float64)))
    in_x = _assembled(plan, moves, w_f, w_g, in_rows) if wanted[0] else None
    in_y = _assembled(over, _Moves(b_way, a_way), w_g, w_f, in_columns) if wanted[1] else None
    return in_x, in_y


def _assembled(plan: Plan, moves: _Moves, w_f: Tensor, w_g: Tensor, spread: Tensor | None) -> Tensor:
    """(n, k, d): the products in x, from the solutions (w_f, w_g) and spread = P B; a sweep each.

    The kernel knows a direction of x only, dC_ij = 2(<x_i, A_i> − <y_j, A_i>). With B_j appended to y_j, zeros to x_i, and x_i to
    A_i, that is 2(<x_i, A_i> − <y_j, A_i> − <x_i, B_j>), and the rest of dC, 2<y_j, B_j>, counts as part of w_g.
    """
    points, inverse_eps = plan.points, 1.0 / plan.eps
    if moves.y is not None:
        w_g = w_g - 2.0 * _dots(plan.swapped.points, moves.y)
    products = []
    for k in range(w_f.shape[1]):
        way, beside = torch.zeros_like(points) if moves.x is None else moves.x[:, k], None
        if moves.y is not None:
            way, beside = torch.cat((way, points), 1), moves.y[:, k]
        products.append(plan.differences(way, w_f[:, k].contiguous(), w_g[:, k].contiguous(), beside, inverse_eps=inverse_eps))
    whole = torch.stack(products, 1)
    return whole if spread is None else whole - 2.0 * spread


def _own(solution: Solution, way: Tensor, limits: Limits) -> Tensor:
    """(n, k, d): the products for half of a measure's transport to itself, both sides of which move."""
    plan, both = Plan.of(solution, limits), _Moves(way, way)
    if not solution.symmetric:
        in_x, in_y = _eliminated(plan, both, (True, True))
        assert in_x is not None
        assert in_y is not None
        return 0.5 * (in_x + in_y)
    x, dots = plan.points, _dots(plan.points, way)
    spread, means, sums = plan.times(way, x, dots)
    right = 2.0 * (plan.r[:, None] * dots - _dots(x, spread) + sums - _dots(means, way))
    w = system.own(plan, right)
    return _assembled(plan, both, w, w, spread)


def _dots(points: Tensor, ways: Tensor) -> Tensor:
    """(n, k): the products of the rows of (n, d) and of k other such tensors, (n, k, d); either may come first."""
    one, other = (tensor if tensor.ndim == 3 else tensor[:, None] for tensor in (points, ways))
    return (one * other).sum(2)
