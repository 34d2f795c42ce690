"""Many transport problems side by side: every step of all of them is one launch, and each stops when it is done."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otgen.errors import ConvergenceWarning, InputError, Unsupported, UsageError, unknown
from otgen.problem import Value
from otgen.solvers import options
from otgen.solvers.batch_inputs import GivenBatch, Side, centre_batch, index_of, read_batch, regularisations
from otgen.solvers.engine import METHODS, Callback, Course, divergence, precision_of
from otgen.solvers.inputs import Clouds, as_tensor
from otgen.solvers.kernels import kernels_of
from otgen.solvers.labels import Labels, labelled, read_labels
from otgen.solvers.result import LOGGED, OTResult, how
from otgen.solvers.solution import Divergence
from otgen.solvers.steps import Steps
from otgen.solvers.value import DualValue
from otgen.solvers.verdict import complaint, least_error


def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    *,
    batch_a: Any = None,
    batch_b: Any = None,
    reg: Any = None,
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    debias: bool = False,
    method: str = "auto",
    max_iter: int = 2000,
    tol: float = 1e-3,
    potentials_init: tuple[Any, Any] | None = None,
    grad: str = "envelope",
    blur: Any = None,
    reach: Any = None,
    scaling: float | None = None,
    labels_a: Any = None,
    labels_b: Any = None,
    label_cost: Any = None,
    precision: str = "auto",
    variant: Mapping[str, Value] | str = "auto",
    tune: str = "cache",
    callback: Callback | None = None,
    verbose: bool = False,
) -> BatchResult:
    """`otgen.solve_sample` for each of a batch of problems, in one launch per step for all that have not reached `tol` yet.

    X_a, X_b          (batch, n, d), (batch, m, d); or clouds of any sizes one after the other, (N, d), (M, d), with
    batch_a, batch_b  (N,), (M,) integers from 0: the problem each point belongs to, in any order. Every problem has points on both
                      sides
    a, b              (batch, n), (batch, m), or (N,), (M,) weights; uniform with mass 1 in each problem when left out
    reg, blur         a number for all problems, or one for each
    labels_a, labels_b   classes, shaped as the weights
    potentials_init   (f, g) shaped as the weights, for instance the `potentials` of another result
    precision         "auto" takes the fastest mode that is accurate enough for the hardest of the problems
    scaling           each problem goes through stages from its own R²
    callback          told the iterations done, and the largest marginal error of the problems that still ran; so is `verbose`

    All else is as in `otgen.solve_sample`, for each problem: what is said there of iterations, error and stop is said by entries of
    the result's arrays. Memory is that of the largest problem times the number of problems, O((n + m) d) each.
    One ConvergenceWarning speaks for all. Raises InputError and UsageError as it does, naming the problem.
    """
    started = time.perf_counter()
    if method != "auto" and method not in METHODS:
        raise unknown("method", str(method), ["auto", *METHODS])
    if method == "newton":
        raise UsageError("expected a method that takes batches; got 'newton', which takes one problem; type method='anderson'")
    detached, tune = options.gradient(grad) == "detach", options.tuning(tune)
    if grad == "implicit":
        raise Unsupported("expected grad='envelope' or 'detach' for a batch; got 'implicit'; type solve_sample for each")
    rho_a, rho_b = options.relaxation(unbalanced, unbalanced_type, reach)
    limits = options.tolerance(tol), options.count_of(max_iter)
    ratio, method = options.stage_ratio(scaling, potentials_init), "anderson" if method == "auto" else method
    given = read_batch(X_a, X_b, a, b, batch_a, batch_b)
    labels = _labels(given, read_labels(labels_a, labels_b, label_cost, given.x.laid, given.y.laid, numpy=given.numpy))
    clouds = labelled(centre_batch(given, balanced=math.isinf(rho_a) and math.isinf(rho_b)), labels)
    eps = regularisations(reg, blur, clouds)

    def modes(name: str) -> tuple[str, ...]:
        return batch_modes(name, clouds, eps, limits[0])

    kernels, admissible = kernels_of(variant, tune, method, clouds, precision, modes)
    steps = Steps(clouds, eps, admissible, rho_a, rho_b)
    course = Course(*limits, options.told(callback, verbose, started), ratio, kernels)
    pair, finer = _pair(given, potentials_init), precision == "auto"
    found = divergence(method, steps, pair, course, debias=debias, finer=finer)
    worth = batch_value(found, given)
    result = BatchResult(found, given, worth.detach() if detached else worth, time.perf_counter() - started)
    if verbose:
        print(result)
    if said := _complaint(result, steps, course.tol, precision_of(found.cross.choice)):
        warnings.warn(said, ConvergenceWarning, stacklevel=options.caller())
    return result


class BatchResult:
    """The solved problems of a batch. ``result[i]`` is the `OTResult` of the i-th, with all that it offers; ``len(result)``.

    Arrays over problems are (batch,); arrays over points are shaped as the weights that were, or could have been, given:
    (batch, n), or (N,) for clouds of different sizes. Only `value` is differentiable, twice.

    value           (batch,);  potential_a, potential_b, potentials, marginal_a, marginal_b, value_linear, a_to_b, b_to_a, as of an
                    OTResult, each in one sweep for all
    marginal_error, n_iters, passes, stop, converged    numpy arrays (batch,)
    errors          (looks, batch), with NaN after a problem's end; the full step that ends a symmetric solve is a look of its own
    log, precision, variant, cache  as of an OTResult
    """

    def __init__(self, divergence: Divergence, given: GivenBatch, value: Tensor, seconds: float) -> None:
        self._divergence, self._given = divergence, given
        self._solution = divergence.cross
        outcomes = [part.outcome for part in divergence.solutions]
        missed = np.stack([outcome.stop != "tol" for outcome in outcomes])
        errors = np.stack([outcome.error for outcome in outcomes])
        worst = np.where(missed.any(0) & ~missed, -1.0, np.nan_to_num(errors, nan=np.inf)).argmax(0)
        each = np.arange(len(given))
        self.value: Any = given.answer(value)
        self.reg: Any = given.answer(torch.as_tensor(self._solution.eps).to(value).expand(len(given), 1)[:, 0])
        self.marginal_error: np.ndarray = errors[worst, each]
        self.stop: np.ndarray = np.stack([outcome.stop for outcome in outcomes])[worst, each]
        self.n_iters: np.ndarray = self._solution.outcome.n_iters
        self.passes: np.ndarray = sum(outcome.passes for outcome in outcomes)
        self.seconds = seconds
        self.precision, self.variant, self.cache = how(self._solution)

    @property
    def converged(self) -> np.ndarray:
        """(batch,), whether the marginal error asked for was reached."""
        return np.asarray(self.stop == "tol")

    @cached_property
    def errors(self) -> Any:
        """(looks, batch), of the plans between a and b."""
        return self._given.answer(torch.from_numpy(self._solution.outcome.looks).to(self._solution.clouds.x.device))

    @property
    def log(self) -> dict[str, Any]:
        """As `OTResult.log`."""
        return {name: getattr(self, name) for name in LOGGED}

    @cached_property
    def value_linear(self) -> Any:
        """<P, C> (batch,)."""
        return self._given.answer(self._solution.linear_cost())

    @cached_property
    def potential_a(self) -> Any:
        """f, in units of the cost."""
        return self._laid_out(self._given.x, self._solution.f)

    @cached_property
    def potential_b(self) -> Any:
        """g, in units of the cost."""
        return self._laid_out(self._given.y, self._solution.g)

    @property
    def potentials(self) -> tuple[Any, Any]:
        """(f, g)."""
        return self.potential_a, self.potential_b

    @cached_property
    def marginal_a(self) -> Any:
        """r = P·1."""
        return self._laid_out(self._given.x, self._solution.outcome.r.clone())

    @cached_property
    def marginal_b(self) -> Any:
        """c = Pᵀ·1."""
        return self._laid_out(self._given.y, self._solution.outcome.c.clone())

    @cached_property
    def a_to_b(self) -> Any:
        """Where each point of X_a goes on average, shaped like X_a."""
        return self._laid_out(self._given.x, self._solution.barycentres())

    @cached_property
    def b_to_a(self) -> Any:
        """Where each point of X_b comes from on average, shaped like X_b."""
        return self._laid_out(self._given.y, self._solution.barycentres(transposed=True))

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, i: int) -> OTResult:
        """The i-th problem's result; negative i count from the end. Raises IndexError."""
        i = index_of(i, len(self))
        n, m = self._sizes[i]
        value = torch.as_tensor(self.value)[i]
        return OTResult(self._divergence.part(i), self._given.part(i, n, m), value, self.seconds)

    def __iter__(self) -> Iterator[OTResult]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        worst = int(np.nan_to_num(self.marginal_error, nan=np.inf).argmax())
        done = int(self.converged.sum())
        return (
            f"BatchResult({len(self)} problems, {done} stopped by tol, largest marginal error {self.marginal_error[worst]:.1e}, "
            f"{int(self.n_iters.max())} iterations, {self.seconds:.3g} s)"
        )

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        return list(zip(self._given.x.counts.tolist(), self._given.y.counts.tolist()))

    def _laid_out(self, side: Side, values: Tensor) -> Any:
        return self._given.answer(side.laid_out(values))


def batch_value(divergence: Any, given: GivenBatch) -> Tensor:
    """(batch,): the dual objectives, differentiable in the caller's points and weights."""
    x, y = given.x, given.y
    result: Tensor = DualValue.apply(divergence, x.points, y.points, x.weights, y.weights)  # type: ignore[no-untyped-call]
    return result


def batch_modes(precision: str, clouds: Clouds, eps: Tensor | float, tol: float) -> tuple[str, ...]:
    """The precision modes that are admissible for the hardest problem of a batch. Raises as `precision_modes` does."""
    needed = torch.as_tensor(eps).to(clouds.radius).expand_as(clouds.radius)
    hardest = int((clouds.radius.square() / needed).argmax())
    return options.precision_modes(precision, replace(clouds, radius=float(clouds.radius[hardest])), float(needed[hardest]), tol)


def _labels(given: GivenBatch, labels: Labels | None) -> Labels | None:
    """The caller's labels, padded as the points are."""
    return labels and Labels(given.x.padded(labels.a), given.y.padded(labels.b), labels.cost)


def _pair(given: GivenBatch, potentials: tuple[Any, Any] | None) -> tuple[Tensor, Tensor] | None:
    """The potentials to start from, padded, in units of the cost."""
    if potentials is None:
        return None
    if not isinstance(potentials, (tuple, list)) or len(potentials) != 2:
        raise InputError(f"expected a pair (f, g) for potentials_init; got {type(potentials).__name__}; type result.potentials")
    found = []
    for side, potential in zip((given.x, given.y), potentials):
        tensor = as_tensor("potentials_init", potential, given.numpy).detach().to(side.points)
        shape = side.points.shape[:2] if side.places is None else side.places[0].shape
        if tensor.shape != shape or not bool(tensor.isfinite().all()):
            came = f"{tuple(tensor.shape)}" if tensor.shape != shape else "NaN or infinite ones"
            raise InputError(f"expected finite potentials of shape {tuple(shape)}; got {came}; leave potentials_init out")
        found.append(side.padded(tensor).contiguous())
    return found[0], found[1]


def _complaint(result: BatchResult, steps: Steps, tol: float, mode: str) -> str:
    """What a warning says of the worst problem that missed the tolerance, or else of the hardest one; empty if all is well."""
    least = least_error(steps.clouds, steps.eps, mode)
    missed = ~result.converged
    i = (
        int(np.where(missed, np.nan_to_num(result.marginal_error, nan=np.inf), -1.0).argmax())
        if missed.any()
        else int(least.argmax())
    )
    one = result[i]
    said = complaint(one, one._solution.clouds, tol, float(least[i]))
    if not said:
        return ""
    return (
        f"{int(missed.sum())} of {len(result)} problems missed tol={tol:g}; problem {i}: {said}"
        if missed.any()
        else f"problem {i}: {said}"
    )
