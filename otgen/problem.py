"""The vocabulary: a *problem* is what is computed, a *variant* is how, a *family* is one template with its space and reference.

A problem is the key of the tuning cache, a variant its value. A choice belongs to the variant only if every value of it computes
the same function within the problem's tolerance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal

from otgen.errors import UsageError, unknown

if TYPE_CHECKING:
    from otgen.gpus import Gpu

DTYPES = ("fp32", "bf16", "fp16")
"""Storage types of the coordinates; potentials, weights and sums are always fp32."""

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int32": 4}

LARGEST_CLOUD, LARGEST_DIMENSION = (1 << 31) - 1, 1 << 16
"""Points are counted in 32 bits; offsets of coordinates in 64."""

LARGE = 1 << 30
"""Points of a cloud that is larger than any tile needs."""

Value = int | str


@dataclass(frozen=True, slots=True)
class Problem:
    """What one launch computes: a family, the sizes of the clouds, the storage type of the coordinates, and the family's flags.

    The flag ``batch`` is how many problems a launch solves, side by side: n and m are then the sizes of the largest; ``listed`` is
    how many points share a list of columns (`otgen.families.lists`). They are left out of `flags` when they are 1.
    """

    family: str
    n: int
    m: int
    d: int
    dtype: str = "fp32"
    flags: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if min(self.n, self.m, self.d) < 1 or max(self.n, self.m) > LARGEST_CLOUD or self.d > LARGEST_DIMENSION:
            raise UsageError(
                f"expected sizes n, m from 1 to {LARGEST_CLOUD} and d from 1 to {LARGEST_DIMENSION}; got {self.shape}; "
                "write for example 4096x4096x64"
            )
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "flags", tuple(sorted(flag for flag in self.flags if flag not in (("batch", 1), ("listed", 1)))))

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.m}x{self.d}"

    def flag(self, name: str) -> Value:
        return dict(self.flags)[name]

    @property
    def batch(self) -> int:
        return int(dict(self.flags).get("batch", 1))

    @property
    def listed(self) -> int:
        return int(dict(self.flags).get("listed", 1))

    @property
    def own(self) -> bool:
        """Whether the columns are the rows: a measure's transport to itself."""
        return ("schedule", "own") in self.flags

    @property
    def flag_text(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.flags)

    def __str__(self) -> str:
        flags = f"[{self.flag_text}]" if self.flags else ""
        return f"{self.family}{flags} {self.shape} {self.dtype}"


def parse_shape(text: str) -> tuple[int, int, int]:
    """``"4096x2048x64"`` → (n, m, d).

    Raises UsageError when `text` is not three positive integers joined by ``x``.
    """
    match = re.fullmatch(r"([0-9]+)x([0-9]+)x([0-9]+)", text.strip().lower())
    sizes = tuple(int(s) for s in match.groups()) if match else ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise UsageError(f"expected a shape NxMxD of positive integers; got {text!r}; write for example 4096x4096x64")
    return sizes[0], sizes[1], sizes[2]


def bucket(size: int) -> int:
    """log2 of the power of two nearest to `size`, by ratio. Problems whose n and m have the same share their variants."""
    return (2 * size * size).bit_length() - 1 >> 1


def largest_alike(size: int) -> int:
    """The largest size of the bucket of `size`."""
    return isqrt((1 << 2 * bucket(size) + 1) - 1)


class Variant(Mapping[str, Value]):
    """How a problem is computed: an immutable, hashable mapping from axis to value, in sorted order."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[str, Value] | None = None, **axes: Value) -> None:
        self._items: dict[str, Value] = dict(sorted({**(items or {}), **axes}.items()))
        self._hash = hash(tuple(self._items.items()))

    def __getitem__(self, axis: str) -> Value:
        return self._items[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variant) and self._items == other._items

    def int(self, axis: str) -> int:
        value = self._items[axis]
        if not isinstance(value, int):
            raise UsageError(f"expected an integer for {axis}; got {value!r}")
        return value

    def with_(self, **axes: Value) -> Variant:
        return Variant(self._items, **axes)

    @property
    def json(self) -> str:
        return json.dumps(self._items, separators=(",", ":"))

    @property
    def text(self) -> str:
        """The spelling the command line reads: ``BLOCK_M=128 BLOCK_N=64 …``."""
        return " ".join(f"{k}={v}" for k, v in self._items.items())

    def __repr__(self) -> str:
        return f"Variant({self.text})"


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor argument of a family's ``launch()``: contiguous, row-major."""

    shape: tuple[int, ...]
    dtype: str = "fp32"
    role: Literal["in", "out", "scratch"] = "in"


Argument = Spec | float
"""A tensor's spec, or the typical value of a float scalar."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One launch as the model sees it: `programs`, each visiting `tiles` tiles of `streamed` points (none: it normally idles).

    shares    of each of its rows' sums, that a program reads and adds up, on average
    barriers  times that all programs of the launch wait for each other
    """

    programs: int
    tiles: float
    streamed: int
    shares: float = 0.0
    barriers: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What a variant does per pair besides one score and one exponential, and its launches.

    products       score products over all d coordinates, 0 where they are kept from tile to tile
    width          output columns per tile of a second product
    both_sums      whether columns are summed too
    own_values     whether the second product reuses y's loaded tile
    ordered        whether their sums are written as shares, for another launch to add up, instead of added by atomics
    added          columns of output that are added up for each column of a tile, by atomics
    """

    launches: tuple[Sweep, ...]
    products: int = 1
    width: int = 0
    both_sums: bool = False
    own_values: bool = False
    ordered: bool = False
    added: int = 0


@dataclass(frozen=True)
class Family:
    """One kernel family: the same name in templates/, otgen/families/, tests/ and the database.

    formula    what it computes, in the notation of its template
    flags      name → the values it may take; ``int`` stands for any positive integer
    axes       problem → axis → the values that may be tried (before `fits`); BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages,
               precision and stabiliser are always among them (`otgen.families.tiles.tile_axes`): the model and the checks read them
    fits       (problem, variant, gpu) → "" when legal, else the reason it is not; the *only* statement of legality
    default    problem → the variant used when nothing was tuned: legal on every GPU of the table
    arguments  problem → the keyword arguments of the rendered module's ``launch()``, in order
    inputs     (problem, seed) → values of the "in" tensors and scalars, float64 torch tensors on the CPU
    reference  (problem, inputs) → values of the "out" tensors in float64
    work       (problem, variant) → what its launches do, for the performance model
    budget     (problem, variant, inputs, expected) → output name → largest allowed |error|
    grid_axes  axes that change how many programs there are and not what they do: all values above one compile alike
    later_axes axes the family got after variants of it had been stored: one without them has the default's values
    refinements  axes tried only on top of a variant that did well → their plain value, the default's: listing what is legal leaves
               them at it, since each would multiply the list
    standard   n, m, d → the flag combinations that `otgen tune` covers when none is asked for
    coupled    whether an output depends on other points of its own side, as after several iterations
    roomiest   sizes (n, m) such that `fits` allows each plain variant for one of them that it allows for any
    """

    name: str
    formula: str
    flags: Mapping[str, tuple[str, ...] | type[int]]
    axes: Callable[[Problem], Mapping[str, tuple[Value, ...]]]
    fits: Callable[[Problem, Variant, Gpu], str]
    default: Callable[[Problem], Variant]
    arguments: Callable[[Problem], Mapping[str, Argument]]
    inputs: Callable[[Problem, int], dict[str, Any]]
    reference: Callable[[Problem, Mapping[str, Any]], dict[str, Any]]
    work: Callable[[Problem, Variant], Work]
    budget: Callable[[Problem, Variant, Mapping[str, Any], Mapping[str, Any]], dict[str, float]]
    standard: Callable[[int, int, int], tuple[Mapping[str, Value], ...]]
    grid_axes: tuple[str, ...] = ()
    later_axes: tuple[str, ...] = ()
    refinements: Mapping[str, Value] = field(default_factory=dict)
    coupled: bool = False
    roomiest: tuple[tuple[int, int], ...] = ((LARGE, LARGE),)

    def problem(self, n: int, m: int, d: int, dtype: str = "fp32", /, **flags: Value) -> Problem:
        """A problem of this family with every flag checked; a flag left out takes its first value.

        Raises UsageError for an unknown flag or value.
        """
        for name in flags:
            if name not in self.flags:
                raise unknown(f"flag of {self.name}", name, self.flags)
        complete: dict[str, Value] = {}
        for name, allowed in self.flags.items():
            value = flags.get(name, allowed[0] if isinstance(allowed, tuple) else 1)
            if isinstance(allowed, tuple):
                if value not in allowed:
                    raise unknown(f"value of {self.name}'s flag {name}", str(value), allowed)
            elif not isinstance(value, int) or value < 1:
                raise UsageError(f"expected a positive integer for {self.name}'s flag {name}; got {value!r}")
            complete[name] = value
        return Problem(self.name, n, m, d, dtype, tuple(complete.items()))

    def same_kernels(self, variant: Variant) -> Variant:
        """What stands for all variants that compile to the kernels of this one: numbers of programs above two are two."""
        return variant.with_(**{axis: min(variant.int(axis), 2) for axis in self.grid_axes if axis in variant})

    def grids(self, problem: Problem, variant: Variant) -> list[Variant]:
        """`variant` with every number of programs that the problem's axes have."""
        axes = {axis: values for axis, values in self.axes(problem).items() if axis in self.grid_axes and axis in variant}
        return [variant.with_(**dict(zip(axes, values))) for values in product(*axes.values())]

    def plain(self, variant: Variant) -> Variant:
        """`variant` without its refinements."""
        return variant.with_(**{axis: value for axis, value in self.refinements.items() if axis in variant})

    def listed_axes(self, problem: Problem) -> dict[str, tuple[Value, ...]]:
        """The axes whose product is listed: all but the refinements, which have their plain value."""
        return {axis: (self.refinements[axis],) if axis in self.refinements else v for axis, v in self.axes(problem).items()}

    def complete(self, problem: Problem, variant: Mapping[str, Value]) -> Variant:
        """`variant` with the default's values of those `later_axes` of the problem that it lacks."""
        default = self.default(problem)
        return Variant({axis: default[axis] for axis in self.later_axes if axis in default}, **variant)

    def check(self, problem: Problem, variant: Mapping[str, Value]) -> Variant:
        """`variant` as a Variant, each axis and value checked against the declared space. It may lack `later_axes`.

        Whatever is read from a file or a command line passes through here before a template sees it.
        Raises UsageError for a missing or unknown axis, a wrong type, or a value the axis does not have.
        """
        axes = self.axes(problem)
        for axis, value in variant.items():
            if axis not in axes:
                raise unknown(f"axis of {self.name}", axis, axes)
            if type(value) is not type(axes[axis][0]) or value not in axes[axis]:
                raise UsageError(f"expected {axis} among {', '.join(map(str, axes[axis]))}; got {value!r}")
        missing = [axis for axis in axes if axis not in variant and axis not in self.later_axes]
        if missing:
            raise UsageError(f"expected every axis of {self.name}; missing {', '.join(missing)}")
        return Variant(variant)
