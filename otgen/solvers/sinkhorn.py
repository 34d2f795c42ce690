"""The Sinkhorn loops, on scaled potentials (u, v) as defined in `otgen.families.sinkhorn`.

They know nothing of storage or devices: a sweep is a call of `otgen.solvers.steps`, and its row sums are the marginal error of the
pair that came in, so that watching convergence costs no sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from otgen.solvers.anderson import Anderson
from otgen.solvers.steps import Steps

Stop = Literal["tol", "max_iter", "precision floor", "nan"]

GPU_INTERVAL = 8
"""Iterations between two looks at the error on a GPU: each look waits for the device. On a CPU it is looked at every time."""

STALL, REST = 25, 5
"""Iterations without a new smallest error after which a mixture is given up, and iterations without one that follow: a few clusters
of different masses can keep it wandering. On clouds where it converges well neither is ever met."""

PATIENCE = 100
"""Iterations without a new smallest error after which rounding is taken to hold an error near its floor where it is."""

FLOOR_SLACK = 30.0
"""How far above the floor predicted for a precision an error may stall and rounding still be the reason."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where a loop ended.

    u, v      (n,), (m,) scaled potentials
    r, c      (n,), (m,) marginals of their plan
    error     marginal error of (u, v), a share of the mass:  (Σ|r − a| + Σ|c − b|)/mass, for a relaxed marginal with its target
              (`Steps.row_target`) instead of a or b
    n_iters   updates of the pair;  passes  sweeps over the n × m pairs (rows redone with the running maximum are not counted)
    """

    u: Tensor
    v: Tensor
    r: Tensor
    c: Tensor
    error: float
    n_iters: int
    passes: int
    stop: Stop

    @property
    def swapped(self) -> Outcome:
        return replace(self, u=self.v, v=self.u, r=self.c, c=self.r)


@dataclass
class Watch:
    """Says when to stop. Errors, `tol` and `floor`, the least error that rounding allows, are shares of the mass.

    callback  told the iterations done and the error whenever the error is looked at
    """

    tol: float
    floor: float
    max_iter: int
    interval: int
    callback: Callable[[int, float], object] = lambda n, error: None
    best: float = field(default=math.inf, init=False)
    best_at: int = field(default=0, init=False)

    def due(self, n: int) -> bool:
        return n % self.interval == 0 or n == self.max_iter

    def stop(self, error: float, n: int) -> Stop | None:
        """The reason to stop at an error met after `n` iterations, or None."""
        self.callback(n, error)
        if math.isnan(error):
            return "nan"
        if error <= self.tol:
            return "tol"
        if n == self.max_iter:
            return "max_iter"
        if error < self.best:
            self.best, self.best_at = error, n
        if n - self.best_at < PATIENCE:
            return None
        if not math.isfinite(self.best):
            return "nan"
        return "precision floor" if self.best <= FLOOR_SLACK * self.floor else None


def alternating(steps: Steps, u: Tensor, v: Tensor, watch: Watch, *, accelerated: bool = False) -> Outcome:
    """Gauss–Seidel, f ← T_f(g) then g ← T_g(f), from (u, v). Its columns fit exactly, so the error is that of the rows.

    accelerated  whether the iterates of u are mixed (`otgen.solvers.anderson`). Should a mixture leave the range of the dtype, the
                 loop goes on from the last error it saw, without mixing
    """
    mixer = Anderson(steps.clouds.a, gauge=steps.balanced, longest=steps.span / 4) if accelerated else None
    u, _ = steps.rows(u, v)
    safe, n, rested = u, 0, -REST
    while True:
        n += 1
        v, _ = steps.columns(u, v)
        image, rho = steps.rows(u, v)
        if watch.due(n):
            r, error = steps.row_miss(u, rho)
            met = float(error)
            if math.isnan(met) and mixer is not None and n < watch.max_iter:
                mixer, u = None, safe
                continue
            safe = image
            if stop := watch.stop(met, n):
                return Outcome(u, v, r, steps.swapped.row_target(v), met, n, 1 + 2 * n, stop)
        image, _ = steps.translated(image, v)
        residual = torch.where(rho.isinf() | (rho == 0), image - u, -rho.log2()) if steps.balanced else image - u
        if mixer is not None and n - max(watch.best_at, rested) >= STALL:
            mixer.forget()
            rested = n
        u = image if mixer is None or n - rested < REST else mixer.next(image, residual)


def symmetric(steps: Steps, u: Tensor, v: Tensor, watch: Watch) -> Outcome:
    """Averaged Jacobi, (f, g) ← ((f + T_f(g))/2, (g + T_g(f))/2), both from the old pair.

    It starts from (T_f(g), T_g(f)) of the pair given. After at most max_iter − 1 averaged steps one full step (T_f(g), T_g(f))
    follows, whose error is measured by a sweep of its own; it is kept if that is no larger.
    """
    last = watch.max_iter - 1

    def met(u: Tensor, v: Tensor, rho: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, float]:
        (r, missed), (c, missed_too) = steps.row_miss(u, rho), steps.swapped.row_miss(v, gamma)
        return r, c, float(missed + missed_too)

    u_half, v_half, _, _ = steps.both(u, v)
    u, v = steps.translated(2.0 * u_half - u, 2.0 * v_half - v)
    n = 0
    while True:
        u_half, v_half, rho, gamma = steps.both(u, v)
        if watch.due(n) or n == last:
            r, c, error = met(u, v, rho, gamma)
            stop = watch.stop(error, n) or ("max_iter" if n == last else None)
            if stop:
                break
        u, v = steps.translated(u_half, v_half)
        n += 1
    u_full, v_full = steps.translated(2.0 * u_half - u, 2.0 * v_half - v)
    r_full, c_full, error_full = met(u_full, v_full, *steps.both(u_full, v_full)[2:])
    passes = steps.sweeps * (n + 3)
    if error_full <= error:
        watch.callback(n + 1, error_full)
        return Outcome(u_full, v_full, r_full, c_full, error_full, n + 1, passes, "tol" if error_full <= watch.tol else stop)
    return Outcome(u, v, r, c, error, n, passes, stop)


def self_problem(steps: Steps, u: Tensor, watch: Watch) -> Outcome:
    """One potential for a problem whose sides are the same measure: f ← (f + T_f(f))/2, after a full first step.

    The averaged map contracts: each step halves what the last one missed, or better (Feydy et al. 2019, section 3.1).
    """
    u, _ = steps.rows(u, u)
    n = 0
    while True:
        n += 1
        half, rho = steps.rows(u, u, step=0.5)
        if watch.due(n):
            r, missed = steps.row_miss(u, rho)
            error = 2.0 * float(missed)
            if stop := watch.stop(error, n):
                return Outcome(u, u, r, r, error, n, 1 + n, stop)
        u = half


def interval(x: Tensor) -> int:
    """Iterations between two looks at the error."""
    return 1 if x.device.type == "cpu" else GPU_INTERVAL
