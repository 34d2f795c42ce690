"""What SamplesLoss is called with, and what it keeps of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor

from otgen.errors import InputError, UsageError
from otgen.solvers.batch import BatchResult
from otgen.solvers.batch_inputs import GivenBatch, read_batch
from otgen.solvers.inputs import Given, read, working_dtype
from otgen.solvers.labels import Labels, read_labels
from otgen.solvers.options import count_of
from otgen.solvers.result import OTResult
from otgen.solvers.schedule import Extrapolated, diameter
from otgen.solvers.solution import Divergence
from otgen.solvers.value import DualValue, Potentials

T = TypeVar("T")

WORDS = {"X_a": "x", "X_b": "y", "unbalanced=1.0": "reach=1.0", "reg by its square": "blur by it"}
"""Names of solve_sample that its errors mention, as SamplesLoss calls them."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The tensors of a call, with the caller's graph: x (n, d), y (m, d), a (n,) and b (m,), or None for uniform weights.

    Of a batch they have an axis of problems ahead. labels: None, or the classes of the points and what they cost.
    """

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    labels: Labels | None = None

    @property
    def batched(self) -> bool:
        return self.x.ndim == 3

    @cached_property
    def given(self) -> Given | GivenBatch:
        """What is solved, without a graph. Raises InputError."""
        x, y, a, b = (None if tensor is None else tensor.detach() for tensor in (self.x, self.y, self.a, self.b))
        return read_batch(x, y, a, b, None, None) if self.batched else read(x, y, a, b)

    @property
    def label_options(self) -> dict[str, Tensor]:
        """What solve_sample is told of the labels."""
        if self.labels is None:
            return {}
        return {"labels_a": self.labels.a, "labels_b": self.labels.b, "label_cost": self.labels.cost}

    @property
    def diameter(self) -> float:
        """Of all points together, in the precision that they are computed in."""
        dtype = working_dtype(self.x)
        return diameter(self.x.detach().to(dtype), self.y.detach().to(dtype))


@dataclass(eq=False)
class Solved:
    """What a call solved, without a graph.

    unit   the cost in units of |x − y|²
    found  what `DualValue` and `Potentials` take
    """

    unit: float
    given: Given | GivenBatch
    seconds: float
    found: Extrapolated | Divergence
    solution: OTResult | BatchResult | None = None

    @cached_property
    def result(self) -> OTResult | BatchResult:
        if isinstance(self.found, Divergence):
            return cast(OTResult, self.solution)
        if isinstance(self.given, GivenBatch):
            return BatchResult(self.found.divergence, self.given, self.found.dual(), self.seconds)
        return OTResult(self.found.divergence, self.given, self.found.dual(), self.seconds)

    def potentials(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """(F, G), as SamplesLoss returns them; each differentiable in its points."""
        f, g = Potentials.apply(self.found, problem.x, problem.y)  # type: ignore[no-untyped-call]
        return self.unit * f, self.unit * g

    def value(self, problem: Problem) -> Tensor:
        """Differentiable in the caller's tensors."""
        value: Tensor = DualValue.apply(self.found, problem.x, problem.y, problem.a, problem.b)  # type: ignore[no-untyped-call]
        return self.unit * value

    def start(self, given: Given | GivenBatch) -> tuple[Tensor, Tensor] | None:
        """Its potentials, for a solve of `given`; None where they do not fit it."""
        mine, other = _points(self.given), _points(given)
        same = all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in zip(mine, other))
        return self.result.potentials if same and not np.any(np.asarray(self.result.stop) == "nan") else None


def _points(given: Given | GivenBatch) -> tuple[Tensor, Tensor]:
    return (given.x.points, given.y.points) if isinstance(given, GivenBatch) else (given.x, given.y)


def problem_of(args: tuple[Tensor | None, ...], labels: tuple[Any, Any, Any] = (None, None, None)) -> Problem:
    """The problem of a call, or the batch of them. Raises InputError for shapes that make none.

    labels  (classes of x, classes of y, cost between classes), or None for each
    """
    if len(args) == 6 and args[0] is None and args[3] is None:
        args = (*args[1:3], *args[4:])
    if len(args) not in (2, 4):
        raise UsageError(f"expected loss(x, y) or loss(a, x, b, y); got {len(args)} arguments; cluster labels are not needed here")
    x, y, a, b = (*args, None, None) if len(args) == 2 else (args[1], args[3], args[0], args[2])
    for name, tensor in (("x", x), ("y", y), ("a", a), ("b", b)):
        if not isinstance(tensor, Tensor) and (name in "xy" or tensor is not None):
            raise InputError(f"expected a torch tensor for {name}; got {type(tensor).__name__}; type torch.as_tensor({name})")
    x, y = cast(Tensor, x), cast(Tensor, y)
    for name, points in (("x", x), ("y", y)):
        if points.ndim not in (2, 3) or points.ndim != x.ndim:
            raise InputError(
                f"expected points x and y of shape (n, d), or (batch, n, d) both; got {name} {tuple(points.shape)}; "
                f"type {name}[:, None] for points on a line, and loss(a, x, b, y) when there are weights"
            )
    a, b = (w.squeeze(-1) if w is not None and w.ndim == x.ndim and w.shape[-1] == 1 else w for w in (a, b))
    classes = read_labels(*labels, x, y, names=("label_x", "label_y", "label_cost_matrix"))
    if x.ndim == 2:
        return Problem(x, y, a, b, classes)
    for name, tensor, shape in (("y", y, (len(x), *y.shape[1:])), ("a", a, x.shape[:2]), ("b", b, (len(x), y.shape[1]))):
        if tensor is not None and tensor.shape != shape:
            raise InputError(
                f"expected {name} of shape {tuple(shape)} in a batch of {len(x)}; got {tuple(tensor.shape)}; "
                "pass one cloud, and one row of weights, for each problem"
            )
    if len(x) == 0:
        raise InputError("expected at least one problem in the batch; got none; pass x[None] and y[None] for one")
    return Problem(x, y, a, b, classes)


def renamed(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What the function returns; its InputErrors speak of x, y and reach, as this module's caller does."""
    try:
        return function(*arguments, **options)
    except InputError as error:
        message = str(error)
        for ours, theirs in WORDS.items():
            message = message.replace(ours, theirs)
        raise InputError(message) from None


def count(name: str, value: Any) -> int:
    """Raises InputError for what is no integer of at least 1."""
    try:
        return count_of(value)
    except InputError as error:
        raise InputError(str(error).replace("max_iter", name)) from None
