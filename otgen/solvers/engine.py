"""From a problem's steps to its solution: which loop runs, from where, for how long, and in which precision.

Takes one problem, or a batch of them side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from otgen import ops
from otgen.precision import MODES
from otgen.solvers import sinkhorn
from otgen.solvers.anderson import per_problem
from otgen.solvers.annealing import anneal, stages
from otgen.solvers.kept import KeptSteps, keepable
from otgen.solvers.newton import newton
from otgen.solvers.sinkhorn import Outcome, Watch
from otgen.solvers.solution import Solution
from otgen.solvers.steps import Steps
from otgen.solvers.verdict import least_error

if TYPE_CHECKING:
    from otgen.dispatch import Choice

METHODS = ("alternating", "symmetric", "anderson", "newton")

ANNEALED = ("anderson", "newton")
"""Methods that need a start in the neighbourhood of the solution, when none was given."""

Callback = Callable[[int, float], object]


@dataclass(frozen=True, slots=True)
class Limits:
    """When a solve is to stop, whoever's loop it is."""

    tol: float
    max_iter: int
    callback: Callback

    def watch(self, steps: Steps, precision: str, done: np.ndarray, running: np.ndarray | None = None) -> Watch:
        """Over what remains after `done` iterations (problems,), of the problems `running`: all of them unless given."""
        least = least_error(steps.clouds, steps.eps, precision, min(steps.rho_a, steps.rho_b))
        spare, before = np.maximum(1, self.max_iter - done), int(done.max())
        running = np.ones(len(done), dtype=bool) if running is None else running
        interval = sinkhorn.interval(steps.clouds.x)

        def told(n: int, error: float) -> object:
            return self.callback(min(n + before, self.max_iter), error)

        return Watch(self.tol, least, spare, interval, told, running)


def solved(method: str, steps: Steps, pair: tuple[Tensor, Tensor] | None, limits: Limits, *, finer: bool) -> Solution:
    """The solution of a problem, or of each of a batch, from the potentials `pair`, or from none.

    finer  whether a loop that stalls on the rounding of its precision goes on in the next finer one

    Iterates of the smaller side are the ones to mix: there are fewer of them to be told apart.
    """
    if method == "anderson" and steps.clouds.y.shape[-2] < steps.clouds.x.shape[-2]:
        turned = solved(method, steps.swapped, None if pair is None else pair[::-1], limits, finer=finer)
        return Solution(turned.steps.swapped, turned.outcome.swapped, turned.choice)
    nothing = torch.zeros_like(steps.clouds.a), torch.zeros_like(steps.clouds.b)
    u, v = steps.scaled(*(pair or nothing))
    done = passes = np.zeros(steps.clouds.a[..., 0].numel(), dtype=int)
    if method in ANNEALED and pair is None:
        stage = anneal(steps, *nothing, stages(steps)[:, : limits.max_iter - 1])
        u, v, done, passes = stage.u, stage.v, stage.n_iters, stage.passes
    outcome, running = None, np.ones(len(done), dtype=bool)
    while True:
        flags = ops.SYMMETRIC if method == "symmetric" else ops.ALTERNATING
        choice = ops.kernel("sinkhorn", steps.clouds.x, steps.clouds.y, flags, steps.modes).choice
        watch = limits.watch(steps, precision_of(choice), done, running)
        if method == "symmetric":
            found = sinkhorn.symmetric(steps, u, v, watch)
        elif method == "newton":
            found = newton(steps, u, v, watch)
        else:
            sweeps = KeptSteps.of(steps) if keepable(steps) else steps
            found = sinkhorn.alternating(sweeps, u, v, watch, accelerated=method == "anderson")
        done, passes = done + running * found.n_iters, passes + running * found.passes
        outcome = found if outcome is None else _merged(outcome, found, running)
        modes = _finer(steps.modes, choice.precision) if finer and choice is not None else ()
        running = (np.atleast_1d(outcome.stop) == "precision floor") & (done < limits.max_iter)
        if not modes or not running.any():
            counts = (done, passes) if u.ndim > 1 else (int(done[0]), int(passes[0]))
            return Solution(steps, replace(outcome, n_iters=counts[0], passes=counts[1]), choice)
        steps, u, v = replace(steps, modes=modes), outcome.u, outcome.v


def _merged(old: Outcome, new: Outcome, renewed: np.ndarray) -> Outcome:
    """The outcomes of a batch of which some problems were `renewed`."""
    if new.u.ndim == 1:
        return new
    tensors, numbers = ("u", "v", "r", "c"), ("error", "n_iters", "passes", "stop")
    chosen = per_problem(renewed, old.u)
    return Outcome(
        **{name: torch.where(chosen, getattr(new, name), getattr(old, name)) for name in tensors},
        **{name: np.where(renewed, getattr(new, name), getattr(old, name)) for name in numbers},
    )


def _finer(modes: tuple[str, ...], precision: str) -> tuple[str, ...]:
    """Those of `modes` that round less than `precision`."""
    order = list(MODES)
    return tuple(mode for mode in modes if order.index(mode) < order.index(precision))


def own(steps: Steps, limits: Limits) -> Solution:
    """A measure's transport to itself, which one potential solves unless its sides are relaxed differently."""
    limits = replace(limits, callback=lambda n, error: None)
    if steps.rho_a != steps.rho_b:
        return solved("anderson", steps, None, limits, finer=False)
    choice = ops.kernel("sinkhorn", steps.clouds.x, steps.clouds.x, ops.ALTERNATING, steps.modes).choice
    u, _ = steps.scaled(torch.zeros_like(steps.clouds.a), torch.zeros_like(steps.clouds.a))
    watch = limits.watch(steps, precision_of(choice), np.zeros(steps.clouds.a[..., 0].numel(), dtype=int))
    return Solution(steps, sinkhorn.self_problem(steps, u, watch), choice)


def precision_of(choice: Choice | None) -> str:
    """The precision mode of a variant; streamed PyTorch multiplies as the coordinates are stored."""
    return "ieee" if choice is None else choice.precision
