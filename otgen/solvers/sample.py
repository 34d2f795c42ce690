"""Entropic optimal transport between two weighted samples."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace
from typing import Any

from torch import Tensor

from otgen.errors import InputError, unknown
from otgen.solvers.engine import METHODS, Callback, Limits, own, precision_of, solved
from otgen.solvers.inputs import Given, centre, read
from otgen.solvers.options import count_of, precision_modes, regularisation, relaxation, tolerance
from otgen.solvers.result import ConvergenceWarning, OTResult
from otgen.solvers.solution import Divergence, value
from otgen.solvers.steps import Steps
from otgen.solvers.verdict import complaint, least_error

METRICS = ("sqeuclidean",)


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    *,
    metric: str = "sqeuclidean",
    reg: float | None = None,
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    debias: bool = False,
    method: str = "auto",
    max_iter: int = 2000,
    tol: float = 1e-3,
    potentials_init: tuple[Any, Any] | None = None,
    blur: float | None = None,
    reach: Any = None,
    precision: str = "auto",
    callback: Callback | None = None,
) -> OTResult:
    """Transport of minimal <P, C> + reg·KL(P | a⊗b) with C = |x − y|², in O((n + m) d) memory.

    X_a, X_b         (n, d), (m, d) points: torch tensors on one device, or numpy arrays. Half precision is computed, and answered,
                     in float32.
    a, b             (n,), (m,) weights, zeros allowed; uniform with mass 1 when left out. Nothing is normalised.
    metric           "sqeuclidean"
    reg              weight of the entropy, in units of C: POT's reg with reg_type="KL";  blur  its alias: reg = 2·blur²
    unbalanced       None: the plan has the marginals a and b, whose masses must be equal. ρ: it may miss them, at the price
                     ρ·KL(P·1 | a) + ρ·KL(Pᵀ·1 | b), in units of C. (ρ_a, ρ_b): each its own price, None for a marginal that must
                     fit. unbalanced_type  "KL";  reach  the alias: unbalanced = 2·reach², a number or a pair likewise
    debias           the Sinkhorn divergence, less half of each measure's own cost: OTResult says what changes
    method           "alternating": f, then g from the new f;  "symmetric": both from the old pair and averaged with it, starting
                     from (T_f(0), T_g(0)) and ending with a full step;  "anderson": alternating, its iterates mixed, after stages
                     of larger reg where the problem is hard (`otgen.solvers.annealing`);  "newton": Newton's method on the
                     semi-dual, its systems solved by conjugate gradients with two sweeps an iteration (`otgen.solvers.newton`):
                     fewer sweeps than anderson for tolerances below 1e-5 at small reg;  "auto": anderson
    max_iter, tol    stop after so many updates of the pair, or at a marginal error of at most tol: (Σ|P·1 − a| + Σ|Pᵀ·1 − b|), as
                     a share of the mass (one of the sums is zero but in the symmetric method). For a relaxed marginal a·exp(−f/ρ)
                     stands for a, which it is at the solution. A CPU looks at the error after every update, a GPU after every
                     eighth, each look being a wait for the device. A tolerance that was missed, or that float32 cannot hold, and
                     a reg for which it loses the value, are a ConvergenceWarning.
    potentials_init  (f, g) to start from, for instance ``result.potentials`` of a similar problem; zeros when left out
    precision        how coordinates are multiplied: "auto" takes the fastest whose rounding leaves tol within reach, and a finer
                     one when the error stalls; "fp64" for float64 points, "fp32", and on a GPU the modes of `otgen.precision` are
                     taken as asked for, or refused
    callback         called with the updates done and the marginal error, whenever the error is looked at

    Potentials follow P_ij = a_i b_j exp((f_i + g_j − C_ij)/reg). Raises InputError for data, and UsageError for names, that make no
    transport problem.
    """
    started = time.perf_counter()
    if metric not in METRICS:
        raise unknown("metric", str(metric), METRICS)
    if method != "auto" and method not in METHODS:
        raise unknown("method", str(method), ["auto", *METHODS])
    eps, (rho_a, rho_b) = regularisation(reg, blur), relaxation(unbalanced, unbalanced_type, reach)
    limits = Limits(tolerance(tol), count_of(max_iter), callback or (lambda n, error: None))
    given = read(X_a, X_b, a, b)
    clouds = centre(given, balanced=math.isinf(rho_a) and math.isinf(rho_b))
    steps = Steps(clouds, eps, precision_modes(precision, clouds, eps, limits.tol), rho_a, rho_b)
    pair = _pair(given, steps, potentials_init)
    cross = solved("anderson" if method == "auto" else method, steps, pair, limits, finer=precision == "auto")
    divergence = Divergence(cross)
    if debias:
        divergence = Divergence(cross, *(own(replace(steps, clouds=c.own), limits) for c in (clouds, clouds.swapped)))
    result = OTResult(divergence, given, value(divergence, given), time.perf_counter() - started)
    if said := complaint(result, clouds, limits.tol, least_error(clouds, eps, precision_of(cross.choice))):
        warnings.warn(said, ConvergenceWarning, stacklevel=2)
    return result


def _pair(given: Given, steps: Steps, potentials: tuple[Any, Any] | None) -> tuple[Tensor, Tensor] | None:
    """The potentials to start from, in units of the cost."""
    if potentials is None:
        return None
    if not isinstance(potentials, (tuple, list)) or len(potentials) != 2:
        raise InputError(f"expected a pair (f, g) for potentials_init; got {type(potentials).__name__}; type result.potentials")
    f = given.argument("potentials_init[0]", potentials[0], tuple(steps.clouds.a.shape))
    g = given.argument("potentials_init[1]", potentials[1], tuple(steps.clouds.b.shape))
    if not math.isfinite(float(f.sum() + g.sum())):
        raise InputError("expected finite potentials_init; got NaN or infinite ones; leave potentials_init out")
    return f, g
