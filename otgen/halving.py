"""Points sorted into blocks of neighbours: the cloud is cut at the median of its widest side, again and again.

All blocks have one width. Boxes around them are tighter than around runs of a space-filling curve, which jump: of uniform points in
the unit cube, tiles of such runs let more than twice as many pairs through the same bound (docs/skipping.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from otgen.chunked import SLOW_STRIDE

MOST = 2048
"""Blocks of a cloud, at most: what is kept for each pair of blocks has a constant bound."""

RIDGE = 1e-6
"""Added to a block's scatter, as a share of its trace, before it is inverted: blocks may lie in a plane, or in a point."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The points of a cloud in blocks.

    order   (blocks, width) int64: which points of the cloud. A few stand in two blocks or places, so that all blocks are full
    real    (blocks, width) bool: whether it is a point's only or first place
    place   (n,) int64: where in `order`, flattened, each point of the cloud is found; meaningless for points left out
    points  (blocks, width, d) their coordinates
    """

    order: Tensor
    real: Tensor
    place: Tensor
    points: Tensor
    lowest: Tensor = field(init=False)
    highest: Tensor = field(init=False)
    centre: Tensor = field(init=False)
    fit: Tensor = field(init=False)

    def __post_init__(self) -> None:
        points = self.points.double()
        centre = points.mean(1)
        spread = points - centre[:, None]
        scatter = spread.mT @ spread
        trace = scatter.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=torch.finfo(torch.float64).tiny)
        fit = torch.linalg.solve(scatter / trace + RIDGE * torch.eye(points.shape[2], dtype=torch.float64), spread.mT / trace)
        found = {"lowest": points.amin(1), "highest": points.amax(1), "centre": centre, "fit": fit}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def of(self, vector: Tensor) -> Tensor:
        """The values (n,) of the cloud's points, (blocks, width)."""
        return vector[self.order]

    def back(self, values: Tensor) -> Tensor:
        """(n, …) in the order of the cloud, of values (blocks, width, …)."""
        return values.flatten(0, 1)[self.place]


def halved(points: Tensor, width: int, among: Tensor | None = None) -> Blocks:
    """The points (n, d) in blocks of at most `width` each, or in MOST larger ones.

    among  (k,) int64: the points that count, where not all do
    """
    n = len(points)
    chosen = torch.arange(n) if among is None else among
    count = len(chosen)
    blocks = 1
    while blocks * width < count and blocks < MOST:
        blocks *= 2
    each = -(-count // blocks)
    length = (each + (each % SLOW_STRIDE == 0)) * blocks
    source = torch.arange(length) * count // length
    again = torch.zeros(length, dtype=torch.bool)
    again[1:] = source[1:] == source[:-1]
    near, places = points[chosen[source]], torch.arange(length)
    groups = 1
    while groups < blocks:
        places = places.view(groups, -1)
        within = near[places]
        widest = (within.amax(1) - within.amin(1)).argmax(1)
        along = within.gather(2, widest[:, None, None].expand(*places.shape, 1))[..., 0]
        places = places.gather(1, along.argsort(1))
        groups *= 2
    places = places.view(blocks, -1)
    order, real = chosen[source[places]], ~again[places]
    place = torch.zeros(n, dtype=torch.int64)
    place[order[real]] = torch.arange(length)[real.flatten()]
    return Blocks(order, real, place, points[order])
