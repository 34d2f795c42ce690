"""What a solve returns."""

from __future__ import annotations

from typing import Any

import torch

from otgen.errors import InputError
from otgen.problem import Variant
from otgen.solvers import operator as operators
from otgen.solvers import plan as plans
from otgen.solvers import second, trust
from otgen.solvers.differentiable import differentiable, kept
from otgen.solvers.inputs import Given
from otgen.solvers.operator import LazyPlan, PlanOperator
from otgen.solvers.semidual import DualPotentials
from otgen.solvers.sinkhorn import Stop
from otgen.solvers.solution import Divergence, Solution

LOGGED = ("errors", "n_iters", "passes", "stop", "seconds", "precision", "variant", "cache")
"""What a result's `log` has."""

SKIPPED = ("visited", "omitted_mass")
"""What the `log` of a single problem has too."""


class OTResult:
    """A solved entropic transport problem between X_a (n, d) and X_b (m, d), with C = |x − y|².

    Potentials follow GeomLoss and FlashSinkhorn, weights outside:  P_ij = a_i b_j exp((f_i + g_j − C_ij)/reg); here the letters are
    `potential_a` and `potential_b`. The attributes `f` and `g` are OTT's, weights inside: f + reg·log a, g + reg·log b. Answers
    have the kind and device of X_a; they are float64 for float64 points, and float32 for all others, half precision included,
    whose range they could leave. What needs a further sweep is computed when first asked for, and kept. Nothing but `value` is
    differentiable; gradients have the dtype of the leaf. With grad="implicit" potentials, products with the plan, marginals, maps,
    costs, `plan` and `density` are too, once, in points and weights, as functions of the exact solution (`otgen.solvers.implicit`).
    Potentials of a balanced problem are, of all (f + t, g − t), those with <a, f>/Σa = <b, g>/Σb.

    value           <a, f> + <b, g> − reg·Σ(P − a⊗b), the dual objective: at the solution <P, C> + reg·KL(P | a⊗b). Its gradient
                    is 2(r∘x − P y) in x, likewise in y, f + reg·(Σb − 1) in a and g + reg·(Σa − 1) in b: potentials are defined
                    up to (f + t, g − t), so only changes of weights that keep the masses equal have a meaning. Differentiable
                    twice, in the points also by `hvp`. Unbalanced, ρ·(1 − exp(−f/ρ)) stands for f, and ρ·KL(P·1 | a),
                    likewise for b, comes in.
                    Debiased, OT(a,b) − OT(a,a)/2 − OT(b,b)/2 + reg/2·(Σa − Σb)²; all else is that of the plan between a and b,
                    but for marginal_error and stop, which are the worst of the three problems', and passes, which add up
    marginal_error  (Σ|r − a| + Σ|c − b|) as a share of the mass, for the plan's marginals r = P·1, c = Pᵀ·1 (but after a symmetric
                    solve c = b, or r = a): how much of it is in the wrong place. Unbalanced, a·exp(−f/ρ) stands for a
    n_iters         updates of the pair of potentials;  passes  sweeps over the n × m pairs that they took
    stop            "tol"; "max_iter"; "precision floor", rounding kept the error from falling any further; or "nan", the sums did
                    not fit the range of the dtype
    precision       how coordinates were multiplied: "fp64", "fp32", or a tensor-core mode of `otgen.precision`
    variant, cache  the kernel's variant and where dispatch had it from (`otgen.dispatch`); None in streamed PyTorch
    seconds         wall time of the solve
    visited         share of the pairs that its last sweep visited;  omitted_mass  at most the mass of the plan that it left out:
                    1 and 0 where no tiles are skipped (`otgen.listed`)
    """

    def __init__(
        self, divergence: Divergence, given: Given, value: torch.Tensor, seconds: float, *, implicit: bool = False
    ) -> None:
        self._divergence, self._given = divergence, given
        self._solution = solution = divergence.cross
        self._answers = differentiable(divergence, given.x, given.y, given.a, given.b) if implicit else divergence
        self._answer = self._answers.cross
        self._recorded = torch.is_grad_enabled()
        outcomes = [part.outcome for part in divergence.solutions]
        worst = max(outcomes, key=lambda outcome: (outcome.stop != "tol", outcome.error))
        self.reg = float(solution.eps)
        self.unbalanced: tuple[float, float] = (solution.steps.rho_a, solution.steps.rho_b)
        self.value: Any = given.answer(value)
        self._value = value.detach().clone()
        self.marginal_error: float = worst.error
        self.n_iters: int = solution.outcome.n_iters
        self.passes: int = sum(outcome.passes for outcome in outcomes)
        self.stop: Stop = worst.stop
        self.seconds = seconds
        self.visited: float = solution.outcome.visited
        self.omitted_mass: float = max(outcome.omitted for outcome in outcomes)
        self.precision, self.variant, self.cache = how(solution)

    @property
    def converged(self) -> bool:
        """Whether the marginal error asked for was reached."""
        return self.stop == "tol"

    @property
    def status(self) -> str:
        """How the solve ended, in a clause."""
        return f"stopped by {self.stop} after {self.n_iters} iterations with a marginal error of {self.marginal_error:.1e}"

    @kept
    def errors(self) -> Any:
        """(looks,): the marginal error whenever it was looked at, of the plan between a and b, stages left out. OTT's name."""
        looks = torch.from_numpy(self._solution.outcome.looks)
        return self._given.answer(looks.to(self._solution.clouds.x.device))

    @property
    def log(self) -> dict[str, Any]:
        """POT's name for how it went: the attributes `errors`, `n_iters`, `passes`, `stop`, `seconds`, `precision`, `variant`,
        `cache`, `visited` and `omitted_mass`, by name."""
        return {name: getattr(self, name) for name in LOGGED + SKIPPED}

    @kept
    def value_linear(self) -> Any:
        """<P, C>."""
        return self._given.answer(self._linear_cost)

    @kept
    def _linear_cost(self) -> torch.Tensor:
        return self._answer.linear_cost()

    @kept
    def potential_a(self) -> Any:
        """f (n,), in units of the cost."""
        return self._given.answer(self._answer.f)

    @kept
    def potential_b(self) -> Any:
        """g (m,), in units of the cost."""
        return self._given.answer(self._answer.g)

    @kept
    def potential_aa(self) -> Any:
        """(n,) potential of X_a's transport to itself; None unless debiased."""
        own = self._answers.own_a
        return None if own is None else self._given.answer(own.f)

    @kept
    def potential_bb(self) -> Any:
        """(m,) potential of X_b's transport to itself; None unless debiased."""
        own = self._answers.own_b
        return None if own is None else self._given.answer(own.g)

    @property
    def potentials(self) -> tuple[Any, Any]:
        """(f, g)."""
        return self.potential_a, self.potential_b

    @kept
    def marginal_a(self) -> Any:
        """r = P·1 (n,)."""
        return self._given.answer(self._answer.r.clone())

    @kept
    def marginal_b(self) -> Any:
        """c = Pᵀ·1 (m,)."""
        return self._given.answer(self._answer.c.clone())

    @property
    def marginals(self) -> tuple[Any, Any]:
        """(P·1, Pᵀ·1)."""
        return self.marginal_a, self.marginal_b

    @kept
    def a_to_b(self) -> Any:
        """(n, d): where each point of X_a goes on average, (P y)_i / r_i; points of zero weight go where they would."""
        return self._given.answer(self._answer.barycentres())

    @kept
    def b_to_a(self) -> Any:
        """(m, d): where each point of X_b comes from on average, (Pᵀ x)_j / c_j."""
        return self._given.answer(self._answer.barycentres(transposed=True))

    def apply(self, v: Any, axis: int = 0) -> Any:
        """Pᵀ·v for axis = 0 (v (n,) or (n, k) → (m,) or (m, k)), P·v for axis = 1 (m → n): the sum is over `axis`, as in OTT.

        Raises InputError when `v` does not fit, or `axis` is not 0 or 1.
        """
        cure = f"axis={1 - _axis(axis)}"
        return operators.product(self._answer, self._given, v, axis == 0, f" for axis={axis}", cure)

    def marginal(self, axis: int) -> Any:
        """The sum of P over `axis`, as in OTT: Pᵀ·1 (m,) for 0, P·1 (n,) for 1. Raises InputError for another axis."""
        return self.marginal_a if _axis(axis) == 1 else self.marginal_b

    @kept
    def plan(self) -> Any:
        """P (n, m), dense. Raises InputError above `otgen.solvers.operator.PLAN_LIMIT` bytes."""
        n, m = self.plan_operator.shape
        cure = "result.apply(v, axis=1) for P·v, or result.a_to_b for the map"
        operators.require_room("plan", n, m, self._solution, cure)
        return self._given.answer(self._answer.plan())

    @kept
    def lazy_plan(self) -> LazyPlan:
        """P (n, m), any block of which is computed when it is asked for: `lazy_plan[i0:i1, j0:j1]`. POT's name."""
        return LazyPlan(self._solution, self._given)

    @kept
    def plan_operator(self) -> PlanOperator:
        """P (n, m) as a linear map, `plan_operator @ v` and `plan_operator.T @ u`. GeomLoss 0.3's name."""
        return PlanOperator(self._answer, self._given)

    @kept
    def density(self) -> Any:
        """exp((f_i + g_j − C_ij)/reg) (n, m), dense: P with respect to a⊗b, at points without weight too. GeomLoss 0.3's name.

        Raises InputError above `otgen.solvers.operator.PLAN_LIMIT` bytes.
        """
        n, m = self.plan_operator.shape
        cure = "result.lazy_plan[i0:i1] / (a[i0:i1, None] * b) for rows of it"
        operators.require_room("density", n, m, self._solution, cure)
        return self._given.answer(self._answer.density())

    @kept
    def f(self) -> Any:
        """(n,): OTT's potential, the weight inside, P_ij = exp((f_i + g_j − C_ij)/reg): potential_a + reg·log a, −∞ for a = 0."""
        return self._given.answer(operators.folded(self._answer.f, self._answer.a, self.reg))

    @kept
    def g(self) -> Any:
        """(m,): potential_b + reg·log b."""
        return self._given.answer(operators.folded(self._answer.g, self._answer.b, self.reg))

    @kept
    def transport_mass(self) -> Any:
        """ΣP, 1 for balanced weights of mass 1. OTT's name."""
        return self._given.answer(self._answer.r.sum(dtype=torch.float64))

    @property
    def primal_cost(self) -> Any:
        """<P, C>: OTT's name for `value_linear`."""
        return self.value_linear

    @kept
    def dual_cost(self) -> Any:
        """<a, f> + <b, g> for OTT's potentials `f` and `g`, in units of the cost.

        Balanced and solved, it is `value` + reg·(Σ a log a + Σ b log b) for masses of 1. As in OTT nothing is put in for relaxed
        marginals, so it is then no bound on anything: that is `value`.
        """
        return self._given.answer(operators.dual_cost(self._answer))

    @kept
    def entropy(self) -> Any:
        """−Σ P log P, in nats, with 0·log 0 = 0: OTT's convention, for plans of any mass. One sweep, shared with value_linear."""
        return self._given.answer(operators.entropy(self._answer, self._linear_cost))

    @property
    def citation(self) -> str:
        """The papers behind this result, in words and in BibTeX."""
        debiased, relaxed = self._divergence.own_a is not None, not self._solution.steps.balanced
        return operators.citation(debiased=debiased, relaxed=relaxed)

    def sample(self, k: int, generator: torch.Generator | None = None, *, replace: bool = True) -> tuple[Any, Any]:
        """(i, j), int64 (k,) each: k pairs of points drawn from P/ΣP, in O((n + m + k) d) memory; only the rows drawn are visited.

        generator  of the points' device; the same state gives the same pairs, whatever the number of threads. None: torch's own
        replace    False: distinct pairs, drawn one after the other, each from what is left of P, as numpy.random.choice does;
                   a few sweeps over the rows drawn, and one over all pairs when P has few of weight
        Points of zero weight are never drawn.
        Raises InputError for a plan without finite marginals, and for more distinct pairs than have weight.
        """
        return plans.sample(self._solution, self._given, k, generator, replace)

    def top_k(self, k: int) -> tuple[Any, Any]:
        """(values, indices), (n, k) each: the k largest P_ij of each row in descending order, and their j (int64). One sweep.

        Rows of zero weight have zeros for values, and the j of where they would go; equals come in any order.
        Raises InputError when k is not between 1 and m.
        """
        return plans.top_k(self._solution, self._given, k)

    def argmax(self) -> Any:
        """(n,), int64: the j of the largest P_ij of each row, the first of equals; of zero weight, where it would be. One sweep."""
        return plans.argmax(self._solution, self._given)

    def hvp(self, v: Any, v_b: Any = None, *, tol: float | None = None, log: bool = False) -> Any:
        """(n, d): the Hessian of `value` in X_a times a direction v (n, d), the derivative of its gradient as X_a moves along v.

        v_b  (m, d): X_b moves along with it; then the answer is a pair, the derivatives of both gradients, (n, d) and (m, d). A
             side that is None rests. Several directions, (k, n, d) and (k, m, d), share all sweeps but the last ones, 2K + 2 + k
        tol  relative residual of the linear systems, 1e-10 in float64 and 1e-6 in float32 when left out;  log  True: (answer, dict)
             with the "iterations" of conjugate gradients, their "residual", and the "passes" over the pairs, 2·iterations + 3

        Units: those of the cost per squared length, times v. Linear in v at any size, symmetric, exact at a solution: potentials
        with a marginal error e give an error of order e times the condition of the system, which grows as reg falls. Points of zero
        weight have zeros. Debiasing, relaxed marginals and label costs are those of `value`. Raises InputError for a direction that
        does not fit or is not finite, UsageError for none; a system that was not solved is a ConvergenceWarning. Formulas:
        docs/second_order.md.
        """
        return second.answered(self._divergence, self._given, v, v_b, tol, log)

    inverse_hvp = trust.inverse_hvp

    def to_dual_potentials(self) -> DualPotentials:
        """`.f(x)`, `.g(y)` and `.transport(x)` at points outside the sample (`otgen.solvers.semidual`)."""
        return DualPotentials(self._solution, self._given)

    def __repr__(self) -> str:
        clouds = self._solution.clouds
        n, m, d = len(clouds.x), len(clouds.y), clouds.dimension
        return (
            f"OTResult(value={float(self._value):.6g}, {n}×{m} points in {d}-D, reg={self.reg:g}, {self.precision}, "
            f"{self.status}, {self.seconds:.3g} s)"
        )


def how(solution: Solution) -> tuple[str, Variant | None, str | None]:
    """`precision`, `variant` and `cache` of a result."""
    choice = solution.choice
    if choice is None:
        return "fp64" if solution.clouds.x.dtype == torch.float64 else "fp32", None, None
    return {"ieee": "fp32"}.get(choice.precision, choice.precision), choice.variant, choice.cache


def _axis(axis: Any) -> int:
    if axis not in (0, 1):
        raise InputError(f"expected axis 0 (sums over X_a) or 1 (over X_b); got {axis!r}; type axis=1 for P·v")
    return int(axis)
