"""Steps whose sweeps leave out the tiles that hold next to nothing: few dimensions, many points.

Both clouds are sorted into blocks once; points, potentials and sums keep the caller's order everywhere else. On a CPU
(`otgen.listed`) half steps, both at once, those of a measure with itself, and products with the plan are served; on a GPU
(`otgen.launched`) all but the products. A step whose tiles mostly matter, early in a descent of eps, visits all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from otgen import listed_step, ops
from otgen.errors import InputError, unknown
from otgen.families import lists
from otgen.halving import filled, halved
from otgen.launched import MOST_PAIRS, LaunchedTiles
from otgen.listed import MOST_VISITED, Tiles
from otgen.ops import Flags
from otgen.solvers.inputs import Clouds
from otgen.solvers.steps import Steps, scale

TILES = ("auto", "all", "listed")

WIDTH = 64
"""Points in a block, at most, on a CPU: smaller blocks let fewer pairs through, larger ones cost less each
(benchmarks/skipping.py). On a GPU `otgen.families.lists.WIDTH`."""

LEAST_PAIRS = 1 << 25
"""Smaller problems keep their matrix (`otgen.solvers.kept`), or are swept as soon as lists are made."""

LEAST_SPREAD = 64.0
"""The square of the radius, in scaled coordinates, below which most tiles matter: lists are not tried."""

HALF_VISITED = 0.4
"""Share of the pairs above which two listed sweeps are not worth it where one, or half a one, gives all sums."""

MOST_OMITTED = 1e-7
"""Share of a sum that may be missing from it, whatever the tolerance."""


class Sorted:
    """Both clouds in blocks, and what is made of them when it is first asked for: a solve may not come to a listed step."""

    def __init__(self, clouds: Clouds, share: float, coarse: float) -> None:
        self._clouds, self._limits = clouds, (share, coarse)

    @cached_property
    def tiles(self) -> tuple[Tiles | LaunchedTiles, ...]:
        """Those of the problem, of its transpose, of the first side with itself, and of the second."""
        c, sides = self._clouds, []
        streamed = ops.streamed(c.x)
        for points, weights in ((c.x, c.a), (c.y, c.b)):
            cut = partial(halved, points, WIDTH) if streamed else partial(filled, points, lists.WIDTH)
            rows, weighted = cut(), weights > 0
            columns = rows if bool(weighted.all()) else cut(weighted.nonzero()[:, 0])
            sides.append((rows, columns, weights))
        (x, x_columns, a), (y, y_columns, b) = sides
        pairs = (x, y_columns, a, b), (y, x_columns, b, a), (x, x_columns, a, a), (y, y_columns, b, b)
        return tuple((Tiles if streamed else LaunchedTiles)(*pair, *self._limits) for pair in pairs)

    @property
    def begun(self) -> bool:
        return "tiles" in vars(self)


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of a problem and its transpose, and those of each side with itself: which of `Sorted.tiles` they are."""

    sorted: Sorted
    places: tuple[int, ...] = (0, 1, 2, 3)

    @property
    def ahead(self) -> Tiles | LaunchedTiles:
        return self.sorted.tiles[self.places[0]]

    @property
    def back(self) -> Tiles | LaunchedTiles:
        return self.sorted.tiles[self.places[1]]

    @property
    def alone(self) -> Tiles | LaunchedTiles:
        return self.sorted.tiles[self.places[2]]

    @property
    def visited(self) -> float:
        """The share of the pairs that the last sweep visited."""
        return self.ahead.visited if self.sorted.begun else 1.0

    @property
    def omitted(self) -> float:
        """At most the mass of the plan that the last sweeps left out."""
        return max(self.ahead.omitted, self.back.omitted) if self.sorted.begun else 0.0

    @property
    def swapped(self) -> Tiling:
        ahead, back, alone, other = self.places
        return Tiling(self.sorted, (back, ahead, other, alone))

    @property
    def own(self) -> Tiling:
        return Tiling(self.sorted, (self.places[2],) * 4)


@dataclass(frozen=True, eq=False)
class ListedSteps(Steps):
    """Steps that visit listed tiles where that pays."""

    tiling: Tiling = field(kw_only=True)

    @cached_property
    def swapped(self) -> ListedSteps:
        return super().swapped.into(type(self), tiling=self.tiling.swapped)

    @cached_property
    def alone(self) -> ListedSteps:
        return super().alone.into(type(self), tiling=self.tiling.own)

    @property
    def skipped(self) -> dict[str, Any]:
        return {"visited": self.tiling.visited, "omitted": self.tiling.omitted}

    @property
    def sweeps(self) -> int:
        return super().sweeps if self.tiling.visited == 1.0 else 2

    def runs(self, schedule: str) -> bool:
        """No: launches of many iterations visit all tiles."""
        return False

    def half(self, u: Tensor, v: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
        found = self.tiling.ahead.half_step(u, v, self._scale, step, MOST_VISITED, self.modes)
        return super().half(u, v, step) if found is None else found

    def own(self, u: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor]:
        found = self.tiling.alone.half_step(u, u, self._scale, step, HALF_VISITED, self.modes)
        return super().own(u, step) if found is None else (self.relaxed(found[0], u, step), found[1])

    def both(self, u: Tensor, v: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        most = HALF_VISITED, self.modes
        rows = self.tiling.ahead.half_step(u, v, self._scale, step, *most)
        columns = None if rows is None else self.tiling.back.half_step(v, u, self._scale, step, *most)
        if rows is None or columns is None:
            self.tiling.ahead.pass_over()
            self.tiling.back.pass_over()
            return super().both(u, v, step)
        return self.relaxed(rows[0], u, step), self.swapped.relaxed(columns[0], v, step), rows[1], columns[1]

    def debiased(self, u: Tensor, v: Tensor, p: Tensor, q: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.both(u, v, step)[:2], self.alone.own(p, step)[0], self.swapped.alone.own(q, step)[0]

    def times_both(self, u: Tensor, v: Tensor, values: Tensor, values_t: Tensor) -> tuple[Tensor, Tensor]:
        found = self.tiling.ahead.product(u, v, values, self._scale)
        if found is None:
            return super().times_both(u, v, values, values_t)
        return weighted(self.clouds.a, found), self.swapped.times(v, u, self.clouds.b, values_t)

    def times(self, u: Tensor, v: Tensor, a: Tensor, values: Tensor) -> Tensor:
        columns = values if values.ndim == 2 else values[:, None]
        found = self.tiling.ahead.product(u, v, columns, self._scale)
        if found is None:
            return super().times(u, v, a, values)
        return weighted(a, found).view(len(a), *values.shape[1:])

    def gradient(self, u: Tensor, v: Tensor, marginal: Tensor) -> Tensor:
        return 2.0 * (marginal[:, None] * self.clouds.x - self.times(u, v, self.clouds.a, self.clouds.y))

    @property
    def _scale(self) -> float:
        return float(scale(self.eps))


@dataclass(frozen=True, eq=False)
class LaunchedSteps(ListedSteps):
    """Steps by kernels, of which those that apply the plan, and the one of a debiased step, visit all tiles."""

    times, times_both, gradient, debiased = Steps.times, Steps.times_both, Steps.gradient, Steps.debiased

    @property
    def listed(self) -> tuple[Flags, ...]:
        return (listed_step.flags_of(lists.WIDTH),)


def weighted(a: Tensor, sums: Tensor) -> Tensor:
    """a∘sums (n, k), zero where there is no weight."""
    return torch.where(a[:, None] > 0, a[:, None] * sums, 0.0)


def listed(steps: Steps, tol: float, tiles: Any = "auto") -> Steps:
    """The steps of one problem, or such as visit listed tiles only.

    tol    marginal error that is asked for, 0 for none; what is left out of a sum is below a hundredth of it, and MOST_OMITTED
    tiles  "auto": lists where they can be had and pay;  "all";  "listed": wherever they can be had

    Raises UsageError for another word, and InputError for "listed" where there are none.
    """
    if tiles not in TILES:
        raise unknown("tiles", str(tiles), TILES)
    clouds = steps.clouds
    missing = _missing(clouds)
    if tiles == "listed" and missing:
        raise InputError(f"expected {missing[0]} for tiles='listed'; got {missing[1]}; type tiles='auto'")
    if tiles == "all" or missing or (tiles == "auto" and not _pays(steps)):
        return steps
    share = min(MOST_OMITTED, max(tol / 100, torch.finfo(clouds.x.dtype).eps))
    coarse = 0.0 if tiles == "listed" else LEAST_SPREAD / max(clouds.reach, 1e-30) ** 2
    kind = ListedSteps if ops.streamed(clouds.x) else LaunchedSteps
    return steps.into(kind, tiling=Tiling(Sorted(clouds, share, coarse)))


def _pays(steps: Steps) -> bool:
    """Whether there are enough pairs, and on a GPU a tuned kernel."""
    x, y = steps.clouds.x, steps.clouds.y
    return len(x) * len(y) >= LEAST_PAIRS and (ops.streamed(x) or listed_step.pays(x, y, steps.modes))


def _missing(clouds: Clouds) -> tuple[str, str] | None:
    """What lists would need of the clouds, and what came instead."""
    if clouds.x.device.type != "cpu" and ops.streamed(clouds.x):
        return "points on a CPU, or in float32", f"float64 on {clouds.x.device}, where PyTorch visits all tiles"
    if clouds.extents is not None:
        return "one problem", f"a batch of {len(clouds.x)}"
    if clouds.features is not None:
        return "points without labels", "label costs"
    if clouds.dimension > lists.DIMENSIONS:
        return f"points in at most {lists.DIMENSIONS} dimensions", str(clouds.dimension)
    pairs = math.prod(-(-len(side) // lists.WIDTH) for side in (clouds.x, clouds.y))
    if not ops.streamed(clouds.x) and pairs > MOST_PAIRS:
        return f"at most {MOST_PAIRS} pairs of blocks of {lists.WIDTH} points", str(pairs)
    return None
