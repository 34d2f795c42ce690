"""How many sweeps and launches an iteration of otgen's debiased loss takes on its shipped winners: counted by running it."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from slots import sweeps

from otgen import SamplesLoss, ops
from otgen.families import family
from otgen.precision import MODES
from otgen.problem import Problem
from otgen.store import Winner, read_winners, shipped

POINTS = 65536
"""Points of a cloud in what is counted: there instructions decide which kernel is fastest, not launches."""


def winners(problem: Problem, slug: str, accuracy: str) -> list[Winner]:
    """Those shipped for a problem on the GPU called `slug`, in the modes that round no more than `accuracy` does; fastest first."""
    found = [winner for path in shipped() for winner in read_winners(path, family=problem.family)]
    fine = [w for w in found if (w.gpu, w.problem) == (slug, problem) and MODES[w.precision].floor <= MODES[accuracy].floor]
    return sorted(fine, key=lambda winner: winner.us)


def debiased_iteration(slug: str) -> tuple[float, int]:
    """(sweeps, launches): how often one more regularisation in the schedule of a debiased loss makes it visit all pairs (d = 64,
    n = m), and how many kernels it launches for that.

    The loss runs on a CPU with two regularisations and with three; what it launches is looked up among the winners, and is the
    default variant where there is none.
    """
    (fewer, before), (more, after) = (_cost(slug, length) for length in (2, 3))
    return more - fewer, after - before


def _cost(slug: str, length: int) -> tuple[float, int]:
    launches: Counter[tuple[str, ops.Flags]] = Counter()
    original = ops.kernel

    def counting(name: str, x: torch.Tensor, y: torch.Tensor, flags: ops.Flags, modes: tuple[str, ...]) -> ops.Streamed:
        def launch(**arguments: Any) -> None:
            launches[name, flags] += 1
            original(name, x, y, flags, modes).launch(**arguments)

        return ops.Streamed(launch)

    clouds = torch.rand(2, 16, 64, generator=torch.Generator().manual_seed(0))
    with patch.object(ops, "kernel", counting):
        SamplesLoss(debias=True, eps_list=[1.0] * length)(*clouds)
    total, kernels = 0.0, 0
    for (name, flags), times in launches.items():
        kind = family(name)
        problem = kind.problem(POINTS, POINTS, 64, **dict(flags))
        variant = next((winner.variant for winner in winners(problem, slug, "tf32")), kind.default(problem))
        total += times * sweeps(problem, variant)
        kernels += times * len(kind.work(problem, variant).launches)
    return total, kernels
