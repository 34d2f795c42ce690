"""Steps whose sweeps leave out the tiles that hold next to nothing (`otgen.listed`): few dimensions, many points, on a CPU.

Both clouds are sorted into blocks once; points, potentials and sums keep the caller's order everywhere else. Half steps, both at
once, those of a measure with itself, and products with the plan are served; a step whose tiles mostly matter, early in a descent of
eps, visits all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from otgen import ops
from otgen.errors import InputError, unknown
from otgen.halving import halved
from otgen.listed import Tiles
from otgen.solvers.inputs import Clouds
from otgen.solvers.steps import Steps, scale

TILES = ("auto", "all", "listed")

DIMENSIONS = 8
"""Beyond these, boxes around neighbours are as wide as the cloud, and bounds say nothing."""

WIDTH = 64
"""Points in a block, at most: smaller blocks let fewer pairs through, larger ones cost less each (benchmarks/skipping.py)."""

LEAST_PAIRS = 1 << 25
"""Smaller problems keep their matrix (`otgen.solvers.kept`), or are swept as soon as lists are made."""

LEAST_SPREAD = 64.0
"""The square of the radius, in scaled coordinates, below which most tiles matter: lists are not tried."""

HALF_VISITED = 0.4
"""Share of the pairs above which two listed sweeps are not worth it where one, or half a one, gives all sums."""

MOST_OMITTED = 1e-7
"""Share of a sum that may be missing from it, whatever the tolerance."""


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of a problem and its transpose, and those of each side with itself."""

    ahead: Tiles
    back: Tiles
    alone: Tiles
    other: Tiles

    @classmethod
    def of(cls, clouds: Clouds, share: float, coarse: float) -> Tiling:
        sides = []
        for points, weights in ((clouds.x, clouds.a), (clouds.y, clouds.b)):
            rows, weighted = halved(points, WIDTH), weights > 0
            columns = rows if bool(weighted.all()) else halved(points, WIDTH, weighted.nonzero()[:, 0])
            sides.append((rows, columns, weights))
        (x, x_columns, a), (y, y_columns, b) = sides
        pairs = (x, y_columns, a, b), (y, x_columns, b, a), (x, x_columns, a, a), (y, y_columns, b, b)
        return cls(*(Tiles(*pair, share, coarse) for pair in pairs))

    @property
    def swapped(self) -> Tiling:
        return Tiling(self.back, self.ahead, self.other, self.alone)

    @property
    def own(self) -> Tiling:
        return Tiling(*(self.alone,) * 4)


@dataclass(frozen=True, eq=False)
class ListedSteps(Steps):
    """Steps that visit listed tiles where that pays."""

    tiling: Tiling = field(kw_only=True)

    @cached_property
    def swapped(self) -> ListedSteps:
        return self._with(super().swapped, self.tiling.swapped)

    @cached_property
    def alone(self) -> ListedSteps:
        return self._with(super().alone, self.tiling.own)

    @property
    def skipped(self) -> dict[str, Any]:
        return {"visited": self.tiling.ahead.visited, "omitted": max(self.tiling.ahead.omitted, self.tiling.back.omitted)}

    @property
    def sweeps(self) -> int:
        return 1 if self.tiling.ahead.visited == 1.0 else 2

    def half(self, u: Tensor, v: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
        found = self.tiling.ahead.half_step(u, v, self._scale, step)
        return super().half(u, v, step) if found is None else found

    def own(self, u: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor]:
        found = self.tiling.alone.half_step(u, u, self._scale, step, HALF_VISITED)
        return super().own(u, step) if found is None else (self.relaxed(found[0], u, step), found[1])

    def both(self, u: Tensor, v: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = self.tiling.ahead.half_step(u, v, self._scale, step, HALF_VISITED)
        columns = None if rows is None else self.tiling.back.half_step(v, u, self._scale, step, HALF_VISITED)
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

    def _with(self, steps: Steps, tiling: Tiling) -> ListedSteps:
        return ListedSteps(**{own.name: getattr(steps, own.name) for own in fields(Steps)}, tiling=tiling)


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
    if tiles == "all" or missing or (tiles == "auto" and len(clouds.x) * len(clouds.y) < LEAST_PAIRS):
        return steps
    share = min(MOST_OMITTED, max(tol / 100, torch.finfo(clouds.x.dtype).eps))
    given = {own.name: getattr(steps, own.name) for own in fields(Steps)}
    coarse = 0.0 if tiles == "listed" else LEAST_SPREAD / max(clouds.reach, 1e-30) ** 2
    return ListedSteps(**given, tiling=Tiling.of(clouds, share, coarse))


def _missing(clouds: Clouds) -> tuple[str, str] | None:
    """What lists would need of the clouds, and what came instead."""
    if clouds.x.device.type != "cpu" or not ops.streamed(clouds.x):
        return "points on a CPU", f"{clouds.x.device}, where kernels visit all tiles"
    if clouds.extents is not None:
        return "one problem", f"a batch of {len(clouds.x)}"
    if clouds.features is not None:
        return "points without labels", "label costs"
    if clouds.dimension > DIMENSIONS:
        return f"points in at most {DIMENSIONS} dimensions", str(clouds.dimension)
    return None
