"""Label costs C_ij = |x_i − y_j|² + W[k_i, l_j] for points of classes k, l, on the kernels of the squared distance.

W[k_i, l_j] is a product of coordinates too: with −W[k_i, :]/2 appended to x_i and the indicator of l_j to y_j,

    <x'_i, y'_j> = <x_i, y_j> − W[k_i, l_j]/2,        so that |x_i|² + |y_j|² − 2·<x'_i, y'_j> = C_ij

whatever computes scores computes label costs, gradients and maps, and nothing is looked up per pair. V classes cost V coordinates.
The cost between data sets of Alvarez-Melis and Fusi 2020 (OTDD), as flash-sinkhorn has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from otgen.errors import InputError
from otgen.solvers.inputs import INTEGERS, Clouds, as_tensor, working_dtype

NAMES = ("labels_a", "labels_b", "label_cost")


@dataclass(frozen=True, eq=False)
class Labels:
    """Classes a (…, n), b (…, m) from 0, int64, and what transport between two classes costs more, (V, V)."""

    a: Tensor
    b: Tensor
    cost: Tensor


def read_labels(
    labels_a: Any, labels_b: Any, cost: Any, x: Tensor, y: Tensor, *, names: tuple[str, str, str] = NAMES, numpy: bool = False
) -> Labels | None:
    """The caller's labels of points x (…, n, d), y (…, m, d); None when there are none. Raises InputError for what does not fit."""
    given = (labels_a, labels_b, cost)
    if all(value is None for value in given):
        return None
    if any(value is None for value in given):
        missing = names[[value is None for value in given].index(True)]
        raise InputError(f"expected {', '.join(names)} together; got no {missing}; pass it, or none of them")
    w = as_tensor(names[2], cost, numpy).detach().to(x.device, working_dtype(x))
    if w.ndim != 2 or w.shape[0] != w.shape[1] or 0 in w.shape:
        raise InputError(f"expected {names[2]} of shape (classes, classes); got {tuple(w.shape)}; pass a square matrix")
    if not bool(w.isfinite().all()) or not torch.allclose(w, w.mT):
        raise InputError(f"expected a finite, symmetric {names[2]}; got another; type ({names[2]} + {names[2]}.T) / 2")
    found = []
    for name, value, points in ((names[0], labels_a, x), (names[1], labels_b, y)):
        labels = as_tensor(name, value, numpy)
        if labels.dtype not in INTEGERS or labels.shape != points.shape[:-1]:
            came = f"{tuple(labels.shape)} of {str(labels.dtype).removeprefix('torch.')}"
            raise InputError(
                f"expected {name} of shape {tuple(points.shape[:-1])}, integers; got {came}; pass a class for each point"
            )
        if labels.device != points.device:
            raise InputError(f"expected {name} on the points' device {points.device}; got {labels.device}; move it there")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= len(w):
            raise InputError(f"expected classes from 0 to {len(w) - 1} in {name}; got {lowest} to {highest}; enlarge {names[2]}")
        found.append(labels.long())
    return Labels(found[0], found[1], w)


def labelled(clouds: Clouds, labels: Labels | None) -> Clouds:
    """The clouds with their label cost in the product; the same without labels."""
    if labels is None:
        return clouds
    rows, ones = -0.5 * labels.cost, torch.eye(len(labels.cost), dtype=labels.cost.dtype, device=labels.cost.device)
    x, y = (torch.cat((p, table[k]), -1) for p, table, k in ((clouds.x, rows, labels.a), (clouds.y, ones, labels.b)))
    other_x, other_y = (torch.cat((p, table[k]), -1) for p, table, k in ((clouds.x, ones, labels.a), (clouds.y, rows, labels.b)))
    size, largest = rows.square().sum(1).max(), labels.cost.abs().max()
    radius, reach = ((clouds.radius**2 + size) * (clouds.radius**2 + 1.0)) ** 0.25, (clouds.reach**2 + largest / 4) ** 0.5
    if clouds.extents is None:
        radius, reach = float(radius), float(reach)
    features = clouds.x.shape[-1]
    return replace(clouds, x=x, y=y, radius=radius, reach=reach, opposite=(other_x, other_y), features=features)


def without_labels(clouds: Clouds, what: str) -> None:
    """Raise NotImplementedError for clouds with labels: `what` would need those of new points."""
    if clouds.features is not None:
        raise NotImplementedError(f"{what} of a problem with label costs is not implemented")
