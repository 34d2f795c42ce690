"""The Sinkhorn divergence of two samples, under POT's name."""

from __future__ import annotations

from typing import Any

from otgen.errors import UsageError
from otgen.solvers.result import OTResult
from otgen.solvers.sample import solve_sample


def empirical_sinkhorn_divergence(
    X_a: Any, X_b: Any, a: Any = None, b: Any = None, *, reg: float | None = None, **options: Any
) -> OTResult:
    """OT(a, b) − OT(a, a)/2 − OT(b, b)/2, with OT of `otgen.solve_sample`: that function with debias=True.

    X_a, X_b, a, b   (n, d), (m, d) points and their (n,), (m,) weights, uniform when left out
    reg              weight of the entropy, in units of C = |x − y|²; POT's reg. Or blur= in `options`
    options          all else that `otgen.solve_sample` takes, but debias

    The answer's `value` is the divergence: zero for equal measures, positive for others, differentiable. Its plan, potentials and
    costs are those of the problem between a and b (`OTResult`).

    `ot.bregman.empirical_sinkhorn_divergence(X_s, X_t, reg, a, b, numIterMax=, stopThr=)` takes reg in third place, and returns a
    number: max(0, <P, C> − <P_aa, C>/2 − <P_bb, C>/2), transport costs without their entropy, of the same plans. That is not
    `value`. It is, to the tolerance, the `value_linear` of this answer less half of those that
    `otgen.solve_sample(X_a, X_a, a, a, reg=reg)` and `otgen.solve_sample(X_b, X_b, b, b, reg=reg)` have.

    Raises UsageError for a number where weights go, and for debias; and what `otgen.solve_sample` raises.
    """
    if isinstance(a, (int, float)):
        raise UsageError(f"expected weights, or nothing, in third place; got {a!r}; type reg={a!r}, which POT has there")
    if "debias" in options:
        raise UsageError(f"expected no debias, which is what this does; got debias={options['debias']!r}; type otgen.solve_sample")
    return solve_sample(X_a, X_b, a, b, reg=reg, debias=True, **options)
