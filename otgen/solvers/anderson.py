"""Anderson acceleration of a fixed-point iteration u ← G(u), on the device of its vectors.

The next iterate is the combination of the last images G(u) that makes the same combination of their residuals G(u) − u smallest
(Anderson 1965; Walker and Ni 2011, in difference form). Its memory is 2·depth vectors; one tall-skinny Gram product and one small
solve an iteration. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 10
"""Differences remembered. To 1e-3, five do as well; to 1e-6, ten take a third fewer iterations than six (n = 1000, 2-D to 64-D)."""

RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Added to the Gram matrix, per mean of its diagonal: differences are parallel up to rounding near the solution."""

GROWTH = 2.0
"""A residual that grew by more than this, since the last iteration, is answered with a plain step."""


class Anderson:
    """Mixes the iterates of one run.

    weights  (n,) of the norm of a residual: those of the measure
    gauge    whether residuals count only up to a constant: adding one to the potential changes nothing
    longest  how far a mixture may lie from the last image, in any entry. Residuals that are equal up to rounding, as while mass
             crosses a gap at so many units of potential an iteration, would extrapolate without end
    """

    def __init__(self, weights: Tensor, *, gauge: bool, longest: float, depth: int = DEPTH) -> None:
        self._weights = weights / weights.sum()
        self._gauge, self._longest, self._depth = gauge, longest, depth
        self._images: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._size: Tensor | None = None

    def forget(self) -> None:
        """Starts afresh from the next image."""
        self._images, self._residuals, self._size = [], [], None

    def next(self, image: Tensor, residual: Tensor) -> Tensor:
        """The iterate to go on from, for the image G(u) and its residual G(u) − u, both (n,)."""
        if self._gauge:
            residual = residual - self._weights @ residual
        residual = torch.where(self._weights > 0, residual, 0.0)
        size = self._weights @ residual.square()
        grown = False if self._size is None else ~(size <= GROWTH**2 * self._size)
        self._size = size
        self._images = [*self._images, image][-self._depth - 1 :]
        self._residuals = [*self._residuals, residual][-self._depth - 1 :]
        if len(self._images) == 1:
            return image
        differences = (residual - torch.stack(self._residuals[:-1])).double() * self._weights.double().sqrt()
        gram = differences @ differences.T
        ridge = RIDGE[image.dtype] * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
        right = differences @ (residual.double() * self._weights.double().sqrt())
        theta = torch.linalg.solve(gram + ridge * torch.eye(len(right), dtype=gram.dtype, device=gram.device), right)
        theta = torch.where(torch.as_tensor(grown, device=gram.device), 0.0, theta).to(image.dtype)
        step = theta @ (image - torch.stack(self._images[:-1]))
        length = (step - self._weights @ step if self._gauge else step).abs().max()
        return image - step * (self._longest / length.clamp(min=self._longest))
