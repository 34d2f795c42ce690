"""Minibatch couplings for flow matching, with the signature of torchcfm's `OTPlanSampler` and without its matrix.

    x0, x1 = OTPlanSampler(reg=0.05).sample_plan(x0, x1)

torchcfm copies the costs of a minibatch to the CPU, solves in numpy and draws from the dense plan; here the problem is solved and
drawn from where the points are, tile by tile. Written against torchcfm 1.0.7.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otgen.errors import ConvergenceWarning, InputError, UsageError, unknown
from otgen.solvers.inputs import centre, read
from otgen.solvers.options import positive
from otgen.solvers.plan import check_generator, count, draw, follow
from otgen.solvers.result import OTResult
from otgen.solvers.sample import solve_sample
from otgen.solvers.semidual import c_transform

METHODS = ("sinkhorn", "unbalanced")

ELSEWHERE = {"exact": "ot.emd", "partial": "ot.partial.entropic_partial_wasserstein"}


class OTPlanSampler:
    """Draws pairs of points from an entropic plan between two minibatches with uniform weights, and C = |x0 − x1|².

    method          "sinkhorn", or "unbalanced": both marginals relaxed with strength reg_m (KL)
    reg, reg_m      in units of C, or of C/max C when normalize_cost. torchcfm's reg means the same plan
    normalize_cost  whether C is divided by its maximum, found by one more sweep
    num_threads     taken for torchcfm's sake: "exact" alone used it there
    warn            whether a missed tolerance is a ConvergenceWarning
    tol             marginal error of the solve, as in `otgen.solve_sample`

    Points are (B, ...) tensors, or numpy arrays, flattened to (B, d); x0 and x1 may differ in size. Half precision is computed in
    float32. `generator` is a torch.Generator of the points' device; torch's own when left out.
    Raises UsageError for "exact" and "partial", which POT has, and for unknown methods; InputError for batches that do not fit.
    """

    def __init__(
        self,
        method: str = "sinkhorn",
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
        *,
        tol: float = 1e-3,
    ) -> None:
        if method in ELSEWHERE:
            raise UsageError(
                f"expected method 'sinkhorn' or 'unbalanced'; got {method!r}, which is not entropic on full marginals; "
                f"type {ELSEWHERE[method]} of POT, or method='sinkhorn' with a small reg"
            )
        if method not in METHODS:
            raise unknown("method", str(method), METHODS)
        self.method = method
        self.reg, self.reg_m, self.tol = positive("reg", reg), positive("reg_m", reg_m), tol
        self.normalize_cost, self.num_threads, self.warn = normalize_cost, num_threads, warn

    def sample_plan(self, x0: Any, x1: Any, replace: bool = True, *, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        """(x0[i], x1[j]) for as many pairs (i, j), drawn from the plan, as x0 has points.

        replace  False: distinct pairs, drawn one after the other, each from what is left of the plan (numpy.random.choice's rule).
                 A point may still come in several pairs
        """
        i, j = self._pairs(x0, x1, replace, generator)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self, x0: Any, x1: Any, y0: Any = None, y1: Any = None, replace: bool = True, *, generator: torch.Generator | None = None
    ) -> tuple[Any, Any, Any, Any]:
        """(x0[i], x1[j], y0[i], y1[j]) for pairs as in `sample_plan`; None for labels left out."""
        for name, labels, points in (("y0", y0, x0), ("y1", y1, x1)):
            if labels is not None and len(labels) != len(points):
                batch = name.replace("y", "x")
                raise InputError(
                    f"expected a label in {name} for each of the {len(points)} points of {batch}; got {len(labels)}; mend them"
                )
        i, j = self._pairs(x0, x1, replace, generator)
        return x0[i], x1[j], None if y0 is None else y0[i], None if y1 is None else y1[j]

    def sample_trajectory(self, X: Any, *, generator: torch.Generator | None = None) -> Any:
        """(B, times, ...) trajectories through the populations X[:, t], of X's kind: the first point of each is X[i, 0], and every
        next one is drawn from the row of the plan between its population and the one after."""
        if getattr(X, "ndim", 0) < 3:
            raise InputError(f"expected X of shape (points, times, ...); got {tuple(getattr(X, 'shape', ()))}; type X[:, :, None]")
        populations = [X[:, t] for t in range(X.shape[1])]
        i = torch.arange(X.shape[0], device=X.device if isinstance(X, Tensor) else "cpu")
        check_generator(generator, i.device)
        found = [i]
        for before, after in pairwise(populations):
            found.append(follow(self._solve(before, after)._solution, found[-1], generator))
        paths = torch.stack(found, 1)
        times = torch.arange(len(populations), device=paths.device).expand_as(paths)
        return X[paths, times] if isinstance(X, Tensor) else X[paths.numpy(), times.numpy()]

    def get_map(self, x0: Any, x1: Any) -> NDArray[np.float64]:
        """The plan as a numpy array (len(x0), len(x1)) in float64: the one method that builds it."""
        plan = self._solve(x0, x1).plan
        return np.asarray(plan.cpu() if isinstance(plan, Tensor) else plan, dtype=np.float64)

    def sample_map(
        self, pi: Any, batch_size: int, replace: bool = True, *, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(i, j), numpy arrays: `batch_size` pairs drawn from a dense plan `pi`, a numpy array or tensor of any mass."""
        weights = torch.as_tensor(pi).detach().to("cpu", torch.float64)
        check_generator(generator, weights.device)
        if weights.ndim != 2 or not bool((weights >= 0).all() & weights.isfinite().all() & (weights.sum() > 0)):
            raise InputError(
                "expected a matrix pi of finite weights, not all zero and none negative; got another; type get_map(x0, x1)"
            )
        size, possible = count(batch_size, "batch_size"), int(torch.count_nonzero(weights))
        if not replace and size > possible:
            raise InputError(f"expected at most {possible} distinct pairs, as many as have weight; got {size}; type replace=True")
        i, j = np.divmod(draw(weights.reshape(-1), size, generator, replace=replace).numpy(), weights.shape[1])
        return i, j

    def _pairs(self, x0: Any, x1: Any, replace: bool, generator: torch.Generator | None) -> tuple[Any, Any]:
        result = self._solve(x0, x1)
        return result.sample(len(x0), generator, replace=replace)

    def _solve(self, x0: Any, x1: Any) -> OTResult:
        x, y = _flat("x0", x0), _flat("x1", x1)
        try:
            unit = _largest_cost(x, y) if self.normalize_cost else 1.0
            relaxed = self.reg_m * unit if self.method == "unbalanced" else None
            with warnings.catch_warnings():
                if not self.warn:
                    warnings.simplefilter("ignore", ConvergenceWarning)
                return solve_sample(x, y, reg=self.reg * unit, unbalanced=relaxed, tol=self.tol)
        except InputError as error:
            raise InputError(str(error).replace("X_a", "x0").replace("X_b", "x1")) from None


def _flat(name: str, points: Any) -> Any:
    """(B, d), without its history."""
    if not isinstance(points, (Tensor, np.ndarray)):
        raise InputError(f"expected a torch tensor for {name}; got {type(points).__name__}; type torch.as_tensor({name})")
    if points.ndim == 0 or 0 in points.shape:
        raise InputError(f"expected {name} of shape (points, ...), not empty; got {tuple(points.shape)}; pass a filled batch")
    return points.reshape(len(points), -1) if isinstance(points, np.ndarray) else points.detach().reshape(len(points), -1)


def _largest_cost(x: Any, y: Any) -> float:
    """max |x_i − y_j|², or 1 if it is zero. Of −y, with psi = 2|y|², the c-transform finds the point of y that is farthest."""
    c = centre(read(x, y, None, None))
    _, farthest = c_transform(c.x, -c.y, 2.0 * c.y_sq)
    return float((c.x - c.y[farthest]).square().sum(1).max()) or 1.0
