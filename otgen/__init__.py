"""otgen: generated, tuned Triton kernels for entropic optimal transport, and the solvers on them.

    import otgen
    result = otgen.solve_sample(x, y, reg=0.1)

Importing otgen loads nothing heavy: torch, triton and the rest come in with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from otgen.dispatch import pin
    from otgen.losses import SamplesLoss
    from otgen.solvers.batch import BatchResult, solve_sample_batch
    from otgen.solvers.divergence import empirical_sinkhorn_divergence
    from otgen.solvers.result import OTResult
    from otgen.solvers.sample import solve_sample
    from otgen.solvers.semidual import c_transform

__all__ = [
    "BatchResult",
    "OTResult",
    "SamplesLoss",
    "__version__",
    "c_transform",
    "empirical_sinkhorn_divergence",
    "pin",
    "solve_sample",
    "solve_sample_batch",
]

_HOME = {
    "solve_sample": "otgen.solvers.sample",
    "solve_sample_batch": "otgen.solvers.batch",
    "BatchResult": "otgen.solvers.batch",
    "empirical_sinkhorn_divergence": "otgen.solvers.divergence",
    "OTResult": "otgen.solvers.result",
    "SamplesLoss": "otgen.losses",
    "pin": "otgen.dispatch",
    "c_transform": "otgen.solvers.semidual",
}


def __getattr__(name: str) -> Any:
    if name == "cfm":
        return import_module("otgen.cfm")
    if name not in _HOME:
        raise AttributeError(f"module 'otgen' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
