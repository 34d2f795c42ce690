"""The plan of a solved problem as something to multiply by and to index, and what its sums say; the matrix is never stored.

Entries are  P_ij = a_i b_j 2^(u_i + v_j + scale·<x_i, y_j>)  in the scaled potentials of `otgen.families.sinkhorn`. Indices follow
numpy's rules; names are those of GeomLoss 0.3 (`plan_operator`, `density`), POT (`lazy_plan`) and OTT (`entropy`, `dual_cost`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otgen.errors import InputError
from otgen.solvers.inputs import Given
from otgen.solvers.solution import Solution
from otgen.solvers.steps import scale

PLAN_LIMIT = 1 << 30
"""Largest dense block of a plan, in bytes, that is handed out."""

FARTHEST = 1 << 62
"""Larger indices than this count as this: they are out of range all the same, and an int64 holds it."""


@dataclass(frozen=True, eq=False)
class PlanOperator:
    """P (n, m) as a linear map that is never dense, GeomLoss 0.3's `plan_operator`: `operator @ v`, `operator.T`."""

    _solution: Solution
    _given: Given
    _transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m), or (m, n) of the transpose."""
        n, m = _sizes(self._solution)
        return (m, n) if self._transposed else (n, m)

    @property
    def T(self) -> PlanOperator:
        """Pᵀ."""
        return replace(self, _transposed=not self._transposed)

    def __matmul__(self, v: Any) -> Any:
        """P·v (n,) or (n, k), for v (m,) or (m, k) of the kind, device and dtype of X_a. One sweep.

        Raises InputError when `v` does not fit.
        """
        return product(self._solution, self._given, v, self._transposed, "", "operator.T @ v")

    def __repr__(self) -> str:
        return f"PlanOperator(shape={self.shape})"


def product(solution: Solution, given: Given, v: Any, transposed: bool, asked: str, cure: str) -> Any:
    """P·v, or Pᵀ·v. Raises InputError when `v` does not fit; for one of the other side it says what was `asked`, and the `cure`."""
    came = tuple(getattr(v, "shape", ()))
    other, size = _sizes(solution)
    if transposed:
        size, other = other, size
    if size != other and came[:1] == (other,):
        raise InputError(f"expected v of shape ({size}) or ({size}, k){asked}; got {came}; type {cure}")
    shape = (size,) if len(came) <= 1 else (size, None)
    values = given.argument("v", v, shape, keep=not isinstance(solution, Solution))
    return given.answer(solution.apply(values, transposed=transposed))


@dataclass(frozen=True, eq=False)
class LazyPlan:
    """P (n, m), its entries computed when they are asked for: POT's `lazy_plan`, with the indices of a dense matrix.

    `lazy[i]` is a row, `lazy[i0:i1, j0:j1]` a block, `lazy[i, j]` an entry. A vector of integers may stand for rows or columns;
    two of one length are pairs, such as `OTResult.sample` draws. Iteration gives rows. No block is kept. Not differentiable.
    """

    _solution: Solution
    _given: Given

    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return _sizes(self._solution)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """The block as a dense array of the caller's kind; d multiplications and one exponential an entry.

        Raises IndexError for an index out of range or of a kind that is not taken, and InputError above PLAN_LIMIT bytes.
        """
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > 2:
            raise IndexError(f"expected at most 2 indices, for rows and columns; got {len(keys)}; type lazy_plan[i, j]")
        keys = (*keys, *(slice(None),) * (2 - len(keys)))
        device = self._solution.clouds.x.device
        rows, columns = (_index(k, size, axis, device) for k, size, axis in zip(keys, self.shape, ("row", "column")))
        if rows.ndim == columns.ndim == 1 and not any(isinstance(k, slice) for k in keys):
            return self._given.answer(_entries(self._solution, rows, columns))
        require_room("block", rows.numel(), columns.numel(), self._solution, "fewer rows at once, lazy_plan[i0:i1]")
        found = block(self._solution, rows.reshape(-1), columns.reshape(-1))
        return self._given.answer(found.reshape(rows.shape + columns.shape))

    def __repr__(self) -> str:
        return f"LazyPlan(shape={self.shape})"


def block(solution: Solution, rows: Any, columns: Any) -> Tensor:
    """P at `rows` and `columns`, slices or vectors of indices."""
    c, (u, v) = solution.clouds, (solution.outcome.u, solution.outcome.v)
    scores = torch.addmm(v[columns], c.x[rows], c.y[columns].T, alpha=float(scale(solution.eps))).add_(u[rows][:, None])
    return _weighted(scores.exp2_(), c.a[rows][:, None], c.b[columns])


def _entries(solution: Solution, rows: Tensor, columns: Tensor) -> Tensor:
    """(k,): P at the pairs (rows, columns)."""
    if rows.shape != columns.shape:
        sizes = f"{len(rows)} and {len(columns)}"
        raise IndexError(f"expected vectors of one length for pairs; got {sizes}; type lazy_plan[i][:, j] for the block they span")
    c, (u, v) = solution.clouds, (solution.outcome.u, solution.outcome.v)
    scores = u[rows] + v[columns] + scale(solution.eps) * (c.x[rows] * c.y[columns]).sum(1)
    return _weighted(scores.exp2_(), c.a[rows], c.b[columns])


def _weighted(density: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a·b·density in place, with exact zeros where there is no weight: a density may be infinite there."""
    return torch.where((a > 0) & (b > 0), density.mul_(a).mul_(b), 0.0)


def _index(key: Any, size: int, axis: str, device: torch.device) -> Tensor:
    """The indices, some negative, that `key` stands for on an axis of `size`: (k,), or () for an integer. Raises IndexError."""
    if isinstance(key, slice):
        along = range(size)[key]
        return along.start + along.step * torch.arange(len(along), device=device)
    index = _integers(key)
    if index is None:
        came = f"{key.dtype} of shape {tuple(key.shape)}" if hasattr(key, "dtype") else type(key).__name__
        raise IndexError(f"expected an integer, a slice or a vector of integers as {axis} index; got {came}; type lazy_plan[i0:i1]")
    index = index.to(device)
    outside = index[(index < -size) | (index >= size)]
    if outside.numel():
        raise IndexError(
            f"expected {axis} indices from {-size} to {size - 1}; got {int(outside[0])}; type lazy_plan.shape for the sizes"
        )
    return index


def _integers(key: Any) -> Tensor | None:
    """`key` as int64 of shape () or (k,); None if it is anything else."""
    if isinstance(key, np.ndarray) and key.dtype.kind in "iu":
        key = torch.from_numpy(key.astype(np.int64))
    if isinstance(key, Tensor):
        whole = not (key.is_floating_point() or key.is_complex() or key.dtype == torch.bool)
        return key.to(torch.int64) if whole and key.ndim <= 1 else None
    try:
        return None if isinstance(key, (bool, np.ndarray)) else torch.tensor(min(max(operator.index(key), -FARTHEST), FARTHEST))
    except TypeError:
        return None


def require_room(what: str, n: int, m: int, solution: Solution, cure: str) -> None:
    """Raise InputError for n × m entries of more than PLAN_LIMIT bytes; `cure` is what to type."""
    size = n * m * solution.clouds.x.element_size()
    if size > PLAN_LIMIT:
        raise InputError(f"expected a {what} of at most {PLAN_LIMIT:,} bytes; {n} × {m} entries take {size:,}; type {cure}")


def folded(potential: Tensor, weights: Tensor, eps: float) -> Tensor:
    """f + eps·log a, and −∞ where there is no weight: the potential as OTT has it."""
    return torch.where(weights > 0, potential + eps * torch.where(weights > 0, weights, 1.0).log(), -torch.inf)


def dual_cost(solution: Solution) -> Tensor:
    """<a, f + eps·log a> + <b, g + eps·log b>, a float64 scalar."""
    return _mean_score(solution, solution.a, solution.b)


def entropy(solution: Solution, linear_cost: Tensor) -> Tensor:
    """−Σ P log P, a float64 scalar, given <P, C>: the rest of log P = (f + g − C)/eps + log a + log b sums over the marginals."""
    return (linear_cost - _mean_score(solution, solution.r, solution.c)) / float(solution.eps)


def _mean_score(solution: Solution, r: Tensor, c: Tensor) -> Tensor:
    """<r, f + eps·log a> + <c, g + eps·log b> over points of weight, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=r.device)
    for marginal, potential, weights in ((r, solution.f, solution.a), (c, solution.g, solution.b)):
        score = potential.double() + float(solution.eps) * torch.where(weights > 0, weights.double(), 1.0).log()
        total = total + torch.where(weights > 0, marginal.double() * score, 0.0).sum()
    return total


def _sizes(solution: Solution) -> tuple[int, int]:
    return solution.clouds.x.shape[0], solution.clouds.y.shape[0]


_PAPERS = {
    "the algorithm": """Marco Cuturi. Sinkhorn distances: lightspeed computation of optimal transport. NeurIPS 26, 2013.

@inproceedings{cuturi2013sinkhorn,
  author = {Cuturi, Marco},
  title = {Sinkhorn Distances: Lightspeed Computation of Optimal Transport},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {26},
  year = {2013}
}""",
    "the divergence": """Jean Feydy, Thibault Séjourné, François-Xavier Vialard, Shun-ichi Amari, Alain Trouvé, Gabriel Peyré.
Interpolating between optimal transport and MMD using Sinkhorn divergences. AISTATS, PMLR 89, 2681–2690, 2019.

@inproceedings{feydy2019interpolating,
  author = {Feydy, Jean and S{\\'e}journ{\\'e}, Thibault and Vialard, Fran{\\c{c}}ois-Xavier and Amari, Shun-ichi and
            Trouv{\\'e}, Alain and Peyr{\\'e}, Gabriel},
  title = {Interpolating between Optimal Transport and {MMD} using {S}inkhorn Divergences},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  pages = {2681--2690},
  year = {2019}
}""",
    "relaxed marginals": """Lénaïc Chizat, Gabriel Peyré, Bernhard Schmitzer, François-Xavier Vialard.
Scaling algorithms for unbalanced optimal transport problems. Mathematics of Computation 87(314), 2563–2609, 2018.

@article{chizat2018scaling,
  author = {Chizat, L{\\'e}na{\\"i}c and Peyr{\\'e}, Gabriel and Schmitzer, Bernhard and Vialard, Fran{\\c{c}}ois-Xavier},
  title = {Scaling Algorithms for Unbalanced Optimal Transport Problems},
  journal = {Mathematics of Computation},
  volume = {87},
  number = {314},
  pages = {2563--2609},
  year = {2018}
}""",
}


def citation(*, debiased: bool, relaxed: bool) -> str:
    """The papers behind a result, in words and in BibTeX."""
    wanted = {"the algorithm": True, "the divergence": debiased, "relaxed marginals": relaxed}
    return "\n\n".join(f"For {subject}: {_PAPERS[subject]}" for subject, needed in wanted.items() if needed)
