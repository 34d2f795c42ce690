"""Sweeps over a small problem on a CPU: the exponentials are computed once and kept, every sweep is a matrix-vector product.

For a pair (u, v) near the pair (u', v') that the matrix K = 2^S(u', v') was taken at, ρ = 2^(u − u')·K(b·2^(v − v')): the
stabilised scaling of Schmitzer (2019, section 3.1). A pair too far away, or sums out of range, and K is taken anew. The matrix has
a constant bound, KEPT_BYTES, and goes when the loop ends: memory stays O((n + m) d).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from otgen import chunked, ops
from otgen.solvers.inputs import Clouds
from otgen.solvers.steps import Steps, scale

KEPT_BYTES = 1 << 27
"""Largest matrix that is kept."""

REACH = 24.0
"""How far, in powers of two, a potential may move from where the matrix was taken: what underflowed there stays negligible."""


def keepable(steps: Steps) -> bool:
    """Whether the problem runs on the CPU, is small, and has no point without weight (whose exponentials nothing bounds)."""
    c = steps.clouds
    small = c.a.numel() * c.y.shape[-2] * c.x.element_size() <= KEPT_BYTES
    if not (small and ops.streamed(c.x) and c.x.device.type == "cpu"):
        return False
    return _weighted(c) and _weighted(c.swapped)


def _weighted(side: Clouds) -> bool:
    """Whether every point of the first side has weight; padding is none."""
    weighted = side.a > 0
    return bool((weighted if side.real is None else weighted | ~side.real).all())


class _Matrix:
    """2^S of a problem, at a pair that is near all it was asked about."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._values = steps.clouds.x.new_empty((*steps.clouds.a.shape, steps.clouds.b.shape[-1]))
        self._pair: tuple[Tensor, Tensor] | None = None

    def sums(self, u: Tensor, v: Tensor, *, transposed: bool) -> Tensor:
        """Row sums at (u, v), or column sums; the matrix is taken there first when it is too far away."""
        clouds = self._steps.clouds
        if self._pair is None or max(float((new - old).abs().max()) for new, old in zip((u, v), self._pair)) > REACH:
            pair = clouds.filled(u), clouds.swapped.filled(v)
            chunked.exponentials(clouds.x, clouds.y, *pair, scale(self._steps.eps), out=self._values)
            self._pair = u.clone(), v.clone()
        up, across = torch.exp2(u - self._pair[0]), torch.exp2(v - self._pair[1])
        if transposed:
            return across * _times(self._values.mT, clouds.a * up)
        return up * _times(self._values, clouds.b * across)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix by a vector, or each of a batch by its own."""
    return matrix @ vector if vector.ndim == 1 else torch.bmm(matrix, vector[..., None])[..., 0]


@dataclass(frozen=True, eq=False)
class KeptSteps(Steps):
    """Steps whose half-steps read a kept matrix. The first one does not: what it starts from may be far from any solution."""

    _matrix: list[_Matrix] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, steps: Steps) -> KeptSteps:
        return steps.into(cls)

    def only(self, problems: Tensor) -> KeptSteps:
        part = KeptSteps.of(super().only(problems))
        part._matrix.extend(self._matrix)
        return part

    def rows(self, u: Tensor, v: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
        rho = self._sums(u, v, transposed=False)
        return super().rows(u, v, step) if rho is None else _updated(self, u, rho, step)

    def columns(self, u: Tensor, v: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
        gamma = self._sums(u, v, transposed=True)
        return super().columns(u, v, step) if gamma is None else _updated(self.swapped, v, gamma, step)

    def _sums(self, u: Tensor, v: Tensor, *, transposed: bool) -> Tensor | None:
        """Row sums of the pair, or column sums; None at the first call, and when they leave the range that can be trusted."""
        if not self._matrix:
            self._matrix.append(_Matrix(self))
            return None
        sums = self._matrix[0].sums(u, v, transposed=transposed)
        real = (self.clouds.swapped if transposed else self.clouds).real
        if real is not None:
            sums = torch.where(real, sums, 1.0)
        smallest, largest = torch.aminmax(sums)
        if float(smallest) > chunked.LOWEST and float(largest) < chunked.HIGHEST:
            return sums
        self._matrix[0] = _Matrix(self)
        return None


def _updated(steps: Steps, u: Tensor, rho: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """u after the update that these row sums make, and the sums; both stay where nothing is worked on, and sums are 1."""
    return steps.relaxed(u - step * rho.log2(), u, step), rho
