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
"""Blocks of a cloud, at most, on a CPU: what is kept for each pair of blocks has a constant bound."""

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
        ridge = RIDGE * torch.eye(points.shape[2], dtype=torch.float64, device=points.device)
        fit = torch.linalg.solve(scatter / trace + ridge, spread.mT / trace)
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
    """The points (n, d) in a power of two of blocks, of at most `width` each, or in MOST larger ones.

    among  (k,) int64: the points that count, where not all do
    """
    chosen = torch.arange(len(points), device=points.device) if among is None else among
    blocks = 1
    while blocks * width < len(chosen) and blocks < MOST:
        blocks *= 2
    each = -(-len(chosen) // blocks)
    return _cut(points, chosen, blocks, each + (each % SLOW_STRIDE == 0))


def filled(points: Tensor, width: int, among: Tensor | None = None) -> Blocks:
    """The points (n, d) in blocks of `width` each, as few as hold them: what a kernel's tiles are parts of. `among` as above."""
    chosen = torch.arange(len(points), device=points.device) if among is None else among
    return _cut(points, chosen, -(-len(chosen) // width), width)


def _cut(points: Tensor, chosen: Tensor, blocks: int, width: int) -> Blocks:
    """The `chosen` points in `blocks` of one `width`, cut in two, or almost, again and again."""
    device, count, length = points.device, len(chosen), blocks * width
    source = torch.arange(length, device=device) * count // length
    again = torch.zeros(length, dtype=torch.bool, device=device)
    again[1:] = source[1:] == source[:-1]
    near, places = points[chosen[source]], torch.arange(length, device=device)
    sizes = torch.tensor([blocks])
    while int(sizes.max()) > 1:
        group = torch.arange(len(sizes)).repeat_interleave(sizes * width).to(device)
        within = near[places]
        widest = (_ends(within, group, len(sizes), "amax") - _ends(within, group, len(sizes), "amin")).argmax(1)
        order = within.gather(1, widest[group][:, None])[:, 0].argsort(stable=True)
        places = places[order[group[order].argsort(stable=True)]]
        sizes = torch.stack((sizes // 2, sizes - sizes // 2), 1).flatten()
        sizes = sizes[sizes > 0]
    places = places.view(blocks, width)
    order, real = chosen[source[places]], ~again[places]
    place = torch.zeros(len(points), dtype=torch.int64, device=device)
    place[order[real]] = torch.arange(length, device=device)[real.flatten()]
    return Blocks(order, real, place, points[order])


def _ends(points: Tensor, group: Tensor, groups: int, which: str) -> Tensor:
    """(groups, d): the largest or the smallest coordinates in each group of points."""
    ends = points.new_empty(groups, points.shape[1])
    return ends.scatter_reduce_(0, group[:, None].expand_as(points), points, which, include_self=False)
