"""The options of a solve, checked: numbers that make sense, aliases that agree, precisions that can be had."""

from __future__ import annotations

import math
import operator
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from otgen import ops
from otgen.errors import InputError, unknown
from otgen.precision import ALIASES, MODES, admissible, mode_name, representable
from otgen.solvers.inputs import Clouds

GRADIENTS = ("envelope", "implicit", "detach")

TUNING = ("cache", "now", "off")


def regularisation(reg: Any, blur: Any) -> float:
    """eps, for C = |x − y|², of `reg` or of its alias: reg = 2·blur².

    Raises InputError for neither, for both, and for what is no positive number.
    """
    either(reg, blur)
    return positive("reg", reg) if blur is None else _doubled_square("blur", blur)


def either(reg: Any, blur: Any) -> None:
    """Raise InputError for neither, and for both."""
    if (reg is None) == (blur is None):
        came = "neither" if reg is None else "both"
        raise InputError(f"expected one of reg and blur; got {came}; type for example reg=0.1, which is blur=0.05**0.5")


def relaxation(unbalanced: Any, kind: Any, reach: Any) -> tuple[float, float]:
    """(ρ_a, ρ_b), the strengths of the two marginals, infinite when balanced: `unbalanced`, or its alias 2·reach².

    One number relaxes both sides; a pair gives each its own, None in it leaves that one balanced.
    Raises InputError for anything else, and for both names together; UsageError for another kind than "KL".
    """
    if str(kind).upper() != "KL":
        raise unknown("unbalanced_type", str(kind), ["KL"])
    if unbalanced is not None and reach is not None:
        raise InputError("expected one of unbalanced and reach; got both; leave one out: unbalanced is 2·reach²")
    name, given = ("unbalanced", unbalanced) if reach is None else ("reach", reach)
    sides = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(sides) != 2:
        raise InputError(f"expected one number or a pair for {name}; got {len(sides)} of them; type {name}=(1.0, None)")
    strength = positive if reach is None else _doubled_square
    one, other = (math.inf if side is None or _infinite(side) else strength(name, side) for side in sides)
    return one, other


def _infinite(number: Any) -> bool:
    try:
        return float(number) == math.inf
    except (TypeError, ValueError, RuntimeError):
        return False


def _doubled_square(name: str, number: Any) -> float:
    """2·number², for a length whose square is what is meant. Raises InputError when that is no positive number."""
    length = positive(name, number)
    return 2.0 * positive(f"{name}²", length * length)


def _boolean(number: Any) -> bool:
    return str(getattr(number, "dtype", type(number).__name__)).removeprefix("torch.") == "bool"


def positive(name: str, number: Any) -> float:
    try:
        converted = math.nan if _boolean(number) else float(number)
    except (TypeError, ValueError, RuntimeError):
        converted = math.nan
    if not 0.0 < converted < math.inf:
        raise InputError(f"expected a finite number above 0 for {name}; got {number!r}; type for example {name}=0.1")
    return converted


def tolerance(tol: Any) -> float:
    return 0.0 if isinstance(tol, (int, float)) and not _boolean(tol) and tol == 0 else positive("tol", tol)


def count_of(max_iter: Any) -> int:
    try:
        count = 0 if _boolean(max_iter) else operator.index(max_iter)
    except TypeError:
        count = 0
    if count < 1:
        raise InputError(f"expected an integer of at least 1 for max_iter; got {max_iter!r}; type for example max_iter=2000")
    return count


def precision_modes(precision: str, clouds: Clouds, eps: float, tol: float) -> tuple[str, ...]:
    """The admissible precision modes of a sweep. Raises UsageError for an unknown one, InputError for one that cannot be had."""
    double, streamed = clouds.x.dtype == torch.float64, ops.streamed(clouds.x)
    if precision not in ("auto", "fp64", *ALIASES, *MODES):
        raise unknown("precision", str(precision), ["auto", "fp64", *ALIASES, *MODES])
    if precision == "auto":
        return ("ieee",) if streamed else admissible(clouds.radius, eps, tol)
    if precision == "fp64" or double:
        if not (precision == "fp64" and double):
            came, cure = ("float64", "X_a.float(), X_b.float()") if double else ("lower precision", "X_a.double(), X_b.double()")
            wanted = "float64" if precision == "fp64" else "float32"
            raise InputError(f"expected {wanted} points for precision={precision!r}; got {came}; type {cure}, or precision='auto'")
        return ("ieee",)
    mode = mode_name(precision)
    if streamed and mode != "ieee":
        raise InputError(f"expected points on a GPU for precision={precision!r}; got {clouds.x.device}; type precision='fp32'")
    if not representable(mode, clouds.radius, eps):
        raise InputError(
            f"expected coordinates inside the range of {mode}; reg={eps:g} scales them out of it; "
            f"type precision='{'tf32' if mode == 'fp16' else 'fp32'}'"
        )
    return (mode,)


def gradient(grad: Any) -> str:
    """What is to be differentiable. Raises UsageError for an unknown way."""
    if grad not in GRADIENTS:
        raise unknown("grad", str(grad), GRADIENTS)
    return str(grad)


def tuning(tune: Any) -> str:
    if tune not in TUNING:
        raise unknown("tune", str(tune), TUNING)
    return str(tune)


def stage_ratio(scaling: Any, potentials_init: Any) -> float | None:
    """From one blur to the next, between 0 and 1; None for the methods' own stages. Raises InputError for anything else."""
    if scaling is None:
        return None
    if potentials_init is not None:
        raise InputError(
            "expected one of scaling and potentials_init; got both; leave scaling out: its stages would throw the potentials away"
        )
    try:
        ratio = math.nan if _boolean(scaling) else float(scaling)
    except (TypeError, ValueError):
        ratio = math.nan
    if not 0.0 < ratio < 1.0:
        raise InputError(f"expected a number between 0 and 1 for scaling; got {scaling!r}; type for example scaling=0.5")
    return ratio


def told(callback: Callable[[int, float], object] | None, verbose: Any, started: float) -> Callable[[int, float], object]:
    """What is called at each look, with the iterations done and the error: the caller's callback, after a line when verbose.

    started  what `time.perf_counter` said when the solve began
    """

    def line(n: int, error: float) -> None:
        if verbose:
            print(f"{n} iterations, marginal error {error:.1e}, {time.perf_counter() - started:.2f} s")
        if callback is not None:
            callback(n, error)

    return line


def caller() -> int:
    """The stacklevel for a warning of the function that calls this one to point out of otgen, past a torch module in between."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("otgen.", "torch.nn.modules.")):
        level, frame = level + 1, frame.f_back
    return level
