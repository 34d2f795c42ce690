"""The sweeps of one transport problem, and what their sums say of the pair of potentials they were taken at.

Scaled potentials u, v and their sums are those of `otgen.families.sinkhorn`. A marginal is *relaxed* with strength ρ when it may
miss its weights at the price ρ·KL(P·1 | a): then its update is damped by ρ/(ρ + eps), and at the solution it is a·exp(−f/ρ) instead
of a (Chizat, Peyré, Schmitzer and Vialard 2018; Séjourné, Feydy, Vialard, Trouvé and Peyré 2019). ρ = ∞ is the balanced case.

Of unequal masses under a large ρ, f and −g share a constant, `Steps.lift`, that may be far larger than the range of the scores. It
cancels in all of them, so the scaled potentials are kept without it: u stands for f − lift, v for g + lift.

Everything here takes one problem, whose vectors are (n,), or a batch of them: vectors (batch, n) and numbers (batch, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from otgen import iterations, ops
from otgen.ops import Flags, Scalar
from otgen.precision import LOG2_E
from otgen.solvers.inputs import Clouds

Kind = TypeVar("Kind", bound="Steps")


def kappa(eps: Scalar) -> Scalar:
    """Scaled potentials, in base 2, per unit of cost."""
    return LOG2_E / eps


def scale(eps: Scalar) -> Scalar:
    """The factor of <x, y> in a score, for C = |x − y|²."""
    return 2.0 * kappa(eps)


def scaled(potential: Tensor, squares: Tensor, eps: Scalar) -> Tensor:
    """u = kappa·f − (scale/2)·|x|²."""
    return kappa(eps) * potential - scale(eps) / 2 * squares


def unscaled(potential: Tensor, squares: Tensor, eps: Scalar) -> Tensor:
    """f = (u + (scale/2)·|x|²)/kappa."""
    return (potential + scale(eps) / 2 * squares) / kappa(eps)


@dataclass(frozen=True, eq=False)
class Steps:
    """The updates of one problem.

    rho_a, rho_b  strengths of the relaxed marginals, in units of the cost; infinite when balanced
    modes         the admissible precisions of a sweep
    """

    clouds: Clouds
    eps: Any
    modes: tuple[str, ...]
    rho_a: float = math.inf
    rho_b: float = math.inf

    @property
    def balanced(self) -> bool:
        return math.isinf(self.rho_a) and math.isinf(self.rho_b)

    @property
    def span(self) -> Scalar:
        """The largest cost between two points of weight, (2R)², in units of u: what an optimal potential varies by at most."""
        reach = self.clouds.reach
        return 4.0 * kappa(self.eps) * (reach.clamp(min=1e-15) if isinstance(reach, Tensor) else max(reach, 1e-30)) ** 2

    @cached_property
    def swapped(self) -> Steps:
        return replace(self, clouds=self.clouds.swapped, rho_a=self.rho_b, rho_b=self.rho_a)

    def into(self, kind: type[Kind], **more: Any) -> Kind:
        """The same, as steps of a kind that has `more` fields."""
        return kind(**{own.name: getattr(self, own.name) for own in fields(Steps)}, **more)

    def at(self, eps: Scalar) -> Steps:
        """The same problem under another regularisation."""
        return replace(self, eps=eps)

    def part(self, i: int, n: int, m: int) -> Steps:
        """The i-th problem of a batch, of n × m points, as a single one."""
        eps = float(self.eps[i]) if isinstance(self.eps, Tensor) else self.eps
        return Steps(self.clouds.part(i, n, m), eps, self.modes, self.rho_a, self.rho_b)

    def only(self, problems: Tensor) -> Steps:
        """The same batch, in which all but these `problems` (batch,) rest: their potentials stay, and their sums are 1."""
        return replace(self, clouds=self.clouds.only(problems))

    def moved(self, new: Tensor, old: Tensor) -> Tensor:
        """`new`, but of problems that rest `old`; both (n,), (batch, n) or (batch, m)."""
        awake = self.clouds.awake
        return new if awake is None else torch.where(awake, new, old)

    def scaled(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(u, v) of potentials in units of the cost."""
        return scaled(f - self.lift, self.clouds.x_sq, self.eps), scaled(g + self.lift, self.clouds.y_sq, self.eps)

    def potential(self, u: Tensor) -> Tensor:
        """f (n,) in units of the cost."""
        potential: Tensor = unscaled(u, self.clouds.x_sq, self.eps) + self.lift
        return potential

    @cached_property
    def lift(self) -> Any:
        """A constant near the one that f and −g share, in units of the cost: the best t of `translated` for f = g = 0."""
        if self.balanced:
            return 0.0
        mass, other = self.clouds.masses
        ratio = (mass / other).log() if isinstance(mass, Tensor) else math.log(mass / other)
        return ratio / (1.0 / self.rho_a + 1.0 / self.rho_b)

    @property
    def sweeps(self) -> int:
        """Sweeps that `both` takes."""
        choice = ops.kernel("sinkhorn", self.clouds.x, self.clouds.y, ops.SYMMETRIC, self.modes).choice
        return 1 if choice is None or choice.variant["fusion"] == "one_sweep" else 2

    @property
    def skipped(self) -> dict[str, Any]:
        """What the last sweep left out, as `otgen.solvers.sinkhorn.Outcome` has it: nothing."""
        return {"visited": 1.0, "omitted": 0.0}

    @property
    def listed(self) -> tuple[Flags, ...]:
        """The flags of kernels that visit listed tiles, where half steps may take such: none."""
        return ()

    def rows(self, u: Tensor, v: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
        """The update of u from v, and the row sums of the pair that came in."""
        out, rho = self.half(u, v, step)
        return self.relaxed(out, u, step), rho

    def half(self, u: Tensor, v: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
        """`rows`, as if the marginal had to fit."""
        c = self.clouds
        return ops.sinkhorn_half_step(c.x, c.y, u, v, c.b, c.x_sq, step=step, **self.launch)

    def times(self, u: Tensor, v: Tensor, a: Tensor, values: Tensor) -> Tensor:
        """P·values (n,) or (n, k) for the plan of (u, v), with `a` (n,) for weights of its rows."""
        c = self.clouds
        return ops.apply_plan(c.x, c.y, u, v, a, c.b, values, **self.launch)

    def times_both(self, u: Tensor, v: Tensor, values: Tensor, values_t: Tensor) -> tuple[Tensor, Tensor]:
        """P·values (n, k) and Pᵀ·values_t (m, k) for the plan of (u, v)."""
        c = self.clouds
        return ops.apply_plan_both(c.x, c.y, u, v, c.a, c.b, values, values_t, **self.launch)

    def gradient(self, u: Tensor, v: Tensor, marginal: Tensor) -> Tensor:
        """(n, d): 2(marginal∘x − P y) for the plan of (u, v)."""
        c = self.clouds
        return ops.plan_gradient(c.x, c.y, u, v, c.a, c.b, marginal, **self.launch)

    def relaxed(self, out: Tensor, u: Tensor, step: float) -> Tensor:
        """The update of u, of which `out` is what it would be if the marginal had to fit: a share ρ/(ρ + eps) of the new f.

        What the share takes away is computed for itself. Under a large ρ it is tiny, and decides all the same where f and −g end up
        together: 1 − ρ/(ρ + eps) in float32 would lose it.
        """
        if math.isinf(self.rho_a):
            return out
        full = out if step == 1.0 else u + (out - u) / step
        taken = (self.eps / (self.rho_a + self.eps)) * (full + scale(self.eps) / 2 * self.clouds.x_sq + kappa(self.eps) * self.lift)
        less: Tensor = out - step * taken
        return less if self.clouds.real is None else torch.where(self.clouds.real, less, out)

    def own(self, u: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor]:
        """The update of the one potential of a measure's transport to itself, and the row sums of the one that came in."""
        c = self.clouds
        out, rho = ops.sinkhorn_own_step(c.x, c.y, u, c.a, c.x_sq, step=step, **self.launch)
        return self.relaxed(out, u, step), rho

    def columns(self, u: Tensor, v: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
        """The update of v from u, and the column sums of the pair that came in."""
        return self.swapped.rows(v, u, step)

    def both(self, u: Tensor, v: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both updates from the old pair, and its row and column sums."""
        c = self.clouds
        u_out, v_out, rho, gamma = ops.sinkhorn_symmetric_step(c.x, c.y, u, v, c.a, c.b, c.x_sq, c.y_sq, step=step, **self.launch)
        return self.relaxed(u_out, u, step), self.swapped.relaxed(v_out, v, step), rho, gamma

    @cached_property
    def alone(self) -> Steps:
        """The problem of the first side with itself."""
        return replace(self, clouds=self.clouds.own)

    def debiased(self, u: Tensor, v: Tensor, p: Tensor, q: Tensor, step: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`both` of (u, v), `own` of each side's p and q alone, in one launch: the potentials. For clouds without labels."""
        c = self.clouds
        out = ops.sinkhorn_debiased_step(c.x, c.y, u, v, p, q, c.a, c.b, c.x_sq, c.y_sq, step=step, **self.launch)
        if self.balanced:
            return out[:4]
        sides = self, self.swapped, self.alone, self.swapped.alone
        u, v, p, q = (side.relaxed(new, old, step) for side, new, old in zip(sides, out, (u, v, p, q)))
        return u, v, p, q

    def runs(self, schedule: str) -> bool:
        """Whether many iterations of a schedule should be one launch (`otgen.iterations`)."""
        return iterations.pays(self.clouds.x, self.clouds.y, schedule, self.modes)

    def run(
        self, u: Tensor, v: Tensor, eps: Sequence[Scalar], schedule: str, step: float = 1.0, tol: Scalar = -1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One iteration at each regularisation, the first of which u and v are scaled by: what `otgen.iterations` returns.

        No pair is moved along (f + t, g − t) on the way (`translated`).
        """
        c = self.clouds
        clouds = c.x, c.y, u, v, c.a, c.b, c.x_sq, c.y_sq
        launch: dict[str, Any] = {"course": self.course(eps), "modes": self.modes, "extents": c.extents}
        return iterations.sinkhorn_iterations(*clouds, schedule=schedule, step=step, tol=tol, **launch)

    def course(self, eps: Sequence[Scalar]) -> Tensor:
        """(…, k, 5): what each of k iterations goes by (`otgen.families.loop`)."""
        a = self.clouds.a
        if isinstance(eps[0], Tensor):
            now = torch.cat([one.double() for one in eps], 1)  # type: ignore[union-attr]
        else:
            now = torch.tensor([eps], dtype=torch.float64).to(a.device)
        following = torch.cat((now[:, 1:], now[:, -1:]), 1)
        shares, lift = (now / (now + rho) for rho in (self.rho_a, self.rho_b)), kappa(now) * self.lift
        numbers = torch.broadcast_tensors(scale(now), *shares, lift, now / following)  # type: ignore[no-untyped-call]
        rows = torch.stack(numbers, -1).to(a.dtype)
        return rows[0] if a.ndim == 1 else rows.expand(len(a), -1, -1).contiguous()

    @property
    def launch(self) -> dict[str, Any]:
        """What every launch of `otgen.ops` for this problem is told."""
        return {"scale": scale(self.eps), "modes": self.modes, "extents": self.clouds.extents}

    def row_target(self, u: Tensor) -> Tensor:
        """(n,): what the row marginal is at a solution with the potential u: a, or a·exp(−f/ρ) when relaxed."""
        a = self.clouds.a
        if math.isinf(self.rho_a):
            return a
        return torch.where(a > 0, a * torch.exp(-self.potential(u) / self.rho_a), 0.0)

    def row_miss(self, u: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """The row marginal r = a·rho, with exact zeros where there is no weight; (…, 1) Σ|r − target| as a share of the mass."""
        r = torch.where(self.clouds.a > 0, self.clouds.a * rho, 0.0)
        return r, (r - self.row_target(u)).abs().sum(-1, keepdim=True) / self.clouds.mass

    def translated(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The best pair of the form (f + t, g − t); nothing to do when balanced.

        t = ρ_a ρ_b/(ρ_a + ρ_b)·log(<a, exp(−f/ρ_a)> / <b, exp(−g/ρ_b)>) maximises the dual (Séjourné, Vialard and Peyré 2022).
        """
        if self.balanced:
            return u, v
        one, other = self._log_target_mass(u), self.swapped._log_target_mass(v)
        weight = 1.0 / (1.0 / self.rho_a + 1.0 / self.rho_b)
        t = kappa(self.eps) * weight * (one - other)
        return u + t, v - t

    def _log_target_mass(self, u: Tensor) -> Tensor:
        """log <a, exp(−f/ρ_a)>."""
        exponents = -self.potential(u) / self.rho_a
        return torch.logsumexp(exponents + self.clouds.a.log(), -1, keepdim=True)


def damping(eps: Scalar, rho: float) -> Scalar:
    """ρ/(ρ + eps)."""
    return 1.0 / (1.0 + eps / rho)
