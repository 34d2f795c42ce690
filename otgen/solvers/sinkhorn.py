"""The two Sinkhorn loops, on scaled potentials (u, v) as defined in `otgen.families.sinkhorn`.

They know nothing of storage or devices: a sweep is a call of `otgen.ops`, and its row sums are the marginal error of the pair that
came in, so that watching convergence costs no sweep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from otgen import ops
from otgen.solvers.inputs import Clouds

Stop = Literal["tol", "max_iter", "precision floor", "nan"]

GPU_INTERVAL = 8
"""Iterations between two looks at the error on a GPU: each look waits for the device. On a CPU it is looked at every time."""

PATIENCE = 100
"""Iterations without a new smallest error after which rounding is taken to hold an error near its floor where it is."""

FLOOR_SLACK = 30.0
"""How far above the floor predicted for a precision an error may stall and rounding still be the reason."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where a loop ended.

    u, v      (n,), (m,) scaled potentials
    r, c      (n,), (m,) marginals of their plan
    error     marginal error of (u, v), a share of the mass:  (Σ|r − a| + Σ|c − b|)/mass
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


@dataclass
class Watch:
    """Says when to stop. Errors, `tol` and `floor`, the least error that rounding allows, are shares of the mass."""

    tol: float
    floor: float
    max_iter: int
    interval: int
    best: float = field(default=math.inf, init=False)
    best_at: int = field(default=0, init=False)

    def due(self, n: int) -> bool:
        return n % self.interval == 0 or n == self.max_iter

    def stop(self, error: float, n: int) -> Stop | None:
        """The reason to stop at an error met after `n` iterations, or None."""
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


def alternating(
    clouds: Clouds, u: Tensor, v: Tensor, *, scale: float, modes: tuple[str, ...], tol: float, floor: float, max_iter: int
) -> Outcome:
    """Gauss–Seidel, f ← T_f(g) then g ← T_g(f), from (u, v). Its columns fit exactly, so the error is that of the rows."""
    x, y, a, b, x_sq, y_sq = clouds.x, clouds.y, clouds.a, clouds.b, clouds.x_sq, clouds.y_sq
    watch = Watch(tol, floor, max_iter, _interval(x))
    u_next, _ = ops.sinkhorn_half_step(x, y, u, v, b, x_sq, scale=scale, modes=modes)
    n = 0
    while True:
        n += 1
        u = u_next
        v, _ = ops.sinkhorn_half_step(y, x, v, u, a, y_sq, scale=scale, modes=modes)
        u_next, rho = ops.sinkhorn_half_step(x, y, u, v, b, x_sq, scale=scale, modes=modes)
        if watch.due(n):
            r = _marginal(a, rho)
            error = float((r - a).abs().sum()) / clouds.mass
            if stop := watch.stop(error, n):
                return Outcome(u, v, r, b, error, n, 1 + 2 * n, stop)


def symmetric(
    clouds: Clouds, u: Tensor, v: Tensor, *, scale: float, modes: tuple[str, ...], tol: float, floor: float, max_iter: int
) -> Outcome:
    """Averaged Jacobi, (f, g) ← ((f + T_f(g))/2, (g + T_g(f))/2), both from the old pair.

    It starts from (T_f(g), T_g(f)) of the pair given. After at most max_iter − 1 averaged steps one full step (T_f(g), T_g(f))
    follows, whose error is measured by a sweep of its own; it is kept if that is no larger.
    """
    x, y, a, b, x_sq, y_sq = clouds.x, clouds.y, clouds.a, clouds.b, clouds.x_sq, clouds.y_sq
    choice = ops.kernel("sinkhorn", x, y, ops.SYMMETRIC, modes).choice
    sweeps = 1 if choice is None or choice.variant["fusion"] == "one_sweep" else 2
    watch = Watch(tol, floor, max_iter - 1, _interval(x))

    def step(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.sinkhorn_symmetric_step(x, y, u, v, a, b, x_sq, y_sq, scale=scale, modes=modes)

    def met(rho: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, float]:
        r, c = _marginal(a, rho), _marginal(b, gamma)
        return r, c, float((r - a).abs().sum() + (c - b).abs().sum()) / clouds.mass

    u_half, v_half, _, _ = step(u, v)
    u, v = 2.0 * u_half - u, 2.0 * v_half - v
    n = 0
    while True:
        u_half, v_half, rho, gamma = step(u, v)
        if watch.due(n):
            r, c, error = met(rho, gamma)
            if stop := watch.stop(error, n):
                break
        u, v, n = u_half, v_half, n + 1
    u_full, v_full = 2.0 * u_half - u, 2.0 * v_half - v
    r_full, c_full, error_full = met(*step(u_full, v_full)[2:])
    passes = sweeps * (n + 3)
    if error_full <= error:
        return Outcome(u_full, v_full, r_full, c_full, error_full, n + 1, passes, "tol" if error_full <= tol else stop)
    return Outcome(u, v, r, c, error, n, passes, stop)


def _interval(x: Tensor) -> int:
    return 1 if x.device.type == "cpu" else GPU_INTERVAL


def _marginal(weights: Tensor, sums: Tensor) -> Tensor:
    """weights·sums, with an exact zero where there is no weight, however large the sum."""
    return torch.where(weights > 0, weights * sums, 0.0)
