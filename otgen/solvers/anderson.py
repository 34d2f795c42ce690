"""Anderson acceleration of a fixed-point iteration u ← G(u), on the device of its vectors.

The next iterate is the combination of the last images G(u) that makes the same combination of their residuals G(u) − u smallest
(Anderson 1965; Walker and Ni 2011, in difference form). Its memory is 2·depth vectors; one tall-skinny Gram product and one small
solve an iteration. Nothing waits for the device. The problems of a batch are mixed each for itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from otgen.ops import Scalar

DEPTH = 10
"""Differences remembered. To 1e-3, five do as well; to 1e-6, ten take a third fewer iterations than six (n = 1000, 2-D to 64-D)."""

RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Added to the Gram matrix, per mean of its diagonal: differences are parallel up to rounding near the solution."""

GROWTH = 2.0
"""A residual that grew by more than this, since the last iteration, is answered with a plain step."""


def per_problem(values: np.ndarray, like: Tensor) -> Tensor:
    """An array (problems, …) as a tensor that applies to the problems of `like` (…, n), or to its one."""
    return torch.from_numpy(values).to(like.device).reshape(*like.shape[:-1], 1)


class Anderson:
    """Mixes the iterates of one run.

    weights  (n,) or (batch, n) of the norm of a residual: those of the measure
    gauge    whether residuals count only up to a constant: adding one to the potential changes nothing
    longest  how far a mixture may lie from the last image, in any entry: a number, or (batch, 1). Residuals that are equal up to
             rounding, as while mass crosses a gap at so many units of potential an iteration, would extrapolate without end
    """

    def __init__(self, weights: Tensor, *, gauge: bool, longest: Scalar, depth: int = DEPTH) -> None:
        self._weights = weights / weights.sum(-1, keepdim=True)
        self._roots = self._weights.double().sqrt()
        self._gauge, self._depth = gauge, depth
        self._longest = torch.as_tensor(longest).to(weights)
        self._images: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._size: Tensor | None = None
        self._met = np.zeros(weights[..., 0].numel(), dtype=int)

    def next(self, image: Tensor, residual: Tensor, plain: np.ndarray) -> Tensor:
        """The iterates to go on from, for the images G(u) and their residuals G(u) − u, both (n,) or (batch, n).

        plain  (problems,) of those whose image is taken as it is, and whose memory starts afresh after it
        """
        if self._gauge:
            residual = residual - self._mean(residual)
        residual = torch.where(self._weights > 0, residual, 0.0)
        size = self._mean(residual.square())
        grown = torch.zeros_like(size, dtype=torch.bool) if self._size is None else ~(size <= GROWTH**2 * self._size)
        self._size = size
        self._met = np.where(plain, 0, self._met + 1)
        self._images = [*self._images, image][-self._depth - 1 :]
        self._residuals = [*self._residuals, residual][-self._depth - 1 :]
        if self._met.max() < 2:
            return image
        theta = torch.where(grown, 0.0, self._coefficients(residual)).to(image.dtype)
        step = (theta[..., None, :] @ (image[..., None, :] - torch.stack(self._images[:-1], -2)))[..., 0, :]
        length: Tensor = (step - self._mean(step) if self._gauge else step).abs().amax(-1, keepdim=True)
        mixed: Tensor = image - step * (self._longest / torch.maximum(length, self._longest))
        return torch.where(per_problem(plain, image), image, mixed) if plain.any() else mixed

    def _coefficients(self, residual: Tensor) -> Tensor:
        """(…, k): of the differences to the k residuals remembered, those that make the residual smallest."""
        differences = (residual[..., None, :] - torch.stack(self._residuals[:-1], -2)).double() * self._roots[..., None, :]
        count = differences.shape[-2]
        if self._met.min() <= count:
            remembered = np.arange(count, 0, -1) < self._met[:, None]
            differences = differences * per_problem(remembered, differences)
        gram = differences @ differences.mT
        ridge = RIDGE[residual.dtype] * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float64).tiny
        gram.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
        found: Tensor
        found, _ = torch.linalg.solve_ex(gram, differences @ (residual.double() * self._roots)[..., None])
        return found[..., 0]

    def _mean(self, values: Tensor) -> Tensor:
        mean: Tensor = (self._weights * values).sum(-1, keepdim=True)
        return mean
