"""What a warning says of a solve: a tolerance that was missed, or that float32 cannot hold, and what to type instead."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from otgen.precision import floor
from otgen.solvers.inputs import Clouds
from otgen.solvers.result import OTResult

VALUE_ERROR = 1e-4
"""Error of the value, per squared radius of the clouds, above which a float32 answer warns."""

ONE_POINT = 2.0**-20
"""Reach of the clouds, per distance to the origin, that the rounding of float32 coordinates explains."""


def least_error(clouds: Clouds, eps: Any, mode: str, rho: float = math.inf) -> Any:
    """The least marginal error that rounding allows: of the scores, by the rule of `otgen.precision`, of the sums, and of the
    targets a·exp(−f/ρ) of a relaxed marginal.

    rho  the smaller strength. A number, or of a batch an array (batch,).
    """
    scores: Any = floor(mode, clouds.reach, eps)
    if clouds.x.dtype == torch.float64:
        scores = scores * 2.0**-29  # 53 bits where the rule's "ieee" has 24
    scores = scores + torch.finfo(clouds.x.dtype).eps * clouds.reach**2 / rho
    if isinstance(scores, torch.Tensor):
        scores = scores[:, 0].cpu().double().numpy()
    return np.maximum(scores, torch.finfo(clouds.x.dtype).eps)


def complaint(result: OTResult, clouds: Clouds, tol: float, least: float) -> str:
    """What a warning says of a tolerance that was missed, or of an answer float32 cannot hold, and the cure; empty if all is well.

    least  the marginal error rounding allows (`least_error`)
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
