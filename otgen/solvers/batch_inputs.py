"""The caller's batch: clouds of one size (batch, n, d), or of any sizes one after the other, with the problem of each point."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otgen.errors import InputError
from otgen.ops import LARGEST_BATCH
from otgen.solvers.inputs import DTYPES, INTEGERS, MASS_TOLERANCE, Clouds, Given, as_tensor, require_alike, working_dtype
from otgen.solvers.options import either


@dataclass(frozen=True, eq=False)
class Side:
    """The clouds of one side, padded with zeros to the largest, with the caller's graph.

    points   (batch, n, d);  weights (batch, n), or None for uniform ones;  counts (batch,) int32, of points that are not padding
    places   where each of the caller's points lies, (problem, row), both (N,); None when they came as (batch, n, d)
    """

    points: Tensor
    weights: Tensor | None
    counts: Tensor
    places: tuple[Tensor, Tensor] | None

    @property
    def real(self) -> Tensor:
        """(batch, n), whether it is a point."""
        return torch.arange(self.points.shape[1], device=self.points.device) < self.counts[:, None]

    @property
    def laid(self) -> Tensor:
        """The points as the caller has them."""
        return self.laid_out(self.points)

    def laid_out(self, values: Tensor) -> Tensor:
        """Values (batch, n, …) of points, as the caller has his points."""
        return values if self.places is None else values[self.places]

    def padded(self, values: Tensor) -> Tensor:
        """Values of the caller's points, as (batch, n, …)."""
        return values if self.places is None else _padded(values, self.places, self.points.shape[:2])


@dataclass(frozen=True, eq=False)
class GivenBatch:
    """Both sides of a batch, for autograd and for the form of the answers; `numpy`: whether answers are numpy arrays."""

    x: Side
    y: Side
    numpy: bool

    def __len__(self) -> int:
        return len(self.x.points)

    def answer(self, value: Tensor) -> Any:
        """`value` in the caller's kind, in float64 for float64 points and in float32 for all others."""
        value = value.to(working_dtype(self.x.points))
        return value.numpy() if self.numpy else value

    def part(self, i: int, n: int, m: int) -> Given:
        """The i-th problem, of n × m points."""
        sides = ((self.x, n), (self.y, m))
        a, b = (None if side.weights is None else side.weights[i, :count] for side, count in sides)
        return Given(self.x.points[i, :n], self.y.points[i, :m], a, b, self.numpy)


def read_batch(X_a: Any, X_b: Any, a: Any, b: Any, batch_a: Any, batch_b: Any) -> GivenBatch:
    """The caller's batch. Raises InputError for a wrong kind, dtype, device or shape, and for a problem without points."""
    numpy = isinstance(X_a, np.ndarray)
    x, y = as_tensor("X_a", X_a, numpy), as_tensor("X_b", X_b, numpy)
    if (batch_a is None) != (batch_b is None):
        raise InputError("expected batch_a and batch_b, or neither; got one of them; type both, or stack clouds of one size")
    wanted, hint = ("(batch, n, d)", "X[None] for one problem") if batch_a is None else ("(points, d)", "X.reshape(-1, d)")
    for name, points in (("X_a", x), ("X_b", y)):
        if points.ndim != (3 if batch_a is None else 2) or 0 in points.shape:
            raise InputError(f"expected {name} of shape {wanted}, not empty; got {tuple(points.shape)}; type {hint}")
        if points.dtype not in DTYPES:
            raise InputError(f"expected floating-point points in {name}; got {points.dtype}; type {name}.float()")
        if points.is_meta:
            raise InputError(f"expected points with values in {name}; got a meta tensor; type device='cpu' where it is made")
    require_alike("X_b", y, x, "X_a")
    if x.shape[-1] != y.shape[-1]:
        raise InputError(f"expected clouds of one dimension; got X_a {tuple(x.shape)} and X_b {tuple(y.shape)}; mend the data")
    if batch_a is None:
        if len(x) != len(y):
            raise InputError(f"expected as many clouds on both sides; got {len(x)} and {len(y)}; pass pairs")
        sides = [_stacked(name, points, w, numpy) for name, points, w in (("a", x, a), ("b", y, b))]
    else:
        owners = [_owners(name, index, p, numpy) for name, index, p in (("batch_a", batch_a, x), ("batch_b", batch_b, y))]
        count = 1 + max(int(owner.max()) for owner in owners)
        sides = [_ragged(name, p, w, owner, count, numpy) for name, p, w, owner in zip("ab", (x, y), (a, b), owners)]
    if len(sides[0].points) > LARGEST_BATCH:
        raise InputError(f"expected at most {LARGEST_BATCH} problems; got {len(sides[0].points)}; split the batch")
    return GivenBatch(sides[0], sides[1], numpy)


def centre_batch(given: GivenBatch, *, balanced: bool = True) -> Clouds:
    """The clouds of a batch, detached; each problem centred by itself.

    Raises InputError for values that are not finite, weights that cannot be transported, and, when `balanced`, unequal masses.
    """
    dtype = working_dtype(given.x.points)
    x, y = (side.points.detach().to(dtype) for side in (given.x, given.y))
    total = (given.x.counts + given.y.counts).to(dtype)[:, None]
    shift = ((x.sum(1) + y.sum(1)) / total)[:, None]
    x, y = ((p - shift).where(side.real[..., None], 0.0).contiguous() for p, side in ((x, given.x), (y, given.y)))
    x_sq, y_sq = x.square().sum(2), y.square().sum(2)
    a, b = (_measure(side, dtype) for side in (given.x, given.y))
    weighted = torch.maximum(torch.where(a > 0, x_sq, 0.0).amax(1), torch.where(b > 0, y_sq, 0.0).amax(1))
    largest = torch.maximum(x_sq.amax(1), y_sq.amax(1))
    masses = [w.sum(1, dtype=torch.float64) for w in (a, b)]
    facts = torch.stack([largest.double(), weighted.double(), a.amin(1).double(), b.amin(1).double(), *masses]).cpu().numpy()
    _refuse(facts, given, balanced)
    a_mass, b_mass, radius, reach = (values[:, None].to(dtype) for values in (*masses, largest.sqrt(), weighted.sqrt()))
    return Clouds(x, y, a, b, x_sq, y_sq, shift, (a_mass, b_mass), radius, reach, (given.x.counts, given.y.counts))


def _refuse(facts: np.ndarray, given: GivenBatch, balanced: bool) -> None:
    largest, _, a_least, b_least, a_mass, b_mass = facts
    if not np.isfinite(largest).all():
        i = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise InputError(f"expected finite points whose squared distances are finite; got others in problem {i}; mend the data")
    for name, least, mass in (("a", a_least, a_mass), ("b", b_least, b_mass)):
        for wrong, what in ((~np.isfinite(mass), "finite"), (least < 0, "non-negative"), (mass == 0, "some positive")):
            if wrong.any():
                raise InputError(f"expected {what} weights {name}; got others in problem {int(wrong.argmax())}; mend the data")
    weights = [side.weights for side in (given.x, given.y) if side.weights is not None]
    tolerance = max((MASS_TOLERANCE[w.dtype] for w in weights), default=MASS_TOLERANCE[working_dtype(given.x.points)])
    unequal = np.abs(a_mass - b_mass) > tolerance * np.maximum(a_mass, b_mass)
    if balanced and unequal.any():
        i = int(unequal.argmax())
        raise InputError(
            f"expected equal masses; got sum(a) = {a_mass[i]:.9g} and sum(b) = {b_mass[i]:.9g} in problem {i}; "
            "normalise both, or type unbalanced=1.0 to let the masses differ at a price"
        )


def _measure(side: Side, dtype: torch.dtype) -> Tensor:
    if side.weights is None:
        return side.real / side.counts.to(dtype)[:, None]
    return side.weights.detach().to(dtype, copy=True).where(side.real, 0.0)


def _stacked(name: str, points: Tensor, weights: Any, numpy: bool) -> Side:
    counts = torch.full((len(points),), points.shape[1], dtype=torch.int32, device=points.device)
    return Side(points, _weights(name, weights, points, numpy), counts, None)


def _ragged(name: str, points: Tensor, weights: Any, owner: Tensor, count: int, numpy: bool) -> Side:
    counts = torch.bincount(owner, minlength=count)
    if bool((counts == 0).any()):
        missing = int((counts == 0).nonzero()[0])
        raise InputError(
            f"expected points in every problem from 0 to {count - 1}; X_{name} has none in {missing}; renumber batch_{name}"
        )
    order = torch.argsort(owner, stable=True)
    first = counts.cumsum(0) - counts
    row = torch.empty_like(owner)
    row[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]
    places, size = (owner, row), (count, int(counts.max()))
    given = _weights(name, weights, points, numpy)
    padded = None if given is None else _padded(given, places, size)
    return Side(_padded(points, places, size), padded, counts.int(), places)


def _padded(values: Tensor, places: tuple[Tensor, Tensor], size: tuple[int, ...]) -> Tensor:
    return values.new_zeros((*size, *values.shape[1:])).index_put(places, values)


def _weights(name: str, weights: Any, points: Tensor, numpy: bool) -> Tensor | None:
    if weights is None:
        return None
    tensor = as_tensor(name, weights, numpy)
    if tensor.shape != points.shape[:-1]:
        shape, came = tuple(points.shape[:-1]), tuple(tensor.shape)
        raise InputError(f"expected weights {name} of shape {shape}, one for each point; got {came}; mend the data")
    require_alike(name, tensor, points, f"X_{name}", working_dtype(points))
    return tensor


def _owners(name: str, index: Any, points: Tensor, numpy: bool) -> Tensor:
    owner = as_tensor(name, index, numpy)
    if owner.dtype not in INTEGERS or owner.shape != points.shape[:1]:
        came = f"{tuple(owner.shape)} of {str(owner.dtype).removeprefix('torch.')}"
        raise InputError(f"expected {name} of shape ({len(points)},), int64, the number of each point's problem; got {came}")
    if owner.device != points.device:
        raise InputError(f"expected {name} on the points' device {points.device}; got {owner.device}; type {name}.to(X_a.device)")
    lowest, highest = int(owner.min()), int(owner.max())
    if lowest < 0 or highest >= len(owner):
        raise InputError(f"expected numbers from 0 without gaps in {name}; got {lowest} to {highest}; renumber the problems")
    return owner.long()


def numbers(name: str, given: Any, like: Clouds) -> Tensor:
    """(batch, 1), float64: one positive number for all problems, or a sequence of one for each. Raises InputError."""
    count = len(like.a)
    try:
        values = torch.as_tensor(given, dtype=torch.float64).detach().to(like.a.device)
    except (TypeError, ValueError, RuntimeError):
        values = torch.full((), torch.nan)
    kind = str(getattr(given, "dtype", type(given).__name__))
    if "bool" in kind or values.ndim > 1 or values.numel() not in (1, count) or not _positive(values):
        raise InputError(
            f"expected a finite number above 0 for {name}, or {count} of them; got {given!r}; type for example {name}=0.1"
        )
    return values.expand(count)[:, None]


def regularisations(reg: Any, blur: Any, like: Clouds) -> Tensor:
    """(batch, 1) of the clouds' dtype: reg, or 2·blur². Raises InputError for neither, both, and what is not positive there."""
    either(reg, blur)
    name, eps = ("reg", numbers("reg", reg, like)) if blur is None else ("2·blur²", 2.0 * numbers("blur", blur, like).square())
    found = eps.to(like.a.dtype).contiguous()
    if not _positive(found):
        raise InputError(
            f"expected {name} in the range of {str(found.dtype).removeprefix('torch.')}; got another; pass float64 points"
        )
    return found


def _positive(values: Tensor) -> bool:
    return bool((values.isfinite() & (values > 0)).all())


def index_of(i: Any, count: int) -> int:
    """A problem's number from 0; negative ones count from the end. Raises IndexError, and TypeError for what is no integer."""
    number = operator.index(i)
    if not -count <= number < count:
        raise IndexError(f"expected a problem from 0 to {count - 1}; got {number}")
    return number % count
