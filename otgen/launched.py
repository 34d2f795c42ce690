"""Sweeps that leave out tiles whose sums are too small to matter, as launches: what `otgen.listed` is on a CPU, for a GPU.

Lists are made on the device, from the same bounds, in PyTorch, and a kernel visits them (`otgen.families.lists`). What they leave
out grows as potentials rise, and is known at every step without a look at it: a product of a small matrix and a vector, over the
share that may be missing, is the floor a sum must be above. A row whose sum is not is redone over all columns by the same launch.
So every sum is right to the share, and the device is waited for only where lists are made, and at every LOOK-th half step, to see
whether to make new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otgen.bounds import bounds, ceiling
from otgen.chunked import NEVER
from otgen.halving import Blocks
from otgen.listed import DRIFT, FARTHEST, MOST_VISITED, SPARE, drift, light
from otgen.listed_step import sinkhorn_listed_step

LOOK = 8
"""Half steps between two looks at whether lists still serve."""

MOST_PAIRS = 1 << 28
"""Pairs of a block of rows and one of columns, for each of which float32 is kept, at most: 1 GiB, two million points a side."""

FAINTEST = 120.0
"""Tiles below 2^−FAINTEST count as that much: a float32 that is not zero."""

ROUNDED_UP = 1.0 + 2.0**-7
"""What is left out is taken for so much more: sums of MOST_PAIRS^½ products in float32, or in TF32 where PyTorch may, are too small
by less."""


@dataclass(frozen=True, eq=False)
class Lists:
    """Which columns each block of rows visits, made at the potentials u, v (blocks, width).

    omitted  (row blocks, column blocks) float32: at most what a tile would add to a row's sum; 0 for those that are visited
    starts, columns   as `otgen.listed_step` takes them
    visited  share of the pairs; above MOST_VISITED there are no lists, and the other tensors are empty
    """

    scale: float
    u: Tensor
    v: Tensor
    omitted: Tensor
    starts: Tensor
    columns: Tensor
    visited: float

    def missing(self, u: Tensor, v: Tensor) -> Tensor:
        """(row blocks, width) float64: at most what sums at (u, v) lack; NaN where potentials are lost."""
        risen, across = u.double() - self.u, (v.double() - self.v).amax(1)
        shift = risen.amax()
        total = self.omitted @ torch.exp2(across + shift).float()
        return ROUNDED_UP * torch.exp2(risen - shift) * total[:, None]


@dataclass(frozen=True, eq=False)
class _Sweep:
    """What the last launch was given and gave, (row blocks, width): what its lists lacked at most, and its sums at u."""

    lists: Lists
    missing: Tensor
    u: Tensor
    rho: Tensor

    def complete(self, share: float) -> Tensor:
        """(row blocks,) whether a row may have been redone over all columns; a hundredth is for rounding."""
        return ~(self.rho > 1.01 * (1.0 + share) / share * self.missing).all(1)

    def visited(self, share: float) -> float:
        """At most the share of the pairs visited: blocks of rows that were redone visit all columns."""
        listed = self.lists.starts.diff().double() / self.lists.omitted.shape[1]
        return float(torch.where(self.complete(share), 1.0, listed).mean())

    def omitted(self, share: float, a: Tensor) -> float:
        """At most the mass of the plan that was left out. Where more could be missing than the share, nothing was."""
        counted = (a > 0) & (self.missing <= 1.001 * share * self.rho)
        return float(torch.where(counted, a * self.missing, 0.0).sum())


class LaunchedTiles:
    """The tiles of one cloud's points as rows and another's as columns, both in blocks of one width (`otgen.halving.filled`).

    share    what may be missing of a row's sum, relative to it
    coarse   scale below which no list is tried
    """

    def __init__(self, rows: Blocks, columns: Blocks, a: Tensor, b: Tensor, share: float, coarse: float = 0.0) -> None:
        self._rows, self._columns, self.share, self.coarse = rows, columns, share, coarse
        self._a = torch.where(rows.real, rows.of(a), 0.0).double()
        self._b = torch.where(columns.real, columns.of(b), 0.0)
        self._x, self._y = rows.points.flatten(0, 1), columns.points.flatten(0, 1)
        self._x_sq = self._x.square().sum(1)
        self._scale, self._steps = -1.0, 0
        self._lists: Lists | None = None
        self._sweep: _Sweep | None = None
        self._passed_over = True

    @property
    def visited(self) -> float:
        """At most the share of the pairs that the last sweep visited."""
        return 1.0 if self._passed_over or self._sweep is None else self._sweep.visited(self.share)

    @property
    def omitted(self) -> float:
        """At most the mass of the plan that the last sweep left out."""
        return 0.0 if self._passed_over or self._sweep is None else self._sweep.omitted(self.share, self._a)

    def half_step(
        self, u: Tensor, v: Tensor, scale: float, step: float, most: float = MOST_VISITED, modes: tuple[str, ...] = ("ieee",)
    ) -> tuple[Tensor, Tensor] | None:
        """The update of u (n,) and the row sums; None where lists exceed `most`."""
        u, v = self._rows.of(u), self._columns.of(v)
        lists = self._lists_at(u, v, scale)
        self.pass_over()
        if lists is None or lists.visited > min(most, MOST_VISITED):
            return None
        missing = lists.missing(u, v)
        floor = torch.where(self._rows.real, missing / self.share, 0.0).float()
        potentials = u.flatten(), torch.where(self._columns.real, v, NEVER).flatten()
        out, rho = sinkhorn_listed_step(
            *(self._x, self._y, *potentials, self._b.flatten(), self._x_sq, lists.starts, lists.columns, floor.flatten()),
            width=u.shape[1], scale=scale, step=step, modes=modes,
        )  # fmt: skip
        out, rho = out.view_as(u), rho.view_as(u)
        self._sweep, self._passed_over = _Sweep(lists, missing, u, rho), False
        return self._rows.back(out), self._rows.back(rho)

    def product(self, u: Tensor, v: Tensor, values: Tensor, scale: float) -> None:
        """None: kernels that apply the plan visit all tiles."""
        self.pass_over()

    def pass_over(self) -> None:
        """The next sweep is another's, of all tiles."""
        self._passed_over = True

    def _lists_at(self, u: Tensor, v: Tensor, scale: float) -> Lists | None:
        """The lists for a step at (u, v), new ones where the last do not serve; None where there shall be none."""
        if scale < self.coarse:
            return None
        if scale != self._scale:
            self._scale, self._steps, self._lists, self._sweep = scale, 0, None, None
        self._steps += 1
        if self._lists is None or (self._steps % LOOK == 0 and self._are_worn(self._lists, u, v)):
            self._lists = None
            self._lists = self._made(u, v, scale)
        return self._lists

    def _are_worn(self, lists: Lists, u: Tensor, v: Tensor) -> bool:
        """Whether scores moved far since the lists were made, or rows needed more than theirs in the last step."""
        if self._sweep is not None and bool(self._sweep.complete(self.share).any()):
            return True
        return not drift(lists.u, lists.v, u, v) <= DRIFT

    def _made(self, u: Tensor, v: Tensor, scale: float) -> Lists:
        rows, columns = ceiling(self._rows, u, scale), ceiling(self._columns, v, scale)
        weights, unit = self._b.double().sum(1).log2(), torch.finfo(u.dtype).eps / 2
        allowed = SPARE * self.share * self._least_sums(u)
        omitted = u.new_empty(len(u), len(v))
        counts, entries = [omitted.new_zeros(1, dtype=torch.int64)], []
        for piece, some in rows.pieces(len(v)):
            most = bounds(some, columns, unit).add_(weights).clamp_(-FAINTEST, FARTHEST).exp2_()
            left = light(most, allowed[piece])
            omitted[piece] = torch.where(left, most, 0.0)
            counts.append((~left).sum(1))
            entries.append((~left).nonzero()[:, 1].int())
        visited = sum(map(len, entries)) / omitted.numel()
        if visited > MOST_VISITED:
            return Lists(scale, u, v, omitted[:0], counts[0], counts[0], 1.0)
        entries.append(torch.zeros_like(counts[0], dtype=torch.int32))  # lists may all be empty, a launch's arrays may not
        return Lists(scale, u, v, omitted, torch.cat(counts).cumsum(0).int(), torch.cat(entries), visited)

    def _least_sums(self, u: Tensor) -> Tensor:
        """(row blocks,) float64: the sums at u are guessed to be no less. 1, or what the last ones say when they were less."""
        if self._sweep is None:
            return u.new_ones(len(u), dtype=torch.float64)
        sums = self._sweep.rho.double() * torch.exp2(u.double() - self._sweep.u)
        return torch.where(sums > 0, sums, 1.0).clamp(max=1.0).amin(1)
