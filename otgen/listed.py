"""Sweeps that leave out tiles whose sums are too small to matter, in plain PyTorch: for clouds in few dimensions, on a CPU.

Rows and columns are in blocks of neighbours (`otgen.halving`), and a bound (`otgen.bounds`) says of each tile how much it can add
to the sums of its rows at most. For each block of rows the tiles of smallest bounds are left out, as many as add up to less than a
`share` of the smallest sum. What that sum will be is guessed first: the sums themselves, which only grow when more tiles are
visited, then show where too much was left out, and there the tiles that are missing follow. So every sum is right to the `share`.

Lists outlast changes of the potentials: what was left out grows by the rise of a row's potential and the largest of its columns'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otgen.bounds import bounds, ceiling
from otgen.chunked import CPU_TILE, HIGHEST, LOWEST, NEVER, left_factor, log_sums, right_factor
from otgen.halving import Blocks

MOST_VISITED = 0.8
"""Share of the pairs above which a list is not worth its sweep: rows' own columns are gathered, in tiles that are smaller."""

SPARE = 0.25
"""Share of what may be left out that new lists do leave out: the rest is for potentials that rise."""

DRIFT = 8.0
"""How far, in bits, scores may have moved from where lists were made before new ones are."""

HALVINGS = 6
"""Steps towards the heaviest tile that may be left out, each of which halves what it is known to, in bits."""

FARTHEST = 1000.0
"""Bounds beyond this many bits are taken for this many: powers of two stay finite, and above zero."""


@dataclass(frozen=True, eq=False)
class Lists:
    """Which columns each block of rows visits, made at the potentials u, v (blocks, width).

    omitted  (row blocks, column blocks) float64: at most what a tile would add to a row's sum; 0 for those that are visited
    columns  for each block of rows, the blocks of columns visited, int64. None: all are, and nothing is omitted
    visited  share of the pairs
    """

    scale: float
    u: Tensor
    v: Tensor
    omitted: Tensor
    columns: tuple[Tensor, ...] | None
    visited: float


class Tiles:
    """The tiles of one cloud's points as rows and another's as columns.

    share    what may be missing of a row's sum, relative to it
    coarse   scale below which no list is tried
    visited  share of the pairs that the last sweep visited;  omitted  at most the mass of the plan that it left out
    """

    def __init__(self, rows: Blocks, columns: Blocks, a: Tensor, b: Tensor, share: float, coarse: float = 0.0) -> None:
        self._rows, self._columns, self.share, self.coarse = rows, columns, share, coarse
        self._a = torch.where(rows.real, rows.of(a), 0.0).double()
        self._b = torch.where(columns.real, columns.of(b), 0.0)
        self._lists: Lists | None = None
        self.visited, self.omitted = 1.0, 0.0

    def half_step(
        self, u: Tensor, v: Tensor, scale: float, step: float, most: float = MOST_VISITED, modes: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor] | None:
        """What `otgen.chunked.half_step` gives, the update of u (n,) and the row sums; None where lists exceed `most`.

        modes  those of a kernel (`otgen.ops`): PyTorch needs none
        """
        sweep = self._sweep(u, v, scale, most)
        if sweep is None:
            return None
        found = self._sums(sweep, self._b[..., None], redone=True)[..., 0]
        rho = found.flatten()
        logs = log_sums(rho, sweep.left.flatten(0, 1), sweep.right.flatten(0, 1), self._b.flatten())
        return u - step * self._rows.back(logs.view_as(found)), self._rows.back(rho.view_as(found))

    def product(self, u: Tensor, v: Tensor, values: Tensor, scale: float) -> Tensor | None:
        """Σ_j 2^S_ij b_j V_j (n, k) for V = `values` (m, k); None where lists exceed MOST_VISITED."""
        sweep = self._sweep(u, v, scale, MOST_VISITED)
        if sweep is None:
            return None
        values = values[self._columns.order]
        weighted = torch.cat((values, torch.ones_like(values[..., :1])), -1) * self._b[..., None]
        return self._rows.back(self._sums(sweep, weighted, redone=False)[..., :-1])

    def pass_over(self) -> None:
        """The next sweep is another's, of all tiles."""
        self.visited, self.omitted = 1.0, 0.0

    def _sweep(self, u: Tensor, v: Tensor, scale: float, most: float) -> _Sweep | None:
        """A sweep at (u, v), along lists that are made anew where the old ones were made too far away."""
        self.pass_over()
        if scale < self.coarse:
            return None
        u, v = self._rows.of(u), self._columns.of(v)
        lists = self._lists
        if lists is None or lists.scale != scale or not drift(lists.u, lists.v, u, v) <= DRIFT:
            self._lists = lists = self._listed(u, v, scale)
        if lists.columns is None or lists.visited > most:
            return None
        self.visited = lists.visited
        right = right_factor(self._columns.points, torch.where(self._columns.real, v, NEVER))
        up, across = u.double() - lists.u.double(), (v.double() - lists.v.double()).amax(1)
        shift = up.amax()
        risen = torch.exp2(up - shift), torch.exp2(across + shift)
        return _Sweep(left_factor(self._rows.points, u, scale), right, *risen, lists, lists.columns)

    def _listed(self, u: Tensor, v: Tensor, scale: float) -> Lists:
        rows, columns = ceiling(self._rows, u, scale), ceiling(self._columns, v, scale)
        bits = bounds(rows, columns, torch.finfo(u.dtype).eps / 2).add_(self._b.double().sum(1).log2())
        most = bits.clamp_(-FARTHEST, FARTHEST).exp2_()
        left = light(most, most.new_full((len(most),), SPARE * self.share))
        visited = 1.0 - float(left.double().mean())
        if visited > MOST_VISITED:
            return Lists(scale, u, v, most[:0], None, 1.0)
        return Lists(scale, u, v, most.mul_(left), _columns(~left), visited)

    def _sums(self, sweep: _Sweep, weighted: Tensor, *, redone: bool) -> Tensor:
        """(row blocks, width, k): Σ_j 2^S_ij W_j for W = `weighted` (column blocks, width, k), whose last column is b.

        redone  sums out of range are: nothing need be known of what they lack
        """
        total = weighted.new_zeros((*self._rows.order.shape, weighted.shape[-1]))
        _visit(total, sweep, weighted, sweep.columns)
        missing = sweep.missing(sweep.lists.omitted)
        sums = total[..., -1]
        lost = ~((sums > LOWEST) & (sums < HIGHEST)) if redone else torch.zeros_like(self._rows.real)
        short = (~(missing <= self.share * sums) & ~lost).any(1)
        if bool(short.any()):
            least = torch.where(lost, torch.inf, sums / sweep.up).amin(1)
            more, self._lists = self._extended(sweep, short, least)
            _visit(total, sweep, weighted, more)
            missing, self.visited = sweep.missing(self._lists.omitted), self._lists.visited
        self.omitted = float(torch.where((self._a > 0) & ~lost, self._a * missing, 0.0).sum())
        return total

    def _extended(self, sweep: _Sweep, short: Tensor, least: Tensor) -> tuple[tuple[Tensor, ...], Lists]:
        """What the blocks of rows that are `short` must visit too, for sums of at least `least`, and the lists with it."""
        omitted = sweep.lists.omitted
        left = light(omitted * sweep.across, SPARE * self.share * least) | ~short[:, None]
        more = _columns((omitted > 0) & ~left)
        columns = tuple(torch.cat(pair) if len(pair[1]) else pair[0] for pair in zip(sweep.columns, more))
        visited = sum(len(own) for own in columns) / omitted.numel()
        return more, replace(sweep.lists, omitted=torch.where(left, omitted, 0.0), columns=columns, visited=visited)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The factors of the scores, (blocks, width, d + 2), and what they are summed along.

    up      (row blocks, width) 2 to what each row's potential rose by since the lists were made, less the most any did
    across  (column blocks,)    2 to the largest such rise of a block, and that most
    """

    left: Tensor
    right: Tensor
    up: Tensor
    across: Tensor
    lists: Lists
    columns: tuple[Tensor, ...]

    def missing(self, omitted: Tensor) -> Tensor:
        """(row blocks, width) float64: at most what sums lack without the tiles `omitted`."""
        return self.up * (omitted @ self.across)[:, None]


def drift(old_u: Tensor, old_v: Tensor, u: Tensor, v: Tensor) -> float:
    """How far scores may have moved at most, either way, since the old potentials; a shift from u to v moves none."""
    (down, up), (back, forth) = torch.aminmax(u - old_u), torch.aminmax(v - old_v)
    return float(torch.maximum(up + forth, -down - back))


def light(most: Tensor, allowed: Tensor) -> Tensor:
    """Which tiles of each row (rows, columns) to leave out: those up to a weight with which they add up to `allowed` at most."""
    least, limit = allowed / most.shape[1], allowed
    for _ in range(HALVINGS):
        middle = (least * limit).sqrt()
        fits = torch.where(most <= middle[:, None], most, 0.0).sum(1) <= allowed
        least, limit = torch.where(fits, middle, least), torch.where(fits, limit, middle)
    return most <= least[:, None]


def _columns(visited: Tensor) -> tuple[Tensor, ...]:
    """For each row of a matrix of truth values, which columns are true."""
    return tuple(torch.split_with_sizes(visited.nonzero()[:, 1], visited.sum(1).tolist()))


def _visit(total: Tensor, sweep: _Sweep, weighted: Tensor, columns: tuple[Tensor, ...]) -> None:
    """Add to the sums (row blocks, width, k) what the listed columns make."""
    height, width = total.shape[1], sweep.right.shape[1]
    piece = max(1, CPU_TILE * torch.get_num_threads() // (height * width))
    store = total.new_empty(piece * width * height)
    for block, listed in enumerate(columns):
        for first in range(0, len(listed), piece):
            part = listed[first : first + piece]
            near = sweep.right[part].flatten(0, 1)
            tile = torch.mm(near, sweep.left[block].T, out=store[: len(near) * height].view(-1, height))
            total[block].addmm_(tile.exp2_().T, weighted[part].flatten(0, 1))
