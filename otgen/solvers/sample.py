"""Entropic optimal transport between two weighted samples."""

from __future__ import annotations

import math
import operator
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from otgen import ops
from otgen.errors import InputError, unknown
from otgen.precision import ALIASES, MODES, admissible, floor, mode_name, representable
from otgen.solvers import sinkhorn
from otgen.solvers.inputs import Clouds, Given, centre, read
from otgen.solvers.result import ConvergenceWarning, OTResult
from otgen.solvers.solution import Solution, scale, scaled, value

METHODS = {"alternating": (sinkhorn.alternating, ops.ALTERNATING), "symmetric": (sinkhorn.symmetric, ops.SYMMETRIC)}

METRICS = ("sqeuclidean",)

VALUE_ERROR = 1e-4
"""Error of the value, per squared radius of the clouds, above which a float32 answer warns."""

ONE_POINT = 2.0**-20
"""Reach of the clouds, per distance to the origin, that the rounding of float32 coordinates explains."""


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    *,
    metric: str = "sqeuclidean",
    reg: float,
    method: str = "auto",
    max_iter: int = 2000,
    tol: float = 1e-3,
    potentials_init: tuple[Any, Any] | None = None,
    precision: str = "auto",
) -> OTResult:
    """Balanced transport of minimal <P, C> + reg·KL(P | a⊗b), with C = |x − y|², in O((n + m) d) memory.

    X_a, X_b         (n, d), (m, d) points: torch tensors on one device, or numpy arrays. Half precision is computed, and answered,
                     in float32.
    a, b             (n,), (m,) weights of equal mass, zeros allowed; uniform with mass 1 when left out. Nothing is normalised.
    metric           "sqeuclidean"
    reg              weight of the entropy, in units of C: GeomLoss's 2·blur², POT's reg with reg_type="KL"
    method           "alternating": f, then g from the new f;  "symmetric": both from the old pair and averaged with it, starting
                     from (T_f(0), T_g(0)) and ending with a full step (`otgen.solvers.sinkhorn.symmetric`);  "auto": alternating
    max_iter, tol    stop after so many updates of the pair, or at a marginal error of at most tol: (Σ|P·1 − a| + Σ|Pᵀ·1 − b|)/Σa,
                     a share of the mass (the second sum is zero after an alternating update). A CPU looks at the error after every
                     update, a GPU after every eighth, each look being a wait for the device. A tolerance that was missed, or that
                     float32 cannot hold, and a reg for which it loses the value, are a ConvergenceWarning.
    potentials_init  (f, g) to start from, for instance ``result.potentials`` of a similar problem; zeros when left out
    precision        how coordinates are multiplied: "auto" takes the fastest whose rounding leaves tol within reach; "fp64" for
                     float64 points, "fp32", and on a GPU the modes of `otgen.precision` are taken as asked for, or refused

    Potentials follow P_ij = a_i b_j exp((f_i + g_j − C_ij)/reg). Raises InputError for data, and UsageError for names, that make no
    transport problem.
    """
    started = time.perf_counter()
    if metric not in METRICS:
        raise unknown("metric", str(metric), METRICS)
    if method != "auto" and method not in METHODS:
        raise unknown("method", str(method), ["auto", *METHODS])
    eps, tol, max_iter = _positive("reg", reg), _tolerance(tol), _count(max_iter)
    given = read(X_a, X_b, a, b)
    clouds = centre(given)
    modes = _modes(precision, clouds, eps, tol)
    loop, flags = METHODS["alternating" if method == "auto" else method]
    u, v = _start(given, clouds, eps, potentials_init)
    choice = ops.kernel("sinkhorn", clouds.x, clouds.y, flags, modes).choice
    least = _floor(clouds, eps, "ieee" if choice is None else choice.precision)
    outcome = loop(clouds, u, v, scale=scale(eps), modes=modes, tol=tol, floor=least, max_iter=max_iter)
    solution = Solution(clouds, eps, outcome, modes, choice)
    result = OTResult(solution, given, value(solution, given), time.perf_counter() - started)
    if complaint := _complaint(result, clouds, tol, least):
        warnings.warn(complaint, ConvergenceWarning, stacklevel=2)
    return result


def _boolean(number: Any) -> bool:
    return str(getattr(number, "dtype", type(number).__name__)).removeprefix("torch.") == "bool"


def _positive(name: str, number: Any) -> float:
    try:
        converted = math.nan if _boolean(number) else float(number)
    except (TypeError, ValueError):
        converted = math.nan
    if not 0.0 < converted < math.inf:
        raise InputError(f"expected a finite number above 0 for {name}; got {number!r}; type for example {name}=0.1")
    return converted


def _tolerance(tol: Any) -> float:
    return 0.0 if isinstance(tol, (int, float)) and not _boolean(tol) and tol == 0 else _positive("tol", tol)


def _count(max_iter: Any) -> int:
    try:
        count = 0 if _boolean(max_iter) else operator.index(max_iter)
    except TypeError:
        count = 0
    if count < 1:
        raise InputError(f"expected an integer of at least 1 for max_iter; got {max_iter!r}; type for example max_iter=2000")
    return count


def _modes(precision: str, clouds: Clouds, eps: float, tol: float) -> tuple[str, ...]:
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
            f"expected coordinates inside the range of {mode}; reg={eps:g} scales them out of it; type precision='tf32'"
        )
    return (mode,)


def _start(given: Given, clouds: Clouds, eps: float, potentials: tuple[Any, Any] | None) -> tuple[Tensor, Tensor]:
    """The scaled potentials of the pair to start from."""
    if potentials is None:
        return -scale(eps) / 2 * clouds.x_sq, -scale(eps) / 2 * clouds.y_sq
    if not isinstance(potentials, (tuple, list)) or len(potentials) != 2:
        raise InputError(f"expected a pair (f, g) for potentials_init; got {type(potentials).__name__}; type result.potentials")
    f = given.argument("potentials_init[0]", potentials[0], tuple(clouds.a.shape))
    g = given.argument("potentials_init[1]", potentials[1], tuple(clouds.b.shape))
    if not math.isfinite(float(f.sum() + g.sum())):
        raise InputError("expected finite potentials_init; got NaN or infinite ones; leave potentials_init out")
    return scaled(f, clouds.x_sq, eps), scaled(g, clouds.y_sq, eps)


def _floor(clouds: Clouds, eps: float, mode: str) -> float:
    """The least marginal error that rounding allows: of the scores, by the rule of `otgen.precision`, and of the sums."""
    scores = floor(mode, clouds.reach, eps)
    if clouds.x.dtype == torch.float64:
        scores *= 2.0**-29  # 53 bits where the rule's "ieee" has 24
    return max(scores, torch.finfo(clouds.x.dtype).eps)


def _complaint(result: OTResult, clouds: Clouds, tol: float, least: float) -> str:
    """What a warning says of a tolerance that was missed, or of an answer float32 cannot hold, and the cure; empty if all is well.

    least  the marginal error rounding allows (`_floor`)
    """
    double = result.precision == "fp64"
    cure = "raise reg or tol" if double else "pass float64 points, or raise reg or tol"
    beyond = f"float32 cannot hold tol={tol:g}: its floor here is about {least:.0e}; {cure}"
    if result.precision != "fp32" or least <= tol:
        beyond = ""
    if result.converged:
        return beyond or _lost_value(result, clouds)
    reason = {
        "max_iter": beyond or "raise max_iter, reg or tol",
        "precision floor": f"{result.precision} rounding keeps it there: {cure}",
        "nan": f"reg={result.reg:g} is too small for {result.precision} at this distance of the clouds: raise it",
        "tol": "",
    }[result.stop]
    return f"the marginal error is {result.marginal_error:.1e} after {result.n_iters} iterations, above tol={tol:g}; {reason}"


def _lost_value(result: OTResult, clouds: Clouds) -> str:
    """The complaint that f = u/kappa rounds to reg·2⁻²³, however small the cost; empty in float64, and for a single point."""
    lost = result.reg * 2.0**-23
    if clouds.x.dtype == torch.float64 or lost <= VALUE_ERROR * clouds.reach**2:
        return ""
    if clouds.reach <= ONE_POINT * float(clouds.shift.norm()):
        return ""
    return f"float32 rounds the value and the potentials to {lost:.0e} at reg={result.reg:g}; pass float64 points, or lower reg"
