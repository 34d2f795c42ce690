"""A solved problem as functions of the caller's points and weights, for torch.autograd.

The potentials are one node of the graph, whose derivatives are those of `otgen.solvers.implicit`; products with the density
K_ij = exp((f_i + g_j − C_ij)/eps) are others, functions of the potentials and the points. All else is put together of these:
autograd adds up what a loss asks of f and g, and one linear system answers it, however many answers the loss is made of.

A product H = K V with a derivative Ḣ of the loss in H, ω_ij = <Ḣ_i, V_j>, has the derivatives

    Kᵀ Ḣ in V      <Ḣ_i, H_i>/eps in f_i      <V_j, (Kᵀ Ḣ)_j>/eps in g_j      −(2/eps)·Σ_j K_ij ω_ij (x_i − y_j) in x_i

Derivatives of these in turn are refused, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from otgen.solvers.conjugate import Limits, told
from otgen.solvers.implicit import pullback
from otgen.solvers.inputs import Clouds
from otgen.solvers.refused import once
from otgen.solvers.solution import Divergence, Solution, weight_slope
from otgen.solvers.system import Plan

SECOND = "expected one derivative of an implicit answer at most; got a second; type .detach() on the gradient, or use `value`"


@dataclass(frozen=True, eq=False)
class Differentiable:
    """A solution, answering as `Solution` does, with a graph.

    x, y, a, b  (n, d), (m, d), (n,), (m,): the clouds' points and weights, in the frame and dtype of the clouds, with the graph
    f, g        (n,), (m,): `Solution.f` and `Solution.g`
    """

    solution: Solution
    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    f: Tensor
    g: Tensor

    @classmethod
    def of(cls, solution: Solution, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Differentiable:
        """x, y, a, b as the caller gave them; the weights None where they are uniform."""
        clouds = solution.clouds
        dtype = clouds.x.dtype
        weights = [own if given is None else given.to(dtype) for given, own in ((a, clouds.a), (b, clouds.b))]
        tensors = x.to(dtype) - clouds.shift, y.to(dtype) - clouds.shift, *weights
        return cls(solution, *tensors, *_Potentials.apply(solution, *tensors))  # type: ignore[no-untyped-call]

    @property
    def clouds(self) -> Clouds:
        return self.solution.clouds

    @property
    def eps(self) -> Any:
        return self.solution.eps

    @property
    def symmetric(self) -> bool:
        return self.solution.symmetric

    @cached_property
    def swapped(self) -> Differentiable:
        return Differentiable(self.solution.swapped, self.y, self.x, self.b, self.a, self.g, self.f)

    @cached_property
    def r(self) -> Tensor:
        """P·1 (n,)."""
        return self.apply(torch.ones_like(self.b))

    @cached_property
    def c(self) -> Tensor:
        return self.swapped.r

    def product(self, values: Tensor) -> Tensor:
        """K·(b∘values), for values (m,) or (m, k): the mean that the update of f takes, at points without weight too."""
        weighed = self.b.reshape(-1, *[1] * (values.ndim - 1)) * values
        found: Tensor = _Product.apply(self.solution, self.f, self.g, self.x, self.y, weighed.reshape(len(weighed), -1))  # type: ignore[no-untyped-call]
        return found.reshape(-1, *values.shape[1:])

    def apply(self, values: Tensor, *, transposed: bool = False) -> Tensor:
        """P·values, or Pᵀ·values."""
        if transposed:
            return self.swapped.apply(values)
        return self.a.reshape(-1, *[1] * (values.ndim - 1)) * self.product(values)

    def barycentres(self, *, transposed: bool = False) -> Tensor:
        """(n, d) or (m, d): as `Solution.barycentres`."""
        if transposed:
            return self.swapped.barycentres()
        sums = self.product(torch.cat((self.y, torch.ones_like(self.y[:, :1])), 1))
        return sums[:, :-1] / sums[:, -1:] + self.clouds.shift

    def gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d): 2(r∘x − P y), or (m, d)."""
        if transposed:
            return self.swapped.gradient()
        sums = self.apply(torch.cat((self.y, torch.ones_like(self.y[:, :1])), 1))
        return 2.0 * (self.x * sums[:, -1:] - sums[:, :-1])

    def weight_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n,) or (m,): as `Solution.weight_gradient`."""
        if transposed:
            return self.swapped.weight_gradient()
        return weight_slope(self.solution.steps, self.f, self.b)

    def linear_cost(self) -> Tensor:
        """<P, C>."""
        c, d = self.clouds, self.clouds.dimension
        labels = (c.x_sq - c.x[:, :d].square().sum(1)), (c.y_sq - c.y[:, :d].square().sum(1))
        sums = self.apply(torch.cat((self.y, c.y[:, d:], torch.ones_like(self.y[:, :1])), 1))
        cross = torch.cat((self.x, c.x[:, d:]), 1) * sums[:, :-1]
        squares = [points.square().sum(1) + rest for points, rest in zip((self.x, self.y), labels)]
        return (sums[:, -1] * squares[0]).sum() + (self.c * squares[1]).sum() - 2.0 * cross.sum()

    def density(self) -> Tensor:
        """K (n, m), all at once."""
        known = self.solution.density()
        half = [points.square().sum(1) for points in (self.x, self.y)]
        scores = (self.f[:, None] + self.g - half[0][:, None] - half[1] + 2.0 * self.x @ self.y.T) / float(self.eps)
        return known * (scores - scores.detach()).exp()

    def plan(self) -> Tensor:
        """P (n, m), all at once."""
        clouds = self.clouds
        kept = torch.where((clouds.a[:, None] > 0) & (clouds.b > 0), self.density(), 0.0)
        return self.a[:, None] * self.b * kept


def differentiable(divergence: Divergence, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Divergence:
    """A divergence whose parts have a graph, and with them all that it computes."""
    sides = ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    parts = [Differentiable.of(solution, *side) for solution, side in zip(divergence.solutions, sides)]
    return Divergence(*cast("list[Solution]", parts))


class _Potentials(torch.autograd.Function):
    """(f, g) of the points and weights; of a measure's transport to itself the two are one, and so are its sides."""

    @staticmethod
    def forward(ctx: Any, solution: Solution, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.solution = solution
        ctx.save_for_backward(x, y, a, b)
        return solution.f, solution.g

    @staticmethod
    def backward(ctx: Any, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            pulled, limits = pullback(ctx.solution, p, q)
        told("an implicit gradient", limits)
        return None, *(once(SECOND, found, p, q, *ctx.saved_tensors) for found in pulled)


class _Product(torch.autograd.Function):
    """K·V (n, k) for V (m, k), a function of f, g, x, y and V."""

    @staticmethod
    def forward(ctx: Any, solution: Solution, f: Tensor, g: Tensor, x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        plan, (ones, weighty) = _plan(solution), _indicators(solution.clouds)
        (product,) = plan.times(values, a=ones[0], b=weighty[1])
        ctx.solution = solution
        ctx.save_for_backward(f, g, x, y, values, product)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, product = ctx.saved_tensors
        values, needed = inputs[-1], ctx.needs_input_grad
        with torch.no_grad():
            plan, (ones, weighty) = _plan(ctx.solution), _indicators(ctx.solution.clouds)
            in_values = plan.swapped.times(grad, a=ones[1], b=weighty[0])[0]
            if bool(grad[weighty[0] == 0].any()):
                in_values = in_values + plan.swapped.times(grad, a=ones[1], b=ones[0] - weighty[0])[0]
            in_f, in_g = ((one * other).sum(1) / plan.eps for one, other in ((grad, product), (values, in_values)))
            in_x = _moved(plan, grad, values, (ones[0], weighty[1])) if needed[3] else None
            in_y = _moved(plan.swapped, values, grad, (weighty[1], ones[0])) if needed[4] else None
        return None, *(once(SECOND, found, grad, *inputs) for found in (in_f, in_g, in_x, in_y, in_values))


def _moved(plan: Plan, left: Tensor, right: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """(n, d): −(2/eps)·Σ_j K_ij <left_i, right_j> (x_i − y_j).

    With right_j appended to y_j and left_i/2 as what x_i moves by there, what the assembly of a Hessian calls dC_ij is −<left_i,
    right_j>.
    """
    zero = torch.zeros_like(plan.u)
    way = torch.cat((torch.zeros_like(plan.points), -0.5 * left), 1)
    return plan.differences(way, zero, torch.zeros_like(plan.v), right, marginal=zero, inverse_eps=1.0 / plan.eps, weights=weights)


def _plan(solution: Solution) -> Plan:
    return Plan.of(solution, Limits(0.0, 0, solution.clouds, 1.0))


def _indicators(clouds: Clouds) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((n,), (m,)) ones, and ((n,), (m,)) ones at points of weight, with zeros at the others."""
    ones = torch.ones_like(clouds.a), torch.ones_like(clouds.b)
    return ones, ((clouds.a > 0).to(clouds.a.dtype), (clouds.b > 0).to(clouds.b.dtype))
