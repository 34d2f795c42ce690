"""The Sinkhorn loops, on scaled potentials (u, v) as defined in `otgen.families.sinkhorn`.

They know nothing of storage or devices: a sweep is a call of `otgen.solvers.steps`, and its row sums are the marginal error of the
pair that came in, so that watching convergence costs no sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from otgen.solvers.anderson import Anderson, per_problem
from otgen.solvers.steps import Steps

Stop = Literal["tol", "max_iter", "precision floor", "nan"]

GPU_INTERVAL = 8
"""Iterations between two looks at the error on a GPU: each look waits for the device. On a CPU it is looked at every time."""

PLAIN = 32
"""Iterations where many plain ones are one launch, before mixtures are made at every one: small clouds often need no more."""

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
    errors    (looks,) array of the errors met on the way, the last one `error`; None: it was looked at once, at the end
    visited   share of the pairs that the last sweep visited;  omitted  at most the mass of the plan that it left out

    Of a batch the tensors are (batch, n), (batch, m), and the others arrays (batch,); `errors` is (looks, batch), with NaN wherever
    a problem was not looked at.
    """

    u: Tensor
    v: Tensor
    r: Tensor
    c: Tensor
    error: Any
    n_iters: Any
    passes: Any
    stop: Any
    errors: np.ndarray | None = None
    visited: Any = 1.0
    omitted: Any = 0.0

    @property
    def looks(self) -> np.ndarray:
        """`errors`, whether there was one look or many."""
        return np.asarray(self.error)[None] if self.errors is None else self.errors

    @property
    def swapped(self) -> Outcome:
        return replace(self, u=self.v, v=self.u, r=self.c, c=self.r)

    def part(self, i: int, n: int, m: int) -> Outcome:
        """That of the i-th problem of a batch, of n × m points."""
        error, n_iters, passes, stop = (array[i].item() for array in (self.error, self.n_iters, self.passes, self.stop))
        met = [e for e in self.looks[:, i] if not np.isnan(e)] + [error] * bool(np.isnan(error))
        u = self.u[i, :n]
        v = u if self.v is self.u else self.v[i, :m]
        return Outcome(u, v, self.r[i, :n], self.c[i, :m], error, n_iters, passes, stop, np.array(met))


class Watch:
    """Says of each problem when to stop. Errors, `tol` and `floor`, the least error that rounding allows, are shares of the mass.

    floor, max_iter  one number for all problems, or one for each
    callback         told the iterations done and the error, of a batch the largest, whenever errors are looked at
    running          (problems,) those to be looked at. One by one they stop, and leave their error, the iterations when they did
                     (`ended`) and the reason (`stops`)
    met              an array (problems,) for each look: the errors of those that ran
    """

    def __init__(
        self,
        tol: float,
        floor: Any,
        max_iter: Any,
        interval: int,
        callback: Callable[[int, float], object] = lambda n, error: None,
        running: np.ndarray | None = None,
    ) -> None:
        self.running = np.ones(1, dtype=bool) if running is None else running.copy()
        self.tol, self.interval, self._callback = tol, interval, callback
        self.floor, self.max_iter = (np.broadcast_to(value, self.running.shape) for value in (floor, max_iter))
        self.error = np.full(self.running.shape, np.nan)
        self.ended = np.zeros(self.running.shape, dtype=int)
        self.stops = np.full(self.running.shape, "", dtype="U15")
        self.met: list[np.ndarray] = []
        self.best = np.full(self.running.shape, np.inf)
        self.best_at = np.zeros(self.running.shape, dtype=int)
        self._working: tuple[bytes, Steps] | None = None

    def due(self, n: int) -> bool:
        return n % self.interval == 0 or bool(np.any(self.max_iter == n))

    def ahead(self, n: int) -> int:
        """Iterations after the n-th up to the next that is due."""
        left = self.max_iter[self.max_iter > n] - n
        return int(min([self.interval - n % self.interval, *left]))

    def look(self, error: Tensor, n: int, forgiven: np.ndarray | None = None) -> np.ndarray:
        """Takes the errors (…, 1) met after `n` iterations, and stops problems. Returns which of those `forgiven` met NaN."""
        met = _on_host(error)
        self.met.append(np.where(self.running, met, np.nan))
        self._callback(n, float(met[self.running].max()))
        better = met < self.best
        self.best, self.best_at = np.where(better, met, self.best), np.where(better, n, self.best_at)
        stalled = n - self.best_at >= PATIENCE
        if not (stalled | (n >= self.max_iter) | ~(met > self.tol)).any():
            return np.zeros_like(better)
        lost: np.ndarray = np.isnan(met) & self.running & (n < self.max_iter)
        lost &= False if forgiven is None else forgiven
        reasons = {
            "nan": np.isnan(met) & ~lost | stalled & ~np.isfinite(self.best),
            "tol": met <= self.tol,
            "max_iter": n >= self.max_iter,
            "precision floor": stalled & (self.best <= FLOOR_SLACK * self.floor),
        }
        stops = np.select(list(reasons.values()), list(reasons), "")
        now = self.running & (stops != "") & ~lost
        self.stops[now], self.error[now], self.ended[now] = stops[now], met[now], n
        self.running &= ~now
        return lost

    def replaced(self, error: Tensor) -> np.ndarray:
        """Which problems did no worse by one more iteration, whose errors (…, 1) these are; it counts for them."""
        met = _on_host(error)
        better: np.ndarray = met <= self.error
        if better.any():
            self.met.append(np.where(better, met, np.nan))
            self._callback(int(self.ended.max()) + 1, float(np.where(better, met, self.error).max()))
        self.error, self.ended = np.where(better, met, self.error), self.ended + better
        self.stops = np.where(better & (met <= self.tol), "tol", self.stops)
        return better

    def working(self, steps: Steps) -> Steps:
        """The steps of a problem, or of a batch those in which the problems that stopped rest."""
        if steps.clouds.extents is None or self.running.all():
            return steps
        which = self.running.tobytes()
        if self._working is None or self._working[0] != which:
            self._working = which, steps.only(torch.from_numpy(self.running).to(steps.clouds.a.device))
        return self._working[1]

    def outcome(self, u: Tensor, v: Tensor, r: Tensor, c: Tensor, passes: np.ndarray) -> Outcome:
        """Where it ended, now that all have stopped."""
        numbers, met = (self.error, self.ended, passes, self.stops), np.stack(self.met)
        if u.ndim > 1:
            return Outcome(u, v, r, c, *numbers, met)
        error, ended, swept, stop = (array[0].item() for array in numbers)
        return Outcome(u, v, r, c, error, ended, swept, stop, met[:, 0])


def alternating(steps: Steps, u: Tensor, v: Tensor, watch: Watch, *, accelerated: bool = False) -> Outcome:
    """Gauss–Seidel, f ← T_f(g) then g ← T_g(f), from (u, v). Its columns fit exactly, so the error is that of the rows.

    Points without weight, which decide nothing, end with the update from the final pair, wherever they began.

    accelerated  whether the iterates of u are mixed (`otgen.solvers.anderson`). Should a mixture leave the range of the dtype, the
                 loop goes on from the last error it saw, without mixing
    """
    every, steps = steps, watch.working(steps)
    by_runs = steps.balanced and steps.runs("alternating")
    mixer = Anderson(steps.clouds.a, gauge=steps.balanced, longest=steps.span / 4) if accelerated else None
    mixing, rested = np.full(watch.running.shape, accelerated), np.full(watch.running.shape, -REST)
    u, _ = steps.rows(u, v)
    safe, r, n = u, torch.zeros_like(u), 0
    while True:
        if by_runs and (k := watch.ahead(n) - 1) and (mixer is None or n < PLAIN):
            v, u = steps.swapped.run(v, u, [steps.eps] * k, "alternating")[:2]
            n += k
        n += 1
        v, _ = steps.columns(u, v)
        image, rho = steps.rows(u, v)
        lost = np.zeros_like(mixing)
        if watch.due(n):
            marginal, error = steps.row_miss(u, rho)
            r = steps.moved(marginal, r)
            u = torch.where(steps.clouds.a > 0, u, image)
            lost = watch.look(error, n, forgiven=mixing)
            if not watch.running.any():
                return watch.outcome(u, v, r, every.swapped.row_target(v), 1 + 2 * watch.ended)
            mixing &= ~lost
            safe = torch.where(per_problem(lost, image), safe, image) if lost.any() else image
            steps = watch.working(every)
        image, _ = steps.translated(image, v)
        residual = torch.where(rho.isinf() | (rho == 0), image - u, -rho.log2()) if steps.balanced else image - u
        if mixer is not None:
            rested[n - np.maximum(watch.best_at, rested) >= STALL] = n
            image = mixer.next(image, residual, ~mixing | (n - rested < REST))
        if lost.any():
            image = torch.where(per_problem(lost, image), safe, image)
        u = steps.moved(image, u)


def symmetric(steps: Steps, u: Tensor, v: Tensor, watch: Watch) -> Outcome:
    """Averaged Jacobi, (f, g) ← ((f + T_f(g))/2, (g + T_g(f))/2), both from the old pair.

    It starts from (T_f(g), T_g(f)) of the pair given. After at most max_iter − 1 averaged steps one full step (T_f(g), T_g(f))
    follows, whose error is measured by a sweep of its own; it is kept if that is no larger.
    """
    watch.max_iter = watch.max_iter - 1

    def met(u: Tensor, v: Tensor, rho: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (r, missed), (c, missed_too) = steps.row_miss(u, rho), steps.swapped.row_miss(v, gamma)
        return r, c, missed + missed_too

    def moved(new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return steps.moved(new[0], old[0]), steps.moved(new[1], old[1])

    every, steps = steps, watch.working(steps)
    begun = steps
    pair = u, v
    u_half, v_half, _, _ = steps.both(*pair)
    pair = moved(steps.translated(2.0 * u_half - u, 2.0 * v_half - v), pair)
    marginals, n = (torch.zeros_like(u), torch.zeros_like(v)), 0
    by_runs, looped = steps.balanced and steps.runs("symmetric"), np.zeros_like(watch.ended)
    while True:
        if by_runs and not watch.due(n):
            k = watch.ahead(n)
            pair = steps.run(*pair, [steps.eps] * k, "symmetric", 0.5)[:2]
            n, looped = n + k, looped + k * watch.running
        u_half, v_half, rho, gamma = steps.both(*pair)
        if watch.due(n):
            r, c, error = met(*pair, rho, gamma)
            marginals = moved((r, c), marginals)
            watch.look(error, n)
            if not watch.running.any():
                break
            steps = watch.working(every)
        pair = moved(steps.translated(u_half, v_half), pair)
        n += 1
    passes = steps.sweeps * (watch.ended + 3 - looped) + 2 * looped
    steps, (u, v) = begun, pair
    if steps.clouds.extents is not None:
        u_half, v_half, _, _ = steps.both(u, v)
        passes = passes + steps.sweeps
    full = steps.translated(2.0 * u_half - u, 2.0 * v_half - v)
    r, c, error = met(*full, *steps.both(*full)[2:])
    better = watch.replaced(error)
    chosen = per_problem(better, u)
    u, v, r, c = (torch.where(chosen, new, old) for new, old in zip((*full, r, c), (*pair, *marginals)))
    return watch.outcome(u, v, r, c, passes)


def self_problem(steps: Steps, u: Tensor, watch: Watch) -> Outcome:
    """One potential for a problem whose sides are the same measure: f ← (f + T_f(f))/2, after a full first step.

    The averaged map contracts: each step halves what the last one missed, or better (Feydy et al. 2019, section 3.1).
    """
    every, steps = steps, watch.working(steps)
    u, _ = steps.own(u, step=1.0)
    r, n, by_runs = torch.zeros_like(u), 0, steps.runs("own")
    while True:
        if by_runs and (k := watch.ahead(n) - 1):
            u, n = steps.run(u, u, [steps.eps] * k, "own", 0.5)[0], n + k
        n += 1
        half, rho = steps.own(u)
        if watch.due(n):
            marginal, missed = steps.row_miss(u, rho)
            r = steps.moved(marginal, r)
            u = torch.where(steps.clouds.a > 0, u, 2.0 * half - u)
            watch.look(2.0 * missed, n)
            if not watch.running.any():
                return watch.outcome(u, u, r, r, 1 + watch.ended)
            steps = watch.working(every)
        u = steps.moved(half, u)


def _on_host(error: Tensor) -> np.ndarray:
    """(problems,) of errors (…, 1)."""
    found: np.ndarray = error.detach().reshape(-1).cpu().double().numpy()
    return found


def interval(x: Tensor) -> int:
    """Iterations between two looks at the error."""
    return 1 if x.device.type == "cpu" else GPU_INTERVAL
