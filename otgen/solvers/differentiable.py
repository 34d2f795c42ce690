"""A solved problem as functions of the caller's points and weights, for torch.autograd.

The potentials are one node of the graph, whose derivatives are those of `otgen.solvers.implicit`; products with the density
K_ij = exp((f_i + g_j − C_ij)/eps) are others, functions of the potentials and the points. All else is put together of these:
autograd adds up what a loss asks of f and g, and one linear system answers it, however many answers the loss is made of.

A product H = K (b∘V) with a derivative Ḣ of the loss in H, ω_ij = <Ḣ_i, V_j>, has the derivatives

    <Ḣ_i, H_i>/eps in f_i      b_j <V_j, (KᵀḢ)_j>/eps in g_j      −(2/eps)·Σ_j K_ij b_j ω_ij (x_i − y_j) in x_i
    b∘(KᵀḢ) in V               <V_j, (KᵀḢ)_j> in b_j

Derivatives of these in turn are refused, never zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from otgen import ops
from otgen.solvers.conjugate import Limits, told
from otgen.solvers.implicit import pullback
from otgen.solvers.inputs import Clouds
from otgen.solvers.refused import once
from otgen.solvers.solution import Divergence, Solution, weight_slope
from otgen.solvers.system import Plan

SECOND = "expected one derivative of an implicit answer at most; got a second; type .detach() on the gradient, or use `value`"


Owner = TypeVar("Owner")
T = TypeVar("T")


def kept(compute: Callable[[Owner], T]) -> cached_property[T]:
    """A property computed once, with the graph that its owner has: `_recorded`, whoever asks first and in whatever mode."""

    @wraps(compute)
    def recorded(owner: Any) -> T:
        with torch.set_grad_enabled(owner._recorded):
            return compute(owner)

    return cached_property(recorded)


@dataclass(frozen=True, eq=False)
class Differentiable:
    """A solution, answering as `Solution` does, with a graph.

    x, y, a, b  (n, d), (m, d), (n,), (m,): the clouds' points and weights, in the frame and dtype of the clouds, with the graph
    f, g        (n,), (m,): `Solution.f` and `Solution.g`, float64: under a large ρ sums of their derivatives cancel
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
        columns = values.reshape(len(self.b), -1)
        found: Tensor = _Product.apply(self.solution, self.f, self.g, self.x, self.y, self.b, columns)  # type: ignore[no-untyped-call]
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
        solution, c = self.solution, self.clouds
        with torch.no_grad():
            u, _ = ops.sinkhorn_half_step(c.x, c.y, solution.outcome.u, solution.outcome.v, c.b, c.x_sq, **solution.steps.launch)
            level = replace(solution, outcome=replace(solution.outcome, u=u))
        values = torch.cat((self.y, torch.ones_like(self.y[:, :1])), 1)
        sums = _Product.apply(level, self.f.detach(), self.g, self.x, self.y, self.b, values)  # type: ignore[no-untyped-call]
        means: Tensor = sums[:, :-1] / sums[:, -1:] + c.shift  # whatever f is: it cancels
        return means

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
        return weight_slope(self.solution.steps, self.f, self.b).to(self.b.dtype)

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
        return self._density(self.solution.density())

    def plan(self) -> Tensor:
        """P (n, m), all at once."""
        empty = (self.clouds.a[:, None] == 0) & (self.clouds.b == 0)
        return self.a[:, None] * self.b * self._density(torch.where(empty, 0.0, self.solution.density()))

    def _density(self, known: Tensor) -> Tensor:
        """`known` with the graph of K."""
        half = [points.square().sum(1) for points in (self.x, self.y)]
        f, g = self.f.to(known.dtype), self.g.to(known.dtype)
        scores = (f[:, None] + g - half[0][:, None] - half[1] + 2.0 * self.x @ self.y.T) / float(self.eps)
        return known * (scores - scores.detach()).exp()


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
        return solution.f.to(torch.float64, copy=True), solution.g.to(torch.float64, copy=True)

    @staticmethod
    def backward(ctx: Any, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        with torch.no_grad():
            pulled, limits = pullback(ctx.solution, p, q)
        told("an implicit gradient", limits)
        return None, *(once(SECOND, found, p, q, *inputs) for found in pulled)


class _Product(torch.autograd.Function):
    """K·(b∘V) (n, k) for V (m, k), a function of f, g, x, y, b and V."""

    @staticmethod
    def forward(ctx: Any, solution: Solution, f: Tensor, g: Tensor, x: Tensor, y: Tensor, b: Tensor, values: Tensor) -> Tensor:
        c = solution.clouds
        (product,) = _plan(solution).times(values, a=torch.ones_like(c.a))
        ctx.solution = solution
        ctx.save_for_backward(f, g, x, y, b, values, product)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, product = ctx.saved_tensors
        values, needed, c = inputs[-1], ctx.needs_input_grad, ctx.solution.clouds
        with torch.no_grad():
            plan, (rows, columns) = _plan(ctx.solution), (torch.ones_like(c.a), torch.ones_like(c.b))
            (back,) = plan.swapped.times(grad, a=columns, b=rows * (c.a > 0))
            lost = (c.a == 0) & grad.any(1)
            if bool(lost.any()):
                (further,) = plan.swapped.times(grad, a=columns, b=lost.to(grad.dtype))
                back = back + further
            of_b = (values * back).sum(1)
            in_f = (grad.double() * product.double()).sum(1) / plan.eps
            in_g = torch.where(c.b > 0, c.b.double() * (values.double() * back.double()).sum(1), 0.0) / plan.eps
            in_g = in_g + c.b.double() * ((in_f.sum() - in_g.sum()) / c.b.double().sum())  # they have one sum
            in_x = _moved(plan, grad, values, (rows, c.b)) if needed[3] else None
            in_y = c.b[:, None] * _moved(plan.swapped, values, grad, (columns * (c.b > 0), rows)) if needed[4] else None
            in_values = torch.where(c.b[:, None] > 0, c.b[:, None] * back, 0.0)
        return None, *(once(SECOND, found, grad, *inputs) for found in (in_f, in_g, in_x, in_y, of_b, in_values))


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
