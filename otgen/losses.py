"""GeomLoss's SamplesLoss on otgen's engine: the same arguments, the same cost ½|x − y|², the same number."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from otgen import opaque
from otgen.errors import ConvergenceWarning, InputError, UsageError, unknown
from otgen.solvers import schedule
from otgen.solvers.batch import BatchResult, batch_modes, solve_sample_batch
from otgen.solvers.batch_inputs import GivenBatch, centre_batch
from otgen.solvers.engine import METHODS
from otgen.solvers.inputs import centre
from otgen.solvers.labels import labelled
from otgen.solvers.listed import listed
from otgen.solvers.options import count_of, positive, precision_modes, tolerance
from otgen.solvers.problems import Problem, Solved, count, problem_of, renamed
from otgen.solvers.result import OTResult
from otgen.solvers.sample import solve_sample
from otgen.solvers.schedule import Schedule
from otgen.solvers.steps import Steps
from otgen.tracing import Options, is_traced

BACKENDS = ("auto", "tensorized", "online", "multiscale")

SCHEDULE_TOL = 1e-5
"""The marginal error that the precision of a schedule must leave within reach, for it has no tolerance of its own."""


class SamplesLoss(Options):
    """The Sinkhorn divergence, or the entropic transport cost, of two weighted samples, for C = ½|x − y|².

    ``loss(x, y)`` and ``loss(a, x, b, y)`` with points (n, d), (m, d) and weights (n,), (m,) give a scalar; with (B, n, d),
    (B, m, d), (B, n), (B, m) they give (B,): each step of all problems is one launch, under the one schedule of their common
    diameter. Torch tensors, any device; half precision is computed and answered in float32. Weights are uniform with mass 1 when
    left out, and never normalised.

    The first fourteen arguments are GeomLoss's, in its order and with its defaults:

    loss, p          "sinkhorn" and 2; for others: geomloss.SamplesLoss
    blur             σ, with eps = σ²;  reach  τ: marginals may be missed at the price ρ·KL with ρ = τ²; None: they must fit
    diameter         where the schedule starts; None: the diagonal of the box around the points
    scaling          between two values of blur in the schedule
    cost, kernel     None; for others: geomloss.SamplesLoss
    debias           the divergence OT(α, β) − OT(α, α)/2 − OT(β, β)/2, with masses of any size
    potentials       return (F, G) instead: (n,), (m,), or (B, n), (B, m), in units of C; f_ab − f_aa and g_ab − g_bb when debiased.
                     Differentiable as GeomLoss's are: each in its own point, x_i or y_j, through the last full update alone
    backend          "auto", "tensorized", "online" and "multiscale" mean the same here. truncate, cluster_scale and verbose, which
                     steer GeomLoss's multiscale backend, have no effect: nothing is truncated, and nothing printed

    By keyword alone:

    tol, max_iter    solve until this marginal error, a share of the mass, or for so many iterations (`otgen.solve_sample`)
    method           "auto": GeomLoss's schedule, or with tol or max_iter what solve_sample takes. "symmetric": the schedule, or
                     with tol or max_iter averaged updates. "alternating", "anderson", "newton": solve_sample's, with its tol and
                     max_iter; newton takes no batches
    warm_start       with tol: start from the potentials of the last call, where the shapes are the same
    precision        as in solve_sample
    reach_x, reach_y each marginal its own; `reach` for one left out; a debiased loss with two that differ may be negative
    half_cost        False: C = |x − y|², with eps = blur² and ρ = reach² for that cost
    eps              eps itself, instead of blur²
    use_epsilon_scaling  False: n_iters updates at eps, instead of a schedule
    n_iters          how many updates. One that cuts a schedule short of eps is a ConvergenceWarning
    eps_list         the schedule itself
    last_extrapolation   False: leave out the full update at the end
    threshold, inner_iterations  stop when no potential changed by `threshold`, in units of C, between two checks, made after every
                     `inner_iterations`-th update at the last eps; a ConvergenceWarning when that did not come about
    allow_tf32       False: precision="fp32" for float32 points
    label_cost_matrix, lambda_x, lambda_y    W (classes, classes), symmetric: C = s·(lambda_x·|x − y|² + lambda_y·W[k, l]) for
                     points of classes k and l, given at the call as integers label_x (n,) and label_y (m,), or (B, n) and (B, m);
                     s is half_cost's. Without W, or with lambda_y = 0, there are no labels

    Without tol, max_iter or a method, the number is GeomLoss's, converged or not: <a, f_ab − f_aa> + <b, g_ab − g_bb>, relaxed
    (ρ + eps/2)·<a, exp(−f_aa/ρ) − exp(−f_ab/ρ)> and likewise in b. `last_result.marginal_error` says how far the plan is from its
    marginals. Gradients in x, y, a and b are those of the last full update, as in GeomLoss; relaxed, GeomLoss's are too small by
    the factor (ρ + eps/2)/(ρ + eps) and these are not. A second derivative in the points is there with
    tol, max_iter or a method, and refused of a schedule.

    `last_result` is the OTResult of the last call, the BatchResult for a batch, None before the first; detached, and in units of
    |x − y|²: reg = 2·eps, and potentials and value are twice those of the loss (half_cost=False: the same). It is not copied or
    saved with the module.

    Attributes may be changed between calls. Raises UsageError for options, InputError for data (both are ValueErrors) that make no
    problem.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Any = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        reach_x: float | None = None,
        reach_y: float | None = None,
        half_cost: bool = True,
        precision: str = "auto",
        method: str = "auto",
        warm_start: bool = False,
        eps: float | None = None,
        n_iters: int | None = None,
        eps_list: Sequence[float] | None = None,
        use_epsilon_scaling: bool = True,
        last_extrapolation: bool = True,
        threshold: float | None = None,
        inner_iterations: int = 10,
        allow_tf32: bool = True,
        label_cost_matrix: Any = None,
        lambda_x: float = 1.0,
        lambda_y: float = 0.0,
    ) -> None:
        super().__init__()
        self.label_cost_matrix, self.lambda_x, self.lambda_y = label_cost_matrix, lambda_x, lambda_y
        self.loss, self.p, self.backend, self.cost, self.kernel = loss, p, backend, cost, kernel
        self.blur, self.reach, self.reach_x, self.reach_y = blur, reach, reach_x, reach_y
        self.diameter, self.scaling, self.eps, self.eps_list = diameter, scaling, eps, eps_list
        self.truncate, self.cluster_scale, self.verbose = truncate, cluster_scale, verbose
        self.debias, self.potentials, self.half_cost = debias, potentials, half_cost
        self.tol, self.max_iter, self.method, self.warm_start = tol, max_iter, method, warm_start
        self.n_iters, self.use_epsilon_scaling, self.last_extrapolation = n_iters, use_epsilon_scaling, last_extrapolation
        self.threshold, self.inner_iterations = threshold, inner_iterations
        self.precision, self.allow_tf32 = precision, allow_tf32
        self._solved: Solved | None = None
        self._check()
        self._freeze()

    @property
    def last_result(self) -> OTResult | BatchResult | None:
        """What the last call solved; the marginals of a schedule's plan take a sweep when it is first asked for."""
        return None if self._solved is None else self._solved.result

    def forward(self, *args: Tensor | None, label_x: Any = None, label_y: Any = None) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of (x, y) or (a, x, b, y), or its potentials; with the classes of the points where there are label costs."""
        if is_traced():
            return opaque.call(self, args, label_x, label_y)
        problem, self._solved = self._solve(args, label_x, label_y)
        return self._solved.potentials(problem) if self.potentials else self._solved.value(problem)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"blur": self.blur} if self.eps is None else {"eps": self.eps}
        names = ("reach", "reach_x", "reach_y", "tol", "max_iter", "n_iters")
        shown |= {name: value for name in names if (value := getattr(self, name)) is not None}
        shown |= {"scaling": self.scaling, "debias": self.debias}
        if self.method != "auto":
            shown["method"] = self.method
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_solved": None}

    def _solve(self, args: tuple[Tensor | None, ...], label_x: Any, label_y: Any) -> tuple[Problem, Solved]:
        self._check()
        problem = renamed(problem_of, args, self._labels(label_x, label_y))
        return problem, renamed(self._to_tol if self._to_tolerance else self._scheduled, problem)

    def _scheduled(self, problem: Problem) -> Solved:
        started, given, batched = time.perf_counter(), problem.given, problem.batched
        balanced = all(math.isinf(rho) for rho in self._rho)
        clouds = centre_batch(given, balanced=balanced) if isinstance(given, GivenBatch) else centre(given, balanced=balanced)
        clouds = labelled(clouds, problem.labels)
        plan = self._schedule(problem)
        admissible, eps = batch_modes if batched else precision_modes, plan.eps[-1]
        modes = admissible(self._precision(problem), clouds, eps, SCHEDULE_TOL)
        found = schedule.solve(listed(Steps(clouds, eps, modes, *self._rho), 0.0), plan, debias=self.debias)
        if any(end.met is False for end in found.ends):
            _warn(
                f"potentials still changed by threshold={self.threshold:g} or more, or were not compared; repeat the last eps in "
                "eps_list, or type tol=1e-3 instead of threshold"
            )
        return Solved(self._unit, given, time.perf_counter() - started, found)

    def _to_tol(self, problem: Problem) -> Solved:
        """By solve_sample, from the potentials of the call before."""
        given = problem.given
        limits: dict[str, Any] = {name: value for name in ("tol", "max_iter") if (value := getattr(self, name)) is not None}
        solve: Any = solve_sample_batch if problem.batched else solve_sample
        result = solve(
            *(None if tensor is None else tensor.detach() for tensor in (problem.x, problem.y, problem.a, problem.b)),
            reg=self._eps / self._unit,
            unbalanced=tuple(None if math.isinf(rho) else rho for rho in self._rho),
            debias=self.debias,
            method=self.method,
            precision=self._precision(problem),
            potentials_init=self._solved.start(given) if self.warm_start and self._solved else None,
            **problem.label_options,
            **limits,
        )
        return Solved(self._unit, given, result.seconds, result._divergence, result)

    def _precision(self, problem: Problem) -> str:
        exact = not self.allow_tf32 and self.precision == "auto" and problem.x.dtype != torch.float64
        return "fp32" if exact else self.precision

    @property
    def _unit(self) -> float:
        """The cost in units of the engine's |x − y|² + labels."""
        return (0.5 if self.half_cost else 1.0) * (positive("lambda_x", self.lambda_x) if self._labelled else 1.0)

    @property
    def _labelled(self) -> bool:
        return self.label_cost_matrix is not None and self.lambda_y != 0.0

    def _labels(self, label_x: Any, label_y: Any) -> tuple[Any, Any, Any]:
        """(classes of x, of y, the cost between classes in units of the engine's); None for each when there are none."""
        if self.label_cost_matrix is None and (label_x is not None or label_y is not None):
            raise InputError("expected label_cost_matrix with label_x and label_y; got None; pass it to SamplesLoss")
        if not self._labelled:
            return None, None, None
        if not isinstance(self.label_cost_matrix, Tensor):
            came = type(self.label_cost_matrix).__name__
            raise InputError(f"expected a torch tensor for label_cost_matrix; got {came}; type torch.as_tensor(label_cost_matrix)")
        return label_x, label_y, self.label_cost_matrix * (self.lambda_y / self.lambda_x)

    @property
    def _eps(self) -> float:
        return positive("blur", self.blur) ** 2 if self.eps is None else positive("eps", self.eps)

    @property
    def _rho(self) -> tuple[float, float]:
        """In units of |x − y|²."""
        sides = {"reach_x": self.reach_x, "reach_y": self.reach_y}
        found = [("reach", self.reach) if own is None else (name, own) for name, own in sides.items()]
        one, other = (math.inf if reach in (None, math.inf) else positive(name, reach) ** 2 / self._unit for name, reach in found)
        return one, other

    @property
    def _to_tolerance(self) -> bool:
        return self.tol is not None or self.max_iter is not None or self.method not in ("auto", "symmetric")

    def _schedule(self, problem: Problem) -> Schedule:
        n_iters = None if self.n_iters is None else count("n_iters", self.n_iters)
        if self.eps_list is not None:
            found = tuple(positive(f"eps_list[{i}]", eps) for i, eps in enumerate(self.eps_list))
        elif self.use_epsilon_scaling:
            first = problem.diameter if self.diameter is None else positive("diameter", self.diameter)
            found = schedule.geometric(first, math.sqrt(self._eps), self.scaling)
        else:
            found = (self._eps,) * cast(int, n_iters)
        used = found[:n_iters]
        if used[-1] != found[-1]:
            _warn(
                f"n_iters={n_iters} cuts the schedule of {len(found)} updates at eps={used[-1]:.3g}, before {found[-1]:.3g}; "
                f"type n_iters={len(found)}, a smaller scaling, or tol=1e-3 instead"
            )
        threshold = None if self.threshold is None else positive("threshold", self.threshold) / self._unit
        eps = tuple(eps / self._unit for eps in used)
        return Schedule(eps, self.last_extrapolation, threshold, count("inner_iterations", self.inner_iterations))

    def _check(self) -> None:
        """Raise UsageError or InputError for options that exclude one another, or that otgen does not have."""
        for name, only in (("loss", "sinkhorn"), ("p", 2), ("cost", None), ("kernel", None)):
            value = getattr(self, name)
            if value is not only and (only is None or value != only):
                raise UsageError(f"expected {name}={only!r}; got {value!r}; type geomloss.SamplesLoss({name}=…) for that")
        if self.backend not in BACKENDS:
            raise UsageError(
                f"expected backend to be one of {', '.join(map(repr, BACKENDS))}; got {self.backend!r}; "
                "type method='symmetric' or method='alternating' for flash-sinkhorn's"
            )
        if self.method not in ("auto", *METHODS):
            raise unknown("method", str(self.method), ["auto", *METHODS])
        if not isinstance(self.scaling, (int, float)) or not 0.0 < self.scaling < 1.0:
            raise InputError(f"expected scaling between 0 and 1; got {self.scaling!r}; type for example scaling=0.5")
        if not self._labelled and self.label_cost_matrix is None and (self.lambda_x, self.lambda_y) != (1.0, 0.0):
            raise UsageError("expected label_cost_matrix with lambda_x or lambda_y; got None; pass the matrix, or scale the points")
        _ = self._unit
        if self._labelled and not math.isfinite(self.lambda_y):
            raise InputError(f"expected a finite lambda_y; got {self.lambda_y!r}; type for example lambda_y=1.0")
        if not self.allow_tf32 and self.precision not in ("auto", "fp32", "fp64"):
            raise UsageError(f"expected precision='fp32' with allow_tf32=False; got {self.precision!r}; leave one of them out")
        if self.warm_start and not self._to_tolerance:
            raise UsageError("expected tol with warm_start=True; got a schedule, which starts afresh; type tol=1e-3")
        if self.eps_list is not None and len(self.eps_list) == 0:
            raise UsageError("expected at least one value in eps_list; got none; leave eps_list out for GeomLoss's schedule")
        if not self.use_epsilon_scaling and self.eps_list is None and self.n_iters is None and not self._to_tolerance:
            raise UsageError("expected n_iters with use_epsilon_scaling=False; got None; type for example n_iters=100, or tol=1e-3")
        if self._to_tolerance:
            self._refuse_schedule()
        _ = self._eps, self._rho, tolerance(self.tol or 0), count_of(1 if self.max_iter is None else self.max_iter)

    def _refuse_schedule(self) -> None:
        given = {
            "n_iters": self.n_iters is not None,
            "eps_list": self.eps_list is not None,
            "threshold": self.threshold is not None,
            "last_extrapolation": not self.last_extrapolation,
        }
        for name in (name for name, came in given.items() if came):
            raise UsageError(
                f"expected a schedule for {name}; got tol, max_iter or a method; type tol= and max_iter= alone, or neither"
            )


def _warn(message: str) -> None:
    warnings.warn(message, ConvergenceWarning, stacklevel=2)
