"""Larger regularisations on the way to the one asked for: a stage costs an alternation and brings the potentials near the next.

In scaled potentials u = kappa·f − (scale/2)·|x|² a change of eps is a multiplication: u·eps/eps'.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from otgen.solvers.steps import Steps

FACTOR = 0.5
"""From one stage to the next. Fewer stages cost more iterations afterwards, more stages save none (n = 1000, 2-D to 64-D)."""

HARD = 150.0
"""R²/eps above which stages pay: below, an accelerated loop from zero takes fewer sweeps than they do."""


@dataclass(frozen=True, eq=False)
class Annealed:
    """A pair to go on from, at the problem's own eps; the alternations and sweeps it took."""

    u: Tensor
    v: Tensor
    n_iters: int
    passes: int


def stages(steps: Steps) -> list[float]:
    """Regularisations from R² down, to be visited before that of `steps`; none when the problem is easy, or a side one point."""
    reach, eps = steps.clouds.reach, steps.eps
    if reach**2 <= HARD * eps or min(len(steps.clouds.x), len(steps.clouds.y)) == 1:
        return []
    found = [reach**2]
    while found[-1] * FACTOR > eps:
        found.append(found[-1] * FACTOR)
    return found


def anneal(steps: Steps, f: Tensor, g: Tensor, through: list[float]) -> Annealed:
    """One alternation at each stage, from the potentials f (n,) and g (m,) in units of the cost, which are zero as a rule."""
    at = [steps.at(eps) for eps in (*through, steps.eps)]
    u, v = at[0].scaled(f, g)
    for stage, following in pairwise(at):
        u, _ = stage.rows(u, v)
        v, _ = stage.columns(u, v)
        u, v = u * (stage.eps / following.eps), v * (stage.eps / following.eps)
    return Annealed(u, v, len(through), 2 * len(through))
