"""From a problem's steps to its solution: which loop runs, from where, for how long, and in which precision.

Takes one problem, or a batch of them side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from otgen import ops
from otgen.override import override
from otgen.precision import MODES
from otgen.solvers import sinkhorn
from otgen.solvers.anderson import per_problem
from otgen.solvers.annealing import anneal, stages
from otgen.solvers.kept import KeptSteps, keepable
from otgen.solvers.kernels import Kernels, flags_of
from otgen.solvers.newton import newton
from otgen.solvers.sinkhorn import Outcome, Watch
from otgen.solvers.solution import Divergence, Solution
from otgen.solvers.steps import Steps
from otgen.solvers.verdict import least_error

if TYPE_CHECKING:
    from otgen.dispatch import Choice

METHODS = ("alternating", "symmetric", "anderson", "newton")

ANNEALED = ("anderson", "newton")
"""Methods that need a start in the neighbourhood of the solution, when none was given."""

Callback = Callable[[int, float], object]


@dataclass(frozen=True, slots=True)
class Course:
    """How a solve is to go, whoever's loop it is: when it stops, who is told, through which stages, and on which kernels.

    scaling  as in `otgen.solvers.annealing.stages`; given, every method goes through stages
    """

    tol: float
    max_iter: int
    callback: Callback
    scaling: float | None = None
    kernels: Kernels = field(default_factory=Kernels)

    def stages(self, method: str, steps: Steps) -> np.ndarray | None:
        """The regularisations to go through first, when no potentials were given; None for a method that takes none."""
        if method not in ANNEALED and self.scaling is None:
            return None
        return stages(steps, self.scaling, self.max_iter - 1)

    def watch(self, steps: Steps, precision: str, done: np.ndarray, running: np.ndarray | None = None) -> Watch:
        """Over what remains after `done` iterations (problems,), of the problems `running`: all of them unless given."""
        least = least_error(steps.clouds, steps.eps, precision, min(steps.rho_a, steps.rho_b))
        spare, before = np.maximum(1, self.max_iter - done), int(done.max())
        running = np.ones(len(done), dtype=bool) if running is None else running
        interval = sinkhorn.interval(steps.clouds.x)

        def told(n: int, error: float) -> object:
            with override(None):
                return self.callback(min(n + before, self.max_iter), error)

        return Watch(self.tol, least, spare, interval, told, running)


def solved(method: str, steps: Steps, pair: tuple[Tensor, Tensor] | None, course: Course, *, finer: bool) -> Solution:
    """The solution of a problem, or of each of a batch, from the potentials `pair`, or from none.

    finer  whether a loop that stalls on the rounding of its precision goes on in the next finer one

    Iterates of the smaller side are the ones to mix: there are fewer of them to be told apart.
    """
    if method == "anderson" and steps.clouds.y.shape[-2] < steps.clouds.x.shape[-2]:
        return solved(method, steps.swapped, None if pair is None else pair[::-1], course, finer=finer).swapped
    nothing = torch.zeros_like(steps.clouds.a), torch.zeros_like(steps.clouds.b)
    u, v = steps.scaled(*(pair or nothing))
    done = passes = np.zeros(steps.clouds.a[..., 0].numel(), dtype=int)
    through = course.stages(method, steps) if pair is None else None
    course.kernels.ready(method, steps, annealed=through is not None)
    if through is not None:
        stage = anneal(steps, *nothing, through)
        u, v, done, passes = stage.u, stage.v, stage.n_iters, stage.passes
    outcome, running = None, np.ones(len(done), dtype=bool)
    while True:
        choice = ops.kernel("sinkhorn", steps.clouds.x, steps.clouds.y, flags_of(method), steps.modes).choice
        watch, sweeps = course.watch(steps, precision_of(choice), done, running), steps
        if method == "symmetric":
            found = sinkhorn.symmetric(steps, u, v, watch)
        elif method == "newton":
            found = newton(steps, u, v, watch)
        else:
            sweeps = KeptSteps.of(steps) if keepable(steps) else steps
            found = sinkhorn.alternating(sweeps, u, v, watch, accelerated=method == "anderson")
        found = replace(found, **sweeps.skipped)
        done, passes = done + running * found.n_iters, passes + running * found.passes
        outcome = found if outcome is None else _merged(outcome, found, running)
        modes = _finer(steps.modes, choice.precision) if finer and choice is not None else ()
        running = (np.atleast_1d(outcome.stop) == "precision floor") & (done < course.max_iter)
        if not modes or not running.any():
            counts = (done, passes) if u.ndim > 1 else (int(done[0]), int(passes[0]))
            return Solution(steps, replace(outcome, n_iters=counts[0], passes=counts[1]), choice)
        steps, u, v = replace(steps, modes=modes), outcome.u, outcome.v
        course.kernels.ready(method, steps)


def _merged(old: Outcome, new: Outcome, renewed: np.ndarray) -> Outcome:
    """The outcomes of a batch of which some problems were `renewed`, or of one problem that was."""
    errors = np.concatenate((old.looks, new.looks))
    if new.u.ndim == 1:
        return replace(new, errors=errors)
    tensors, numbers = ("u", "v", "r", "c"), ("error", "n_iters", "passes", "stop")
    chosen = per_problem(renewed, old.u)
    return Outcome(
        **{name: torch.where(chosen, getattr(new, name), getattr(old, name)) for name in tensors},
        **{name: np.where(renewed, getattr(new, name), getattr(old, name)) for name in numbers},
        errors=errors,
    )


def _finer(modes: tuple[str, ...], precision: str) -> tuple[str, ...]:
    """Those of `modes` that round less than `precision`."""
    order = list(MODES)
    return tuple(mode for mode in modes if order.index(mode) < order.index(precision))


def divergence(
    method: str, steps: Steps, pair: tuple[Tensor, Tensor] | None, course: Course, *, debias: bool, finer: bool
) -> Divergence:
    """`solved` and, when debiased, each side's transport to itself."""
    with override(course.kernels.named):
        sides = (steps, steps.swapped) if debias else ()
        alone = [replace(side.alone, rho_a=steps.rho_a, rho_b=steps.rho_b) for side in sides]
        for problem in alone:
            course.kernels.ready(own_method(problem), problem)
        return Divergence(solved(method, steps, pair, course, finer=finer), *(own(problem, course) for problem in alone))


def own_method(steps: Steps) -> str:
    """The loop for a measure's transport to itself: one potential solves it unless its sides are relaxed differently."""
    return "own" if steps.rho_a == steps.rho_b else "anderson"


def own(steps: Steps, course: Course) -> Solution:
    """A measure's transport to itself."""
    course = replace(course, callback=lambda n, error: None, scaling=None)
    if own_method(steps) != "own":
        return solved(own_method(steps), steps, None, course, finer=False)
    choice = ops.kernel("sinkhorn", steps.clouds.x, steps.clouds.x, ops.OWN, steps.modes).choice
    u, _ = steps.scaled(torch.zeros_like(steps.clouds.a), torch.zeros_like(steps.clouds.a))
    watch = course.watch(steps, precision_of(choice), np.zeros(steps.clouds.a[..., 0].numel(), dtype=int))
    found = sinkhorn.self_problem(steps, u, watch)
    return Solution(steps, replace(found, **steps.skipped), choice)


def precision_of(choice: Choice | None) -> str:
    """The precision mode of a variant; streamed PyTorch multiplies as the coordinates are stored."""
    return "ieee" if choice is None else choice.precision
