"""Larger regularisations on the way to the one asked for: a stage costs an alternation and brings the potentials near the next.

In scaled potentials u = kappa·f − (scale/2)·|x|² a change of eps is a multiplication: u·eps/eps'. The problems of a batch have each
their own number of stages; those with fewer start later.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from otgen.solvers.steps import Steps

FACTOR = 0.5
"""From one stage to the next. Fewer stages cost more iterations afterwards, more stages save none (n = 1000, 2-D to 64-D)."""

HARD = 150.0
"""R²/eps above which stages pay: below, an accelerated loop from zero takes fewer sweeps than they do."""


@dataclass(frozen=True, eq=False)
class Annealed:
    """A pair to go on from, at the problem's own eps; the alternations and sweeps (problems,) it took."""

    u: Tensor
    v: Tensor
    n_iters: np.ndarray
    passes: np.ndarray


def stages(steps: Steps, scaling: float | None = None, most: float = np.inf) -> np.ndarray:
    """(problems, stages): regularisations from R² down, to be visited before that of `steps`, and NaN before a problem's first one.

    scaling  from one blur to the next, so its square from one stage to the next; given, easy problems have stages too
    most     a problem with more of them has its first ones

    None when R² is no larger than eps, or a side is one point, or without `scaling` the problem is easy.
    """
    factor, least = (FACTOR, HARD) if scaling is None else (scaling**2, 1.0)
    reach, eps = (np.atleast_1d(_host(value)) for value in (steps.clouds.reach, steps.eps))
    hard = (reach**2 > least * eps) & (_smaller_side(steps) > 1)
    count = np.where(hard, np.ceil(np.log(np.where(hard, reach**2 / eps, 1.0)) / -np.log(factor) - 1e-9), 0)
    count = np.minimum(count, most).astype(int)
    late = count[:, None] - np.arange(count.max(initial=0), 0, -1)
    return np.where(late >= 0, reach[:, None] ** 2 * factor ** late.clip(0), np.nan)


def anneal(steps: Steps, f: Tensor, g: Tensor, through: np.ndarray) -> Annealed:
    """One alternation at each stage, from the potentials f (…, n) and g (…, m) in units of the cost, which are zero as a rule.

    through  (problems, stages), as `stages` gives them
    """
    at = [_stage(steps, through[:, i]) for i in range(through.shape[1])] + [steps]
    u, v = at[0].scaled(f, g)
    if steps.clouds.extents is None and steps.runs("alternating"):
        eps = [stage.eps for stage in at[:-1]]
        if eps:
            u, v = (potential * (eps[-1] / steps.eps) for potential in at[0].run(u, v, eps, "alternating")[:2])
        at = at[-1:]
    for stage, following in pairwise(at):
        u, _ = stage.rows(u, v)
        v, _ = stage.columns(u, v)
        u, v = u * (stage.eps / following.eps), v * (stage.eps / following.eps)
    count = (~np.isnan(through)).sum(1)
    return Annealed(u, v, count, 2 * count)


def _stage(steps: Steps, eps: np.ndarray) -> Steps:
    """The steps at these regularisations (problems,); problems without one rest, at that of their first stage."""
    if steps.clouds.extents is None:
        return steps.at(float(eps[0]))
    asleep = np.isnan(eps)
    first = torch.as_tensor(_host(steps.clouds.reach) ** 2).to(steps.clouds.a)
    given = torch.from_numpy(np.where(asleep, 0.0, eps)).to(steps.clouds.a)
    resting = torch.from_numpy(asleep).to(given.device)
    return steps.at(torch.where(resting, first, given)[:, None]).only(~resting)


def _smaller_side(steps: Steps) -> np.ndarray:
    """(problems,) points of the smaller side."""
    c = steps.clouds
    return np.array([min(len(c.x), len(c.y))]) if c.extents is None else torch.minimum(*c.extents).cpu().numpy()


def _host(value: float | Tensor) -> np.ndarray:
    """A number, or one for each problem of a batch, in float64."""
    return value[:, 0].cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)
