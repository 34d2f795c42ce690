"""GeomLoss's symmetric schedule: a fixed list of regularisations, one averaged update at each, a full update at the last.

The pair starts from (T_f(0), T_g(0)) at the first regularisation. Nothing is asked about convergence, and the number at the end is
not the dual objective of the pair but a formula that agrees with it at a solution:

    V = <a, φ_a(f)> + <b, φ_b(g)>,      φ(f) = f for a marginal that must fit, (ρ + eps/2)·(1 − exp(−f/ρ)) for a relaxed one

At a solution V is the dual objective plus eps·((Σa + Σb)/2 − Σa·Σb): nothing for masses of 1, and nothing at any mass once it is
debiased. Potentials, eps and ρ are in units of the engine's cost |x − y|².

Source: Feydy, *Geometric data analysis, beyond convolutions* (2020), algorithm 3.5; Séjourné, Feydy, Vialard, Trouvé and Peyré
2019, proposition 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from otgen import ops
from otgen.errors import UsageError
from otgen.precision import LOG2_E
from otgen.solvers.sinkhorn import Outcome
from otgen.solvers.solution import Divergence, Solution, potential_gradient
from otgen.solvers.steps import Steps


@dataclass(frozen=True)
class Schedule:
    """What is run.

    eps                 regularisations, one averaged update at each; the last is that of the problem solved
    last_extrapolation  whether the potentials are those after a further, full update
    threshold, interval at the last regularisation, stop when no potential changed by `threshold` or more between two checks, made
                        after every `interval`-th update; None: never
    """

    eps: tuple[float, ...]
    last_extrapolation: bool = True
    threshold: float | None = None
    interval: int = 10


def diameter(x: Tensor, y: Tensor) -> float:
    """The diagonal of the box around both clouds, or around all clouds of a batch (…, n, d), (…, m, d)."""
    points = torch.cat((x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])))
    lowest, highest = torch.aminmax(points, dim=0)
    return float((highest - lowest).norm())


def geometric(first: float, last: float, ratio: float) -> tuple[float, ...]:
    """first², then the squares of first, first·ratio, first·ratio², … above `last`, then last².

    The doubled first entry is GeomLoss's. `first` = 0, clouds that are one point, leaves last² alone.
    """
    if first <= 0:
        return (last**2,)
    count = max(0, math.ceil((math.log(last) - math.log(first)) / math.log(ratio)))
    return (first**2, *((first * ratio**k) ** 2 for k in range(count)), last**2)


@dataclass(frozen=True, eq=False)
class End:
    """Where a schedule ended, under the last regularisation. For a measure's transport to itself v is u.

    u, v          (n,), (m,) scaled potentials: those after the full update, or `old` ones without it
    u_old, v_old  the pair that the full update started from;  u_full, v_full  what it gave
    met           whether the threshold was; None where there was none
    looped        whether one launch made all averaged updates
    own           whether the sides are one measure, relaxed alike: then one potential stands for both
    """

    steps: Steps
    u: Tensor
    v: Tensor
    u_old: Tensor
    v_old: Tensor
    u_full: Tensor
    v_full: Tensor
    n_iters: int
    passes: int
    met: bool | None
    own: bool
    looped: bool = False

    @property
    def swapped(self) -> End:
        sides = {"u": self.v, "v": self.u, "u_old": self.v_old, "v_old": self.u_old, "u_full": self.v_full, "v_full": self.u_full}
        return replace(self, steps=self.steps.swapped, **sides)  # type: ignore[arg-type]

    @property
    def f(self) -> Tensor:
        """(n,) potential in units of the cost."""
        return self.steps.potential(self.u)

    def linear(self) -> Tensor:
        """<a, φ_a(f)>, float64 (…,)."""
        steps, a, f = self.steps, self.steps.clouds.a.double(), self.f.double()
        rho = steps.rho_a
        phi = f if math.isinf(rho) else -(rho + steps.eps / 2) * torch.expm1(-f / rho)
        return torch.where(a > 0, a * phi, 0.0).sum(-1)

    def weight_gradient(self) -> Tensor:
        """(n,): f, or (ρ + eps)·(1 − exp(−f/ρ)), the derivative of V in a but for a constant."""
        rho = self.steps.rho_a
        return self.f if math.isinf(rho) else -(rho + self.steps.eps) * torch.expm1(-self.f / rho)

    def gradient(self) -> Tensor:
        """(n, d): 2·r∘(x − T(x)), the derivative of V in x with the pair before the full update held constant.

        T(x) are the means of y under the rows that v_old gives, and r is a, or a·exp(−f/ρ) when relaxed. The plan of the potential
        f + (eps/ρ)·(f_full − f) and of g_old has just these rows.
        """
        steps = self.steps
        lead = self.u_full + (steps.eps / steps.rho_a) * (self.u_full - self.u)
        whole = steps.gradient(lead, self.v_old, steps.row_target(self.u))
        return whole[..., : steps.clouds.dimension]

    def potential_gradient(self) -> Tensor:
        """(n, d): the derivative of each f_i in x_i with all else held (`otgen.solvers.solution.potential_gradient`).

        Raises UsageError for potentials that are not those of a full update.
        """
        if self.u is not self.u_full and self.u is self.u_old:
            raise UsageError("expected last_extrapolation=True for differentiable potentials; got False; leave it out")
        return potential_gradient(self.steps, self.u_full, self.v_old)

    def mean(self, of: Callable[[End], Tensor]) -> Tensor:
        """Of a measure's transport to itself: half of what is due to each side, together."""
        return of(self) if self.own else 0.5 * (of(self) + of(self.swapped))

    def outcome(self) -> Outcome:
        """The pair with its marginals and their error: one more sweep."""
        if self.own:
            r, missed = self.steps.row_miss(self.u, self.steps.own(self.u)[1])
            c, missed_too = r, missed
        else:
            rho, gamma = self.steps.both(self.u, self.v)[2:]
            (r, missed), (c, missed_too) = self.steps.row_miss(self.u, rho), self.steps.swapped.row_miss(self.v, gamma)
        error = (missed + missed_too)[..., 0].cpu().double().numpy()
        stop = np.where(np.isnan(error), "nan", "tol" if self.met else "max_iter")
        passes = self.passes + (1 if self.own else self.steps.sweeps)
        numbers = error, np.full_like(error, self.n_iters, dtype=int), np.full_like(error, passes, dtype=int), stop
        found = Outcome(self.u, self.v, r, c, *((array.item() for array in numbers) if self.u.ndim == 1 else numbers))
        return replace(found, **self.steps.skipped)


def run(steps: Steps, schedule: Schedule, *, own: bool = False) -> End:
    """The schedule for the problem of `steps`, whose own eps is not looked at.

    own  the sides are one measure, relaxed alike: one potential, f ← (f + T_f(f))/2

    Where one marginal alone is relaxed, the pair is moved to the best (f + t, g − t) after every update, as flash-sinkhorn does
    (GeomLoss has no such problem): along that direction the averaged updates would hardly move.
    """
    moved = not own and math.isinf(steps.rho_a) != math.isinf(steps.rho_b)

    def updated(u: Tensor, v: Tensor, step: float) -> tuple[Tensor, Tensor]:
        if own:
            u, _ = at.own(u, step)
            return u, u
        u, v, _, _ = at.both(u, v, step)
        return u, v

    def translated(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return at.translated(u, v) if moved else (u, v)

    looped = steps.runs("own" if own else "symmetric") and schedule.threshold is None and not moved
    at = steps.at(schedule.eps[0])
    nothing = torch.zeros_like(steps.clouds.a), torch.zeros_like(steps.clouds.b)
    u, v = translated(*updated(*at.scaled(*nothing), 1.0))
    if looped:
        u, v = at.run(u, v, schedule.eps, "own" if own else "symmetric", 0.5)[:2]
        at = steps.at(schedule.eps[-1])
    checked: tuple[Tensor, Tensor] | None = None
    met = None if schedule.threshold is None else False
    n = 0
    for eps in () if looped else schedule.eps:
        u, v = u * (at.eps / eps), v * (at.eps / eps)
        at = steps.at(eps)
        u, v = translated(*updated(u, v, 0.5))
        n += 1
        if schedule.threshold is None or eps != schedule.eps[-1] or n % schedule.interval:
            continue
        if checked:
            met = max(float((new - old).abs().max()) for new, old in zip((u, v), checked)) < schedule.threshold * LOG2_E / eps
            if met:
                break
        checked = u, v
    u_full, v_full = updated(u, v, 1.0)
    last = translated(u_full, v_full) if schedule.last_extrapolation else (u, v)
    n = len(schedule.eps) if looped else n
    single, each = (1, 1) if own else (at.sweeps, 2 if looped else at.sweeps)
    return End(at, *last, u, v, u_full, v_full, n, 2 * single + n * each, met, own, looped)


def run_together(steps: Steps, eps: tuple[float, ...], *, last_extrapolation: bool) -> tuple[End, End, End]:
    """`run` through these regularisations for a problem and for each side with itself, in one launch an iteration.

    For marginals relaxed alike and clouds without labels: no pair has to be moved, and one potential stands for a side alone.
    """
    at = steps.at(eps[0])
    starts = [side.scaled(torch.zeros_like(side.clouds.a), torch.zeros_like(side.clouds.b)) for side in _three(at)]
    found = at.debiased(*starts[0], starts[1][0], starts[2][0], 1.0)
    for reg in eps:
        u, v, p, q = torch._foreach_mul(found, at.eps / reg)
        at = steps.at(reg)
        found = at.debiased(u, v, p, q, 0.5)
    full = at.debiased(*found, 1.0)
    last = full if last_extrapolation else found

    def end(side: Steps, i: int, j: int) -> End:
        (u, v), (u_old, v_old), (u_full, v_full) = ((state[i], state[j]) for state in (last, found, full))
        return End(side, u, v, u_old, v_old, u_full, v_full, len(eps), len(eps) + 2, None, own=i == j)

    cross, own_a, own_b = _three(at)
    return end(cross, 0, 1), end(own_a, 2, 2), end(own_b, 3, 3)


def _three(steps: Steps) -> tuple[Steps, Steps, Steps]:
    """The problem, and those of each side with itself."""
    return steps, steps.alone, steps.swapped.alone


@dataclass(frozen=True, eq=False)
class Extrapolated:
    """The value V of a problem, less half of each side's own when debiased.

    together  whether one launch advanced all three. Methods are those that `otgen.solvers.value.DualValue` asks for
    """

    cross: End
    own_a: End | None = None
    own_b: End | None = None
    together: bool = False

    @property
    def ends(self) -> tuple[End, ...]:
        return tuple(end for end in (self.cross, self.own_a, self.own_b) if end is not None)

    def dual(self) -> Tensor:
        """V, float64 (…,)."""
        total = self.cross.linear() + self.cross.swapped.linear()
        if self.own_a is not None and self.own_b is not None:
            total = total - sum(end.mean(End.linear) for end in (self.own_a, self.own_b))
        return total

    def gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d), its derivative in x; (m, d) in y when transposed."""
        cross, own = self._sides(transposed)
        return cross.gradient() if own is None else cross.gradient() - own.mean(End.gradient)

    def weight_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n,), its derivative in a; (m,) in b when transposed."""
        cross, own = self._sides(transposed)
        if own is not None:
            return cross.weight_gradient() - own.mean(End.weight_gradient)
        return cross.weight_gradient() - (0.0 if cross.steps.balanced else cross.steps.eps / 2)

    def potentials(self) -> tuple[Tensor, Tensor]:
        """(f, g), or (f − f_aa, g − g_bb) when debiased."""
        f, g = self.cross.f, self.cross.swapped.f
        if self.own_a is None or self.own_b is None:
            return f, g
        return f - self.own_a.f, g - self.own_b.swapped.f

    def potential_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d), the derivative of each of the first `potentials` in its point, with all else held; (m, d) of the second."""
        cross, own = self._sides(transposed)
        if own is None:
            return cross.potential_gradient()
        return cross.potential_gradient() - (own.swapped if transposed else own).potential_gradient()

    @cached_property
    def divergence(self) -> Divergence:
        """The same with marginals, for an OTResult; one more sweep for each problem."""
        found = []
        for end in self.ends:
            clouds = self.cross.steps.clouds if self.together else end.steps.clouds
            flags = ops.DEBIASED if self.together else ops.OWN if end.own else ops.SYMMETRIC
            choice = ops.kernel("loop" if end.looped else "sinkhorn", clouds.x, clouds.y, flags, end.steps.modes).choice
            found.append(Solution(end.steps, end.outcome(), choice))
        return Divergence(*found)

    def _sides(self, transposed: bool) -> tuple[End, End | None]:
        return (self.cross.swapped, self.own_b) if transposed else (self.cross, self.own_a)


def solve(steps: Steps, schedule: Schedule, *, debias: bool) -> Extrapolated:
    """The schedule for a problem and, when debiased, for each side with itself."""
    alike = steps.rho_a == steps.rho_b
    if debias and alike and schedule.threshold is None and steps.clouds.opposite is None and not steps.runs("symmetric"):
        return Extrapolated(*run_together(steps, schedule.eps, last_extrapolation=schedule.last_extrapolation), together=True)
    cross = run(steps, schedule)
    if not debias:
        return Extrapolated(cross)
    own_a, own_b = (run(problem, schedule, own=alike) for problem in _three(steps)[1:])
    return Extrapolated(cross, own_a, own_b)
