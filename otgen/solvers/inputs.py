"""From what a caller passes to what the kernels take: checked, centred, contiguous.

Whatever no transport problem can be made of is refused here, in one sentence that says what was expected, what came and what to
type. Shapes and types are checked on the host; values cost no sweep over the pairs and one synchronisation with the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from otgen.chunked import NEVER
from otgen.errors import InputError
from otgen.ops import Extents

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

MASS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative difference of two masses that rounding of normalised weights explains."""


@dataclass(frozen=True, eq=False)
class Given:
    """The caller's tensors, as they came (numpy arrays copied), for autograd and for the form of the answers.

    x, y    (n, d), (m, d) points;  a, b  (n,), (m,) weights, or None for uniform ones
    numpy   whether answers are numpy arrays
    """

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    numpy: bool

    def answer(self, value: Tensor) -> Any:
        """`value` in the caller's kind, in float64 for float64 points and in float32 for all others: float16 would overflow."""
        value = value.to(working_dtype(self.x))
        return value.numpy()[()] if self.numpy else value

    def argument(self, name: str, value: Any, shape: tuple[int | None, ...], *, keep: bool = False) -> Tensor:
        """An argument of a method as a contiguous tensor to compute with; None in `shape` stands for any positive size.

        keep  whether it keeps its graph

        Raises InputError when its kind, dtype, device or shape is not what belongs to the points.
        """
        tensor = as_tensor(name, value, self.numpy)
        if tensor.ndim != len(shape) or any(size == 0 or want not in (None, size) for size, want in zip(tensor.shape, shape)):
            wanted = ", ".join("k" if size is None else str(size) for size in shape)
            raise InputError(f"expected {name} of shape ({wanted}); got {_shape(tensor)}; type {name}.reshape({wanted})")
        require_alike(name, tensor, self.x, "X_a", working_dtype(self.x))
        return (tensor if keep else tensor.detach()).to(working_dtype(self.x)).contiguous()


@dataclass(frozen=True, eq=False)
class Clouds:
    """What the kernels take: float32 (float64 for float64 points), contiguous, `shift` subtracted from all points.

    x, y        (n, d), (m, d) centred points;  x_sq, y_sq  their squared norms
    a, b        (n,), (m,) weights, never the caller's own tensors;  masses  their sums;  mass  the mean of both
    shift       (d,) mean of both clouds, one vote for each point
    radius      largest norm of a centred point;  reach  the same over points of positive weight
    extents     None. A batch has an axis of problems ahead of all others: numbers are tensors (batch, 1), `shift` (batch, 1, d),
                and `extents` say how many points of each problem count (`otgen.ops.Extents`)
    features    None. With label costs (`otgen.solvers.labels`), the coordinates that are the points' own; the product of the others
                is the label cost, x's those of a left factor and y's of a right one. opposite  x as right factor, y as left one
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    x_sq: Tensor
    y_sq: Tensor
    shift: Tensor
    masses: tuple[Any, Any]
    radius: Any
    reach: Any
    extents: Extents | None = None
    features: int | None = None
    opposite: tuple[Tensor, Tensor] | None = None

    @cached_property
    def swapped(self) -> Clouds:
        sides: dict[str, Any] = {"x": self.y, "y": self.x, "a": self.b, "b": self.a, "x_sq": self.y_sq, "y_sq": self.x_sq}
        extents, opposite = self.extents and self.extents[::-1], self.opposite and self.opposite[::-1]
        return replace(self, **sides, masses=self.masses[::-1], extents=extents, opposite=opposite)

    @cached_property
    def own(self) -> Clouds:
        """The problem of the first side with itself."""
        y, opposite = (self.x, None) if self.opposite is None else (self.opposite[0], (self.opposite[0], self.x))
        extents = self.extents and (self.extents[0], self.extents[0])
        masses = self.masses[0], self.masses[0]
        return replace(self, y=y, b=self.a, y_sq=self.x_sq, masses=masses, extents=extents, opposite=opposite)

    @property
    def dimension(self) -> int:
        """Coordinates of the points."""
        return self.x.shape[-1] if self.features is None else self.features

    def part(self, i: int, n: int, m: int) -> Clouds:
        """The i-th problem of a batch, of n × m points, as a single one."""
        sizes = {"x": n, "a": n, "x_sq": n, "y": m, "b": m, "y_sq": m}
        tensors = {name: getattr(self, name)[i, :size] for name, size in sizes.items()}
        masses = float(self.masses[0][i]), float(self.masses[1][i])
        numbers: dict[str, Any] = {"masses": masses, "radius": float(self.radius[i]), "reach": float(self.reach[i])}
        opposite = self.opposite and (self.opposite[0][i, :n], self.opposite[1][i, :m])
        return replace(self, **tensors, **numbers, shift=self.shift[i, 0], extents=None, opposite=opposite)

    @property
    def mass(self) -> Any:
        return (self.masses[0] + self.masses[1]) / 2

    @cached_property
    def awake(self) -> Tensor | None:
        """(batch, 1), whether a problem is being worked on; None for a single one, which is."""
        return None if self.extents is None else self.extents[0][:, None] > 0

    @cached_property
    def real(self) -> Tensor | None:
        """(batch, n), whether a row of a batch is a point of a problem that is being worked on; None for a single problem."""
        return None if self.extents is None else torch.arange(self.a.shape[1], device=self.a.device) < self.extents[0][:, None]

    def filled(self, potential: Tensor) -> Tensor:
        """`potential` (…, n), and where there is no point that of a point without weight."""
        return potential if self.real is None else torch.where(self.real, potential, NEVER)

    def only(self, problems: Tensor) -> Clouds:
        """The same batch, in which all but these `problems` (batch,) rest. `self` has none that rests."""
        assert self.extents is not None
        rows, columns = self.extents
        return replace(self, extents=(rows * problems, columns * problems))


def working_dtype(points: Tensor) -> torch.dtype:
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def read(X_a: Any, X_b: Any, a: Any, b: Any) -> Given:
    """The caller's points and weights as tensors. Raises InputError for a wrong kind, dtype, device or shape."""
    numpy = isinstance(X_a, np.ndarray)
    x, y = as_tensor("X_a", X_a, numpy), as_tensor("X_b", X_b, numpy)
    if x.is_meta:
        raise InputError("expected points with values in X_a; got a meta tensor; type device='cpu' where it is made")
    for name, points in (("X_a", x), ("X_b", y)):
        if points.ndim != 2:
            hint = f"{name}[:, None] for points on a line" if points.ndim == 1 else "one cloud at a time"
            raise InputError(f"expected {name} of shape (points, dimensions); got {_shape(points)}; type {hint}")
        if 0 in points.shape:
            raise InputError(f"expected at least one point and one dimension in {name}; got {_shape(points)}; pass a filled cloud")
        if points.dtype not in DTYPES:
            cast = ".astype(numpy.float32)" if numpy else ".float()"
            raise InputError(f"expected floating-point points in {name}; got {_dtype(points)}; type {name}{cast}")
    require_alike("X_b", y, x, "X_a")
    if y.shape[1] != x.shape[1]:
        raise InputError(
            f"expected clouds of one dimension; got X_a {_shape(x)} and X_b {_shape(y)}; pass clouds of the same space"
        )
    weights = (_weights("a", a, x, "X_a", numpy), _weights("b", b, y, "X_b", numpy))
    return Given(x, y, *weights, numpy)


def centre(given: Given, *, balanced: bool = True) -> Clouds:
    """The clouds of `given`, detached.

    Raises InputError for values that are not finite, weights that cannot be transported, and, when `balanced`, unequal masses.
    """
    dtype = working_dtype(given.x)
    x, y = given.x.detach().to(dtype), given.y.detach().to(dtype)
    shift = (x.sum(0) + y.sum(0)) / (x.shape[0] + y.shape[0])
    x, y = (x - shift).contiguous(), (y - shift).contiguous()
    x_sq, y_sq = x.square().sum(1), y.square().sum(1)
    a, b = _measure(given.a, x), _measure(given.b, y)
    weighted = torch.maximum(torch.where(a > 0, x_sq, 0.0).max(), torch.where(b > 0, y_sq, 0.0).max())
    facts = (x_sq.max(), y_sq.max(), weighted, a.min(), b.min(), a.sum(dtype=torch.float64), b.sum(dtype=torch.float64))
    x_most, y_most, reach_sq, a_least, b_least, a_mass, b_mass = torch.stack([fact.double() for fact in facts]).tolist()
    if not math.isfinite(x_most + y_most):
        _refuse_points(given)
    for name, least, mass in (("a", a_least, a_mass), ("b", b_least, b_mass)):
        if not math.isfinite(mass):
            raise InputError(f"expected finite weights {name}; got NaN or infinite ones; type {name}.nan_to_num() or mend the data")
        if least < 0:
            raise InputError(f"expected weights {name} that are not negative; got {least:g}; type {name}.clip(0) or mend the data")
        if mass == 0:
            raise InputError(f"expected a positive total weight in {name}; got zeros only; leave {name} out for uniform weights")
    tolerance = max((MASS_TOLERANCE[w.dtype] for w in (given.a, given.b) if w is not None), default=MASS_TOLERANCE[dtype])
    if balanced and abs(a_mass - b_mass) > tolerance * max(a_mass, b_mass):
        raise InputError(
            f"expected equal masses; got sum(a) = {a_mass:.9g} and sum(b) = {b_mass:.9g}; "
            "type a / a.sum() and b / b.sum() to normalise both, or unbalanced=1.0 to let the masses differ at a price"
        )
    return Clouds(x, y, a, b, x_sq, y_sq, shift, (a_mass, b_mass), math.sqrt(max(x_most, y_most)), math.sqrt(reach_sq))


def as_tensor(name: str, value: Any, numpy: bool) -> Tensor:
    if isinstance(value, np.ndarray) and numpy:
        if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
            raise InputError(f"expected numbers in {name}; got dtype {value.dtype}; type {name}.astype(numpy.float32)")
        return torch.from_numpy(np.array(value, order="C", dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, Tensor) and not numpy:
        if value.layout != torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            raise InputError(f"expected a dense tensor for {name}; got a {layout} one; type {name}.to_dense()")
        return value
    kind, cure = ("a numpy array, as X_a is,", "numpy.asarray") if numpy else ("a torch tensor", "torch.as_tensor")
    raise InputError(f"expected {kind} for {name}; got {type(value).__module__}.{type(value).__name__}; type {cure}({name})")


def _weights(name: str, value: Any, points: Tensor, cloud: str, numpy: bool) -> Tensor | None:
    if value is None:
        return None
    weights = as_tensor(name, value, numpy)
    if weights.shape != points.shape[:1]:
        raise InputError(
            f"expected weights {name} of shape ({points.shape[0]},), one for each point of {cloud}; got {_shape(weights)}; "
            f"type {name}.reshape(-1) or mend the data"
        )
    require_alike(name, weights, points, cloud, working_dtype(points))
    return weights


def require_alike(name: str, tensor: Tensor, points: Tensor, cloud: str, or_dtype: torch.dtype | None = None) -> None:
    """Raise InputError unless `tensor` has the device and dtype of `points`, or the dtype named."""
    if tensor.device != points.device:
        raise InputError(
            f"expected {name} on {cloud}'s device {points.device}; got {tensor.device}; type {name}.to({cloud}.device)"
        )
    if tensor.dtype not in (points.dtype, or_dtype):
        raise InputError(
            f"expected {name} in {cloud}'s dtype {_dtype(points)}; got {_dtype(tensor)}; "
            f"type {name}.to({cloud}.dtype), or {name}.astype({cloud}.dtype) in numpy"
        )


def _measure(weights: Tensor | None, points: Tensor) -> Tensor:
    n = points.shape[0]
    return points.new_full((n,), 1.0 / n) if weights is None else weights.detach().to(points.dtype, copy=True).contiguous()


def _refuse_points(given: Given) -> NoReturn:
    for name, points in (("X_a", given.x), ("X_b", given.y)):
        bad = int((~points.isfinite()).any(1).sum())
        if bad:
            module = "numpy" if given.numpy else "torch"
            axis = "axis=1" if given.numpy else "dim=1"
            raise InputError(
                f"expected finite points; got NaN or infinity in {bad} of the {points.shape[0]} rows of {name}; "
                f"type {name}[{module}.isfinite({name}).all({axis})] to drop them"
            )
    largest = max(float(given.x.abs().max()), float(given.y.abs().max()))
    raise InputError(
        f"expected points whose squared distances are finite in {_dtype(given.x)}; got coordinates up to {largest:g}; "
        "divide the points by that, and reg by its square"
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
