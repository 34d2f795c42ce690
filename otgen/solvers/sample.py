"""Entropic optimal transport between two weighted samples."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from otgen.errors import ConvergenceWarning, InputError, unknown
from otgen.problem import Value
from otgen.solvers import options
from otgen.solvers.engine import METHODS, Callback, Course, divergence, precision_of
from otgen.solvers.inputs import Given, centre, read
from otgen.solvers.kernels import kernels_of
from otgen.solvers.labels import labelled, read_labels
from otgen.solvers.listed import listed
from otgen.solvers.result import OTResult
from otgen.solvers.steps import Steps
from otgen.solvers.value import value
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
    grad: str = "envelope",
    blur: float | None = None,
    reach: Any = None,
    scaling: float | None = None,
    labels_a: Any = None,
    labels_b: Any = None,
    label_cost: Any = None,
    precision: str = "auto",
    variant: Mapping[str, Value] | str = "auto",
    tune: str = "cache",
    tiles: str = "auto",
    callback: Callback | None = None,
    verbose: bool = False,
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
    grad             "envelope": `value` has the gradients that OTResult states, by the envelope theorem;  "detach": none;
                     "implicit": potentials, products with the plan, maps and costs have gradients too, those of the exact
                     solution, by the implicit function theorem (`otgen.solvers.implicit`). Ask for a small tol then
    scaling          GeomLoss's, from one blur to the next: reg goes down from R² by scaling² a stage, an alternation each, before
                     the method begins, whichever it is and however easy the problem; R is the radius of the centred clouds. None:
                     only anderson and newton take stages, only where it is hard, and halve reg. A measure's own cost takes none
    labels_a, labels_b   (n,), (m,) classes of the points, integers from 0, and what transport between two classes costs more:
    label_cost       (classes, classes), symmetric. C = |x_i − y_j|² + label_cost[k_i, l_j] then, everywhere (OTDD)
    precision        how coordinates are multiplied: "auto" takes the fastest whose rounding leaves tol within reach, and a finer
                     one when the error stalls; "fp64" for float64 points, "fp32", and on a GPU the modes of `otgen.precision` are
                     taken as asked for, or refused
    variant          "auto" takes the kernels that dispatch chooses; a mapping of axes, as `otgen.pin` takes, is the variant of the
                     sinkhorn kernels of this loop, and its precision the precision. For method="symmetric" those are the ones that
                     update both sides, for the others the ones that update one. Dispatch chooses for all else: newton's products,
                     gradients, plans, own costs, and the stages of a symmetric solve
    tune             "cache": a kernel that nothing was tuned for takes what comes nearest;  "now": what the loop launches is first
                     tuned on this GPU, unless it was before: minutes each, kept in the user's database (`otgen.store`), and in a
                     script only below ``if __name__ == "__main__":``, since compilers are other processes;  "off": a kernel that
                     would take the default variant is refused. No effect where PyTorch computes: on a CPU, or in float64
    tiles            "auto": sweeps over many points in at most 8 dimensions, on a CPU, or where kernels were tuned for it, leave
                     out tiles of pairs that together hold no more than tol/100 of any row, nor than 1e-7 (`otgen.listed`);
                     `visited` and `omitted_mass` of the result say how many, and how much;  "all": none are left out;  "listed":
                     lists are tried however few the points, and refused where they cannot be had
    callback         called with the updates done and the marginal error, whenever the error is looked at
    verbose          print a line then, and the result at the end

    Potentials follow P_ij = a_i b_j exp((f_i + g_j − C_ij)/reg). Raises InputError for data, and UsageError for names, that make no
    transport problem; NotImplementedError for what is not there yet; NoValidVariant for a `variant` that does not fit the problem,
    and with tune="off" for a kernel that nothing was tuned for.
    """
    started = time.perf_counter()
    if metric not in METRICS:
        raise unknown("metric", str(metric), METRICS)
    if method != "auto" and method not in METHODS:
        raise unknown("method", str(method), ["auto", *METHODS])
    grad, tune = options.gradient(grad), options.tuning(tune)
    eps, (rho_a, rho_b) = options.regularisation(reg, blur), options.relaxation(unbalanced, unbalanced_type, reach)
    limits = options.tolerance(tol), options.count_of(max_iter)
    ratio, method = options.stage_ratio(scaling, potentials_init), "anderson" if method == "auto" else method
    given = read(X_a, X_b, a, b)
    labels = read_labels(labels_a, labels_b, label_cost, given.x, given.y, numpy=given.numpy)
    clouds = labelled(centre(given, balanced=math.isinf(rho_a) and math.isinf(rho_b)), labels)

    def modes(name: str) -> tuple[str, ...]:
        return options.precision_modes(name, clouds, eps, limits[0])

    kernels, admissible = kernels_of(variant, tune, method, clouds, precision, modes)
    tiles = "all" if tiles == "auto" and kernels.named is not None else tiles
    steps = listed(Steps(clouds, eps, admissible, rho_a, rho_b), limits[0], tiles)
    course = Course(*limits, options.told(callback, verbose, started), ratio, kernels)
    pair, finer = _pair(given, steps, potentials_init), precision == "auto"
    found = divergence(method, steps, pair, course, debias=debias, finer=finer)
    worth = value(found, given)
    worth, seconds = worth.detach() if grad == "detach" else worth, time.perf_counter() - started
    result = OTResult(found, given, worth, seconds, implicit=grad == "implicit")
    if verbose:
        print(result)
    if said := complaint(result, clouds, course.tol, least_error(clouds, eps, precision_of(found.cross.choice))):
        warnings.warn(said, ConvergenceWarning, stacklevel=options.caller())
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
