"""The kernel families as functions of tensors: the one seam between the solvers and whatever computes a sweep.

float32 and half-precision coordinates on a GPU run the kernels `otgen.dispatch` picks; on the CPU, and in float64 anywhere, the
same launches run as streamed PyTorch (`otgen.chunked`). With TRITON_INTERPRET=1 CPU tensors take the dispatched kernels too, under
Triton's interpreter, as if the GPU were NOMINAL_GPU.

Every function takes contiguous tensors without autograd, returns new ones, and never synchronises host and GPU in float32. Vectors
have float32, or float64 with float64 coordinates. `modes` are the admissible precision modes (`otgen.precision`); streamed PyTorch
computes in the coordinates' own precision and needs none. Formulas and notation: `otgen.families`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otgen import chunked

if TYPE_CHECKING:
    from otgen.dispatch import Kernel

NOMINAL_GPU = "a100"
"""The GPU whose kernels the interpreter runs."""

Flags = tuple[tuple[str, int | str], ...]

ALTERNATING: Flags = (("schedule", "alternating"),)
SYMMETRIC: Flags = (("schedule", "symmetric"),)
VECTOR: Flags = (("output", "vector"), ("width", 1))
GRADIENT: Flags = (("output", "gradient"), ("width", 1))
MATVEC: Flags = (("product", "matvec"),)
ASSEMBLY: Flags = (("product", "assembly"),)

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Streamed:
    """A launch in plain PyTorch: there was no variant to choose."""

    launch: Callable[..., None]
    choice: None = None


STREAMED: dict[Flags, Streamed] = {
    ALTERNATING: Streamed(chunked.half_step),
    SYMMETRIC: Streamed(chunked.symmetric_step),
    VECTOR: Streamed(chunked.apply_vector),
    GRADIENT: Streamed(chunked.gradient),
    MATVEC: Streamed(chunked.matvec),
    ASSEMBLY: Streamed(chunked.assemble),
}
STREAMED_MATRIX = Streamed(chunked.apply_matrix)


def streamed(x: Tensor) -> bool:
    """Whether clouds like `x` are computed by `otgen.chunked` rather than by a rendered kernel."""
    if x.dtype == torch.float64:
        return True
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def kernel(family: str, x: Tensor, y: Tensor, flags: Flags, modes: tuple[str, ...]) -> Kernel | Streamed:
    """What computes a launch for the clouds x (n, d), y (m, d): an object with ``launch(**arguments)`` and ``choice``.

    choice  the variant, its precision and where it comes from (`otgen.dispatch.Choice`); None for streamed PyTorch
    Raises what `otgen.dispatch.kernel` does.
    """
    if streamed(x):
        return STREAMED.get(flags, STREAMED_MATRIX)
    from otgen.dispatch import kernel as dispatched

    gpu = NOMINAL_GPU if x.device.type == "cpu" else _slug(x.device)
    return dispatched(family, gpu, x.shape[0], y.shape[0], x.shape[1], DTYPES[x.dtype], flags, modes)


@lru_cache
def _slug(device: torch.device) -> str:
    from otgen.dispatch import current_gpu

    return current_gpu(device)


def _launch(family: str, flags: Flags, modes: tuple[str, ...], arguments: dict[str, Any]) -> None:
    """Run the kernel on the device its tensors live on, which need not be the current one."""
    x = arguments["x"]
    run = kernel(family, x, arguments["y"], flags, modes).launch
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            run(**arguments)
    else:
        run(**arguments)


def sinkhorn_half_step(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    b: Tensor,
    x_sq: Tensor,
    *,
    scale: float,
    damping: float = 1.0,
    step: float = 1.0,
    modes: tuple[str, ...] = ("ieee",),
) -> tuple[Tensor, Tensor]:
    """(u_new, rho): the update of u from v, and the row sums rho of the pair (u, v) that came in; row marginals are a·rho.

    The update of v is the same call with the sides swapped.
    """
    u_out, rho = torch.empty_like(u), torch.empty_like(u)
    arguments = {"x": x, "y": y, "u": u, "v": v, "b": b, "x_sq": x_sq, "u_out": u_out, "rho": rho}
    _launch("sinkhorn", ALTERNATING, modes, {**arguments, "scale": scale, "damping": damping, "step": step})
    return u_out, rho


def sinkhorn_symmetric_step(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    x_sq: Tensor,
    y_sq: Tensor,
    *,
    scale: float,
    damping_a: float = 1.0,
    damping_b: float = 1.0,
    step: float = 0.5,
    modes: tuple[str, ...] = ("ieee",),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(u_new, v_new, rho, gamma): both updates from the old pair, and the row and column sums of that pair."""
    u_out, rho, v_out, gamma = torch.empty_like(u), torch.empty_like(u), torch.empty_like(v), torch.empty_like(v)
    clouds = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b, "x_sq": x_sq, "y_sq": y_sq}
    outputs = {"u_out": u_out, "v_out": v_out, "rho": rho, "gamma": gamma}
    scalars = {"scale": scale, "damping_a": damping_a, "damping_b": damping_b, "step": step}
    _launch("sinkhorn", SYMMETRIC, modes, {**clouds, **outputs, **scalars})
    return u_out, v_out, rho, gamma


def apply_plan(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    *,
    scale: float,
    modes: tuple[str, ...] = ("ieee",),
) -> Tensor:
    """P·values for values (m,) → (n,), or (m, k) → (n, k) with any k ≥ 1. Pᵀ·values is the same call with the sides swapped."""
    out = values.new_empty((x.shape[0], *values.shape[1:]))
    flags = VECTOR if values.ndim == 1 else (("output", "matrix"), ("width", values.shape[1]))
    arguments = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b, "values": values, "out": out, "scale": scale}
    _launch("transport", flags, modes, arguments)
    return out


def plan_gradient(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    marginal: Tensor,
    *,
    scale: float,
    cost: float = 1.0,
    modes: tuple[str, ...] = ("ieee",),
) -> Tensor:
    """2·cost·(marginal ∘ x − P y), (n, d): the derivative of the transport cost in x for the row marginal P·1 = `marginal`."""
    out = u.new_empty(x.shape)
    plan = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b}
    _launch("transport", GRADIENT, modes, {**plan, "marginal": marginal, "out": out, "scale": scale, "cost": cost})
    return out


def hvp_matvec(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    left: Tensor,
    right: Tensor,
    w: Tensor,
    z: Tensor,
    *,
    scale: float,
    alpha: float,
    beta: float,
    modes: tuple[str, ...] = ("ieee",),
) -> Tensor:
    """beta·z + alpha·left ∘ (2^S (right ∘ w)), (n,): one product of the conjugate-gradient solve."""
    out = torch.empty_like(u)
    vectors = {"left": left, "right": right, "w": w, "z": z, "out": out}
    scalars = {"scale": scale, "alpha": alpha, "beta": beta}
    _launch("hvp", MATVEC, modes, {"x": x, "y": y, "u": u, "v": v, **vectors, **scalars})
    return out


def hvp_assemble(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    marginal: Tensor,
    direction: Tensor,
    w_f: Tensor,
    w_g: Tensor,
    *,
    scale: float,
    cost: float,
    inverse_eps: float,
    modes: tuple[str, ...] = ("ieee",),
) -> Tensor:
    """The Hessian of the transport cost in x times `direction`, (n, d), from the solved (w_f, w_g)."""
    out = torch.empty_like(direction)
    plan = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b}
    solution = {"marginal": marginal, "direction": direction, "w_f": w_f, "w_g": w_g, "out": out}
    scalars = {"scale": scale, "cost": cost, "inverse_eps": inverse_eps}
    _launch("hvp", ASSEMBLY, modes, {**plan, **solution, **scalars})
    return out
