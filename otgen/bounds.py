"""An upper bound of the scores in each tile of a block of rows and a block of columns.

In coordinates z = sqrt(scale)·x a score is  S_ij = F_i + G_j − |z_i − w_j|²/2  with F = u + |z|²/2, a potential in bits. Over its
block, F lies below an affine function, its least-squares fit raised to the largest remainder, so that

    S_ij ≤ e_I + e_J + Σ_k max over the blocks' boxes of  p_k (z − z_I) + q_k (w − w_J) − (z − w)²/2.

Each summand is concave, and along (1, 1) affine of slope p + q: its maximum lies where z or w is highest, or lowest if p + q < 0,
and along such an edge it is a parabola, clipped. Constants in place of affine functions would leave most tiles in: potentials vary
by many bits over a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otgen.halving import Blocks

ROUNDINGS = 64.0
"""Units in the last place of float64 that rounding in a bound, and in the fits under it, adds up to at most."""

PIECE, GPU_PIECE = 1 << 16, 1 << 22
"""Pairs of blocks bounded at once: on a CPU their intermediate values stay in cache, on a GPU they take some 32 MB each."""


@dataclass(frozen=True, eq=False)
class Ceiling:
    """An affine function above a potential, for each block, in scaled coordinates. All float64.

    slope, lowest, highest, centre  (blocks, d);  top  (blocks,) its value at the centre
    size  what the largest terms of a score, and of a bound, amount to
    """

    slope: Tensor
    lowest: Tensor
    highest: Tensor
    centre: Tensor
    top: Tensor
    size: float

    def pieces(self, columns: int) -> Iterator[tuple[slice, Ceiling]]:
        """Blocks of rows, a few at a time, and what is above them: as many as are bounded at once against so many `columns`."""
        step = max(1, (PIECE if self.top.device.type == "cpu" else GPU_PIECE) // columns)
        for i in range(0, len(self.top), step):
            piece = slice(i, i + step)
            some = {name: getattr(self, name)[piece] for name in ("slope", "lowest", "highest", "centre", "top")}
            yield piece, replace(self, **some)


def ceiling(blocks: Blocks, potential: Tensor, scale: float) -> Ceiling:
    """Above the scaled potential (blocks, width), NaN for blocks in which it is not finite."""
    unit = math.sqrt(scale)
    points = unit * blocks.points.double()
    lowest, highest, centre = (unit * side for side in (blocks.lowest, blocks.highest, blocks.centre))
    squares = points.square().sum(2) / 2
    high = potential.double() + squares
    slope = (blocks.fit @ (high - high.mean(1, keepdim=True))[..., None])[..., 0] / unit
    top = (high - ((points - centre[:, None]) @ slope[..., None])[..., 0]).amax(1)
    reach = (slope.abs() * (highest - lowest)).sum(1).amax()
    size = float(potential.abs().amax() + 2.0 * squares.amax() + reach)
    return Ceiling(slope, lowest, highest, centre, top, size)


def bounds(rows: Ceiling, columns: Ceiling, unit: float) -> Tensor:
    """(row blocks, column blocks), float64: no score of a tile, as it is computed in an arithmetic of roundoff `unit`, is above.

    A score's d + 2 products are rounded, and so are the potentials' scaled squares: the error is at most (d + 4)·unit·size.
    """
    d, size = rows.slope.shape[1], rows.size + columns.size
    slack = ((d + 4) * unit + ROUNDINGS * torch.finfo(torch.float64).eps) * size
    found = (rows.top + slack)[:, None] + columns.top
    for piece, some in rows.pieces(len(columns.top)):
        for k in range(d):
            found[piece] += _separate(_side(some, k, (-1, 1)), _side(columns, k, (1, -1)))
    return found


_Side = tuple[Tensor, Tensor, Tensor, Tensor]


def _side(of: Ceiling, k: int, shape: tuple[int, int]) -> _Side:
    """slope, lowest, highest and centre of one coordinate, to be broadcast."""
    return tuple(values[:, k].reshape(shape) for values in (of.slope, of.lowest, of.highest, of.centre))  # type: ignore[return-value]


def _separate(rows: _Side, columns: _Side) -> Tensor:
    """The maximum of one coordinate's summand."""
    upwards = rows[0] + columns[0] >= 0
    return torch.maximum(_edge(rows, columns, upwards), _edge(columns, rows, upwards))


def _edge(fixed: _Side, free: _Side, upwards: Tensor) -> Tensor:
    """The largest value where the first side is at its end."""
    slope, lowest, highest, centre = fixed
    other, least, most, middle = free
    end = torch.where(upwards, highest, lowest)
    value = torch.where(upwards, slope * (highest - centre), slope * (lowest - centre))
    best = (end + other).clamp_(least, most)
    value.addcmul_(other, best - middle)
    return value.addcmul_(best.sub_(end), best, value=-0.5)
