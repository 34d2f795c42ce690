"""A solved pair of potentials and the sums over its plan: what results and gradients are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from otgen import ops
from otgen.errors import UsageError
from otgen.precision import LOG2_E
from otgen.solvers.inputs import Clouds, Given, working_dtype
from otgen.solvers.sinkhorn import Outcome

if TYPE_CHECKING:
    from otgen.dispatch import Choice


def kappa(eps: float) -> float:
    """Scaled potentials, in base 2, per unit of cost."""
    return LOG2_E / eps


def scale(eps: float) -> float:
    """The factor of <x, y> in a score, for C = |x − y|²."""
    return 2.0 * kappa(eps)


def scaled(potential: Tensor, squares: Tensor, eps: float) -> Tensor:
    """u = kappa·f − (scale/2)·|x|²."""
    return kappa(eps) * potential - scale(eps) / 2 * squares


@dataclass(frozen=True, eq=False)
class Solution:
    """Clouds, eps, and where the loop ended.

    modes   the admissible precisions of every further sweep
    choice  the variant that ran the loop; None in streamed PyTorch
    """

    clouds: Clouds
    eps: float
    outcome: Outcome
    modes: tuple[str, ...]
    choice: Choice | None

    @property
    def f(self) -> Tensor:
        """(n,) potential in units of the cost."""
        return (self.outcome.u + scale(self.eps) / 2 * self.clouds.x_sq) / kappa(self.eps)

    @property
    def g(self) -> Tensor:
        return (self.outcome.v + scale(self.eps) / 2 * self.clouds.y_sq) / kappa(self.eps)

    def dual(self) -> Tensor:
        """<a, f> + <b, g> − eps·Σ(P − a⊗b), a float64 scalar."""
        a, b = self.clouds.a.double(), self.clouds.b.double()
        return a @ self.f.double() + b @ self.g.double() + self.eps * (a.sum() * b.sum() - self.outcome.r.double().sum())

    def weight_gradient(self, *, transposed: bool = False) -> Tensor:
        """(n,): f + eps·(Σb − 1), the derivative of the dual in a; (m,): g + eps·(Σa − 1), that in b, when transposed."""
        return (self.g if transposed else self.f) + self.eps * (self.clouds.mass - 1.0)

    def apply(self, values: Tensor, *, transposed: bool = False) -> Tensor:
        """P·values, or Pᵀ·values."""
        cloud, u, v = self._sides(transposed)
        return ops.apply_plan(cloud.x, cloud.y, u, v, cloud.a, cloud.b, values, scale=scale(self.eps), modes=self.modes)

    def barycentres(self, *, transposed: bool = False) -> Tensor:
        """(n, d): the mean of y under each row of the plan, or (m, d), that of x under each column, in the caller's frame.

        The shift of a row cancels in its mean. One half step finds the shift for which its sum is 1, where nothing over- or
        underflows, whatever the state of the pair; a second sweep gives means and sums, so a map is an exact convex combination,
        of points without weight too.
        """
        cloud, u, v = self._sides(transposed)
        options: dict[str, Any] = {"scale": scale(self.eps), "modes": self.modes}
        u, _ = ops.sinkhorn_half_step(cloud.x, cloud.y, u, v, cloud.b, cloud.x_sq, **options)
        values = torch.cat((cloud.y, torch.ones_like(cloud.y[:, :1])), 1)
        sums = ops.apply_plan(cloud.x, cloud.y, u, v, torch.ones_like(cloud.a), cloud.b, values, **options)
        return sums[:, :-1] / sums[:, -1:] + cloud.shift

    def gradient(self, *, transposed: bool = False) -> Tensor:
        """(n, d): 2(r∘x − P y), the derivative of the dual in x; (m, d) in y when transposed."""
        cloud, u, v = self._sides(transposed)
        marginal = self.outcome.c if transposed else self.outcome.r
        return ops.plan_gradient(cloud.x, cloud.y, u, v, cloud.a, cloud.b, marginal, scale=scale(self.eps), modes=self.modes)

    def linear_cost(self) -> Tensor:
        """<P, C>, a float64 scalar; one sweep."""
        x, (r, c) = self.clouds.x.double(), (self.outcome.r.double(), self.outcome.c.double())
        cross = (x * self.apply(self.clouds.y).double()).sum()
        return r @ self.clouds.x_sq.double() + c @ self.clouds.y_sq.double() - 2.0 * cross

    def plan(self) -> Tensor:
        """(n, m), all at once."""
        a, b = self.clouds.a[:, None], self.clouds.b
        scores = torch.addmm(self.outcome.v, self.clouds.x, self.clouds.y.T, alpha=scale(self.eps)).add_(self.outcome.u[:, None])
        return torch.where((a > 0) & (b > 0), scores.exp2_().mul_(a).mul_(b), 0.0)

    def _sides(self, transposed: bool) -> tuple[Clouds, Tensor, Tensor]:
        """The clouds and their scaled potentials, exchanged when transposed."""
        if transposed:
            return self.clouds.swapped, self.outcome.v, self.outcome.u
        return self.clouds, self.outcome.u, self.outcome.v


class DualValue(torch.autograd.Function):
    """The dual objective with the gradient of the transport cost: by the envelope theorem the potentials count as constants."""

    @staticmethod
    def forward(ctx: Any, solution: Solution, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        ctx.solution = solution
        ctx.save_for_backward(x, y, a, b)
        return solution.dual().to(working_dtype(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        solution: Solution = ctx.solution
        derivatives: tuple[Callable[[], Tensor], ...] = (
            solution.gradient,
            lambda: solution.gradient(transposed=True),
            solution.weight_gradient,
            lambda: solution.weight_gradient(transposed=True),
        )
        with torch.no_grad():
            wanted = zip(derivatives, ctx.needs_input_grad[1:], ctx.saved_tensors)
            grads = [(grad * derivative()).to(tensor.dtype) if needed else None for derivative, needed, tensor in wanted]
        inputs = (grad, *ctx.saved_tensors)
        return None, *(None if value is None else Once.apply(value, *inputs) for value in grads)  # type: ignore[no-untyped-call]


class Once(torch.autograd.Function):
    """A gradient that depends on `inputs` in a way that is not computed: differentiating it is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UsageError("expected one derivative of OTResult.value at most; got a second; type .detach() on the gradient")


def value(solution: Solution, given: Given) -> Tensor:
    """The dual objective as a scalar of the working dtype, differentiable in the caller's points and weights."""
    result: Tensor = DualValue.apply(solution, given.x, given.y, given.a, given.b)  # type: ignore[no-untyped-call]
    return result
