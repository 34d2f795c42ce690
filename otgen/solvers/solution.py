"""A solved pair of potentials and the sums over its plan: what results and gradients are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otgen.chunked import exponentials
from otgen.solvers.inputs import Clouds
from otgen.solvers.sinkhorn import Outcome
from otgen.solvers.steps import Steps, damping, scale

if TYPE_CHECKING:
    from otgen.dispatch import Choice


@dataclass(frozen=True, eq=False)
class Solution:
    """A problem and where its loop ended.

    choice  the variant that ran the loop; None in streamed PyTorch
    """

    steps: Steps
    outcome: Outcome
    choice: Choice | None

    @property
    def clouds(self) -> Clouds:
        return self.steps.clouds

    @property
    def eps(self) -> Any:
        return self.steps.eps

    @property
    def flat_eps(self) -> Any:
        """eps as it applies to sums over points (…,): a number, or of a batch (batch,)."""
        return self.eps[..., 0].double() if isinstance(self.eps, Tensor) else self.eps

    @property
    def symmetric(self) -> bool:
        """Whether one potential solves it: f = g."""
        return self.outcome.u is self.outcome.v

    @property
    def swapped(self) -> Solution:
        return replace(self, steps=self.steps.swapped, outcome=self.outcome.swapped)

    @property
    def a(self) -> Tensor:
        return self.clouds.a

    @property
    def b(self) -> Tensor:
        return self.clouds.b

    @property
    def r(self) -> Tensor:
        """P·1 (n,)."""
        return self.outcome.r

    @property
    def c(self) -> Tensor:
        return self.outcome.c

    @property
    def f(self) -> Tensor:
        """(n,) potential in units of the cost. Balanced, of all pairs (f + t, g − t) the one with <a, f>/Σa = <b, g>/Σb."""
        f: Tensor = self.steps.potential(self.outcome.u) + self.constant
        return f

    @property
    def g(self) -> Tensor:
        g: Tensor = self.steps.swapped.potential(self.outcome.v) - self.constant
        return g

    @cached_property
    def constant(self) -> Any:
        """What is added to f and taken off g (…, 1); 0 where the potentials are determined."""
        if self.symmetric or not self.steps.balanced:
            return 0.0
        of_f, of_g = _mean(self.steps, self.outcome.u), _mean(self.steps.swapped, self.outcome.v)
        return ((of_g - of_f) / 2).to(self.outcome.u.dtype)

    def part(self, i: int) -> Solution:
        """The i-th problem of a solved batch."""
        assert self.clouds.extents is not None
        n, m = (int(count[i]) for count in self.clouds.extents)
        return Solution(self.steps.part(i, n, m), self.outcome.part(i, n, m), self.choice)

    def dual(self) -> Tensor:
        """<a, φ_a(f)> + <b, φ_b(g)> − eps·Σ(P − a⊗b), float64 (…,); φ(f) = f, or ρ·(1 − exp(−f/ρ)) for a relaxed marginal."""
        a, b = self.clouds.a.double(), self.clouds.b.double()
        linear = (a * _conjugate(self.f, self.steps.rho_a)).sum(-1) + (b * _conjugate(self.g, self.steps.rho_b)).sum(-1)
        total: Tensor = linear + (a.sum(-1) * b.sum(-1) - self.outcome.r.double().sum(-1)) * self.flat_eps
        return total

    def weight_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n,): the derivative of the dual in a (`weight_slope`); (m,): that in b, when transposed."""
        side = self.swapped if transposed else self
        return weight_slope(side.steps, side.f, side.b)

    def apply(self, values: Tensor, *, transposed: bool = False) -> Tensor:
        """P·values, or Pᵀ·values."""
        if transposed:
            return self.swapped.apply(values)
        return self.steps.times(self.outcome.u, self.outcome.v, self.a, values)

    def barycentres(self, *, transposed: bool = False) -> Tensor:
        """(n, d): the mean of y under each row of the plan, or (m, d), that of x under each column, in the caller's frame."""
        side = self.swapped if transposed else self
        return barycentres(side.steps, side.outcome.u, side.outcome.v)

    def potential_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d): the derivative of each f_i in x_i with all else held, or of g_j in y_j: 2λ·(x_i − T(x)_i), damped by λ."""
        side = self.swapped if transposed else self
        return potential_gradient(side.steps, side.outcome.u, side.outcome.v)

    def gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d): 2(r∘x − P y), the derivative of the dual in x; (m, d) in y when transposed."""
        if transposed:
            return self.swapped.gradient()
        whole = self.steps.gradient(self.outcome.u, self.outcome.v, self.r)
        return whole[..., : self.clouds.dimension]

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(n, d) and (m, d): the derivatives of the dual in x and y, 2(r∘x − P y) and 2(c∘y − Pᵀx), in one launch."""
        c, found = self.clouds, self.outcome
        x, y = (points[..., : c.dimension].contiguous() for points in (c.x, c.y))
        sums, sums_t = self.steps.times_both(found.u, found.v, y, x)
        return 2.0 * (found.r[..., None] * x - sums), 2.0 * (found.c[..., None] * y - sums_t)

    def linear_cost(self) -> Tensor:
        """<P, C>, float64 (…,); one sweep."""
        x, (r, c) = self.clouds.x.double(), (self.outcome.r.double(), self.outcome.c.double())
        cross = (x * self.apply(self.clouds.y).double()).sum((-2, -1))
        return (r * self.clouds.x_sq.double()).sum(-1) + (c * self.clouds.y_sq.double()).sum(-1) - 2.0 * cross

    def density(self) -> Tensor:
        """K = exp((f_i + g_j − C_ij)/eps) (n, m), all at once."""
        entries = self.clouds.x.new_empty((*self.clouds.a.shape, self.clouds.b.shape[-1]))
        exponentials(self.clouds.x, self.clouds.y, self.outcome.u, self.outcome.v, scale(self.eps), out=entries)
        return entries

    def plan(self) -> Tensor:
        """(n, m), all at once."""
        a, b = self.clouds.a[..., None], self.clouds.b[..., None, :]
        return torch.where((a > 0) & (b > 0), self.density().mul_(a).mul_(b), 0.0)


def weight_slope(steps: Steps, f: Tensor, b: Tensor) -> Tensor:
    """(n,): φ_a(f) + eps·(Σb − ρ_i), the derivative of the dual in a, with the row sums ρ_i of the solution: 1, or exp(−f/ρ) when
    relaxed."""
    sums = 1.0 if math.isinf(steps.rho_a) else torch.exp(-f / steps.rho_a)
    slope: Tensor = _conjugate(f, steps.rho_a).to(f.dtype) + (b.sum(-1, keepdim=True) - sums) * steps.eps
    return slope


def averaged(solution: Solution, of: Callable[..., Tensor]) -> Tensor:
    """Of a measure's transport to itself: half of a method's answers for both sides, together."""
    return of() if solution.symmetric else 0.5 * (of() + of(transposed=True))


def _mean(steps: Steps, u: Tensor) -> Tensor:
    """(…, 1): <a, f>/Σa in float64."""
    a = steps.clouds.a.double()
    weighed = torch.where(a > 0, a * steps.potential(u).double(), 0.0)
    return weighed.sum(-1, keepdim=True) / a.sum(-1, keepdim=True)


def barycentres(steps: Steps, u: Tensor, v: Tensor) -> Tensor:
    """(n, d): the mean of y under each row of the plan of (u, v), in the caller's frame.

    The shift of a row cancels in its mean. One half step finds the shift for which its sum is 1, where nothing over- or underflows,
    whatever the state of the pair; a second sweep gives means and sums, so a map is an exact convex combination, of points without
    weight too.
    """
    c = steps.clouds
    u, _ = steps.half(u, v)
    values = torch.cat((c.y[..., : c.dimension], torch.ones_like(c.y[..., :1])), -1)
    sums = steps.times(u, v, torch.ones_like(c.a), values)
    return sums[..., :-1] / sums[..., -1:] + c.shift


def potential_gradient(steps: Steps, u: Tensor, v: Tensor) -> Tensor:
    """(n, d): the derivative in x_i of the damped update of f from v at x_i, with v and y held: 2λ·(x_i − T(x)_i)."""
    factor = damping(steps.eps, steps.rho_a)
    moved = steps.clouds.x[..., : steps.clouds.dimension] + steps.clouds.shift - barycentres(steps, u, v)
    return 2.0 * (factor[..., None] if isinstance(factor, Tensor) else factor) * moved


def _conjugate(potential: Tensor, rho: float) -> Tensor:
    """φ(f) in float64: f, or ρ·(1 − exp(−f/ρ)) for a marginal relaxed with strength ρ."""
    potential = potential.double()
    return potential if math.isinf(rho) else -rho * torch.expm1(-potential / rho)


@dataclass(frozen=True, eq=False)
class Divergence:
    """A solution, less half of each side's own when debiased: OT(α, β) − OT(α, α)/2 − OT(β, β)/2 + eps/2·(Σa − Σb)².

    The last term makes it zero for equal measures only and never negative when masses differ (Séjourné et al. 2019). All three take
    the same pair of strengths: when these differ, it is still zero for equal measures, but nobody has shown it to be positive.
    """

    cross: Solution
    own_a: Solution | None = None
    own_b: Solution | None = None

    @property
    def solutions(self) -> tuple[Solution, ...]:
        return tuple(solution for solution in (self.cross, self.own_a, self.own_b) if solution is not None)

    def part(self, i: int) -> Divergence:
        """The i-th problem of a solved batch."""
        return Divergence(*(solution.part(i) for solution in self.solutions))

    def dual(self) -> Tensor:
        """Float64 (…,)."""
        total = self.cross.dual()
        if self.own_a is not None and self.own_b is not None:
            total = total - 0.5 * (self.own_a.dual() + self.own_b.dual()) + 0.5 * self._surplus**2 * self.cross.flat_eps
        return total

    def potentials(self) -> tuple[Tensor, Tensor]:
        """(f, g), or (f − f_aa, g − g_bb) when debiased."""
        f, g = self.cross.f, self.cross.g
        return (f if self.own_a is None else f - self.own_a.f), (g if self.own_b is None else g - self.own_b.g)

    def potential_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d), the derivative of each of the first `potentials` in its point, with all else held; (m, d) of the second."""
        own = self.own_b if transposed else self.own_a
        cross = self.cross.potential_gradient(transposed=transposed)
        return cross if own is None else cross - own.potential_gradient(transposed=own is self.own_b)

    def gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d), its derivative in x; (m, d) in y when transposed. Both sides of a self-problem move with it."""
        own = self.own_b if transposed else self.own_a
        cross = self.cross.gradient(transposed=transposed)
        if own is None:
            return cross
        return cross - averaged(own, own.gradient)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(n, d) and (m, d): `gradient` of both sides, that of the pair in one launch."""
        of_x, of_y = self.cross.gradients()
        if self.own_a is not None and self.own_b is not None:
            of_x, of_y = of_x - averaged(self.own_a, self.own_a.gradient), of_y - averaged(self.own_b, self.own_b.gradient)
        return of_x, of_y

    def weight_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n,), its derivative in a; (m,) in b when transposed."""
        own = self.own_b if transposed else self.own_a
        cross = self.cross.weight_gradient(transposed=transposed)
        if own is None:
            return cross
        surplus: Tensor = self._surplus[..., None].to(cross.dtype) * self.cross.eps
        return cross - averaged(own, own.weight_gradient) + (-surplus if transposed else surplus)

    @property
    def _surplus(self) -> Tensor:
        return self.cross.a.double().sum(-1) - self.cross.b.double().sum(-1)
