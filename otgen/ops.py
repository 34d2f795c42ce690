"""The kernel families as functions of tensors: the one seam between the solvers and whatever computes a sweep.

float32 and half-precision coordinates on a GPU run the kernels `otgen.dispatch` picks; on the CPU, and in float64 anywhere, the
same launches run as streamed PyTorch (`otgen.chunked`). With TRITON_INTERPRET=1 CPU tensors take the dispatched kernels too, under
Triton's interpreter, as if the GPU were NOMINAL_GPU.

Every function takes contiguous tensors without autograd, returns new ones, and never synchronises host and GPU in float32. Vectors
have float32, or float64 with float64 coordinates. `modes` are the admissible precision modes (`otgen.precision`); streamed PyTorch
computes in the coordinates' own precision and needs none. The launches of sinkhorn and transport also take batches: tensors with an
axis of problems ahead, their `extents`, and scale and damping (batch, 1), or one for all. Traced by torch.compile, they are the
operators of `otgen.library`. Formulas and notation: `otgen.families`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otgen import chunked, chunked_batch, chunked_debiased
from otgen.families.tiles import DESCRIPTOR_UNIT, is_described
from otgen.tracing import opaque

if TYPE_CHECKING:
    from otgen.dispatch import Kernel

NOMINAL_GPU = "a100"
"""The GPU whose kernels the interpreter runs."""

Flags = tuple[tuple[str, int | str], ...]

ALTERNATING: Flags = (("schedule", "alternating"),)
SYMMETRIC: Flags = (("schedule", "symmetric"),)
OWN: Flags = (("schedule", "own"),)
DEBIASED: Flags = (("schedule", "debiased"),)
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
    OWN: Streamed(chunked.own_step),
    DEBIASED: Streamed(chunked_debiased.debiased_step),
    VECTOR: Streamed(chunked.apply_vector),
    GRADIENT: Streamed(chunked.gradient),
    MATVEC: Streamed(chunked.matvec),
    ASSEMBLY: Streamed(chunked.assemble),
}
STREAMED_MATRIX, STREAMED_BOTH = Streamed(chunked.apply_matrix), Streamed(chunked.apply_both)

STREAMED_BATCH: dict[Flags, Streamed] = {
    ALTERNATING: Streamed(chunked_batch.half_step),
    SYMMETRIC: Streamed(chunked_batch.symmetric_step),
    OWN: Streamed(chunked_batch.own_step),
    DEBIASED: Streamed(chunked_debiased.debiased_steps),
    VECTOR: Streamed(chunked_batch.apply_vector),
    GRADIENT: Streamed(chunked_batch.gradient),
}
STREAMED_BATCH_MATRIX, STREAMED_BATCH_BOTH = Streamed(chunked_batch.apply_matrix), Streamed(chunked_batch.apply_both)

LARGEST_BATCH = 65535
"""Problems in a launch: what the second and third axes of a grid can count."""

Extents = tuple[Tensor, Tensor]
"""rows, columns (batch,), int32: how many points of each problem count. The rest is padding, of no weight: it keeps its potentials,
its sums are 1, and its outputs 0. (0, 0) is a problem that rests."""

Scalar = float | Tensor


def streamed(x: Tensor) -> bool:
    """Whether clouds like `x` are computed by `otgen.chunked` rather than by a rendered kernel."""
    if x.dtype == torch.float64:
        return True
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def kernel(family: str, x: Tensor, y: Tensor, flags: Flags, modes: tuple[str, ...]) -> Kernel | Streamed:
    """What computes a launch for the clouds x (n, d), y (m, d), or for a batch of them: ``launch(**arguments)`` and ``choice``.

    choice  the variant, its precision and where it comes from (`otgen.dispatch.Choice`); None for streamed PyTorch
    Raises what `otgen.dispatch.kernel` does.
    """
    if streamed(x):
        both = ("output", "both") in flags
        if x.ndim == 2:
            return STREAMED.get(flags, STREAMED_BOTH if both else STREAMED_MATRIX)
        return STREAMED_BATCH.get(flags, STREAMED_BATCH_BOTH if both else STREAMED_BATCH_MATRIX)
    from otgen import dispatch
    from otgen.override import variant_of

    asked, variant = question(family, x, y, flags), variant_of(family, flags)
    return dispatch.kernel(*asked, modes) if variant is None else dispatch.named(*asked, variant)


def question(family: str, x: Tensor, y: Tensor, flags: Flags) -> tuple[str, str, int, int, int, str, Flags]:
    """What `otgen.dispatch` is asked about a launch: family, gpu, n, m, d, dtype, flags."""
    if x.ndim == 3:
        flags = (("batch", _rounded(len(x))), *flags)
    gpu = NOMINAL_GPU if x.device.type == "cpu" else _slug(x.device)
    return family, gpu, x.shape[-2], y.shape[-2], x.shape[-1], DTYPES[x.dtype], flags


def known_us(family: str, x: Tensor, y: Tensor, flags: Flags, modes: tuple[str, ...]) -> float:
    """Microseconds of a launch for clouds like these, as tuned or predicted (`otgen.dispatch`); infinite where nothing is known."""
    from otgen import dispatch

    asked = question(family, x, y, flags)
    return math.prod(x.shape[:-1]) * y.shape[-2] * dispatch.us_per_pair(*asked, modes)


def _rounded(batch: int) -> int:
    """The number of problems as dispatch knows it: a power of two, and two at least, since one is no batch."""
    return 1 << max(1, (batch - 1).bit_length())


@lru_cache
def _slug(device: torch.device) -> str:
    from otgen.dispatch import current_gpu

    return current_gpu(device)


def run(
    family: str, flags: Flags, modes: tuple[str, ...], arguments: dict[str, Any], extents: Extents | None, **each: Scalar
) -> None:
    """Run the kernel on the device its tensors live on, which need not be the current one.

    each  the numbers of which every problem of a batch has its own
    """
    x = arguments["x"]
    if extents is not None:
        each = {name: _per_problem(value, arguments["u"]) for name, value in each.items()}
        arguments |= {"rows": extents[0], "columns": extents[1]}
    arguments |= each
    found = kernel(family, x, arguments["y"], flags, modes)
    if found.choice is not None and is_described(found.choice.variant):
        arguments |= {name: _aligned(arguments[name]) for name in ("x", "y")}
    go = found.launch
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            go(**arguments)
    else:
        go(**arguments)


def _aligned(points: Tensor) -> Tensor:
    """`points`, copied if they are a view that begins where a tensor descriptor cannot."""
    return points.clone() if points.data_ptr() % DESCRIPTOR_UNIT else points


def _per_problem(value: Scalar, like: Tensor) -> Tensor:
    """(batch,): one number for each problem of potentials `like` (batch, n)."""
    if not isinstance(value, Tensor):
        return like.new_full(like.shape[:1], value)
    return value.to(like.dtype).expand(len(like), 1)[:, 0].contiguous()


@opaque
def sinkhorn_half_step(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    b: Tensor,
    x_sq: Tensor,
    *,
    scale: Scalar,
    damping: Scalar = 1.0,
    step: float = 1.0,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor]:
    """(u_new, rho): the update of u from v, and the row sums rho of the pair (u, v) that came in; row marginals are a·rho.

    The update of v is the same call with the sides swapped.
    """
    u_out, rho = torch.empty_like(u), torch.empty_like(u)
    arguments = {"x": x, "y": y, "u": u, "v": v, "b": b, "x_sq": x_sq, "u_out": u_out, "rho": rho}
    run("sinkhorn", ALTERNATING, modes, {**arguments, "step": step}, extents, scale=scale, damping=damping)
    return u_out, rho


@opaque
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
    scale: Scalar,
    damping_a: Scalar = 1.0,
    damping_b: Scalar = 1.0,
    step: float = 0.5,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(u_new, v_new, rho, gamma): both updates from the old pair, and the row and column sums of that pair."""
    u_out, rho, v_out, gamma = torch.empty_like(u), torch.empty_like(u), torch.empty_like(v), torch.empty_like(v)
    clouds = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b, "x_sq": x_sq, "y_sq": y_sq}
    outputs = {"u_out": u_out, "v_out": v_out, "rho": rho, "gamma": gamma}
    each = {"scale": scale, "damping_a": damping_a, "damping_b": damping_b}
    run("sinkhorn", SYMMETRIC, modes, {**clouds, **outputs, "step": step}, extents, **each)
    return u_out, v_out, rho, gamma


@opaque
def sinkhorn_own_step(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    a: Tensor,
    x_sq: Tensor,
    *,
    scale: Scalar,
    damping: Scalar = 1.0,
    step: float = 0.5,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor]:
    """(u_new, rho): the update of the one potential of a measure's transport to itself, and the row sums of the u that came in.

    y  x once more, or with label costs (`otgen.solvers.labels`) its right factors: scores are symmetric, and half of them may do
    """
    u_out, rho = torch.empty_like(u), torch.empty_like(u)
    arguments = {"x": x, "y": y, "u": u, "a": a, "x_sq": x_sq, "u_out": u_out, "rho": rho}
    run("sinkhorn", OWN, modes, {**arguments, "step": step}, extents, scale=scale, damping=damping)
    return u_out, rho


@opaque
def sinkhorn_debiased_step(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    p: Tensor,
    q: Tensor,
    a: Tensor,
    b: Tensor,
    x_sq: Tensor,
    y_sq: Tensor,
    *,
    scale: Scalar,
    damping_a: Scalar = 1.0,
    damping_b: Scalar = 1.0,
    step: float = 0.5,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(u_new, v_new, p_new, q_new, rho, gamma, rho_p, rho_q): a symmetric step of u and v, an own step of p (n,) and of q (m,)."""
    potentials, weights = {"u": u, "v": v, "p": p, "q": q}, {"a": a, "b": b, "x_sq": x_sq, "y_sq": y_sq}
    new = {f"{name}_out": torch.empty_like(old) for name, old in potentials.items()}
    sums = {name: torch.empty_like(old) for name, old in zip(("rho", "gamma", "rho_p", "rho_q"), potentials.values())}
    each = {"scale": scale, "damping_a": damping_a, "damping_b": damping_b}
    arguments = {"x": x, "y": y, **potentials, **weights, **new, **sums, "step": step}
    run("sinkhorn", DEBIASED, modes, arguments, extents, **each)
    return (*new.values(), *sums.values())  # type: ignore[return-value]


@opaque
def apply_plan(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    *,
    scale: Scalar,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> Tensor:
    """P·values for values (m,) → (n,), or (m, k) → (n, k) with any k ≥ 1. Pᵀ·values is the same call with the sides swapped."""
    vector = values.ndim == b.ndim
    out = values.new_empty(u.shape if vector else (*u.shape, values.shape[-1]))
    flags = VECTOR if vector else (("output", "matrix"), ("width", values.shape[-1]))
    arguments = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b, "values": values, "out": out}
    run("transport", flags, modes, arguments, extents, scale=scale)
    return out


@opaque
def apply_plan_both(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    values_t: Tensor,
    *,
    scale: Scalar,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor]:
    """(P·values (n, k), Pᵀ·values_t (m, k)) for values (m, k) and values_t (n, k), from one sweep where that is faster than two."""
    flags, matrix = ((("output", output), ("width", values.shape[-1])) for output in ("both", "matrix"))
    if not streamed(x) and not known_us("transport", x, y, flags, modes) < 2.0 * known_us("transport", x, y, matrix, modes):
        applied = apply_plan(x, y, u, v, a, b, values, scale=scale, modes=modes, extents=extents)
        return applied, apply_plan(y, x, v, u, b, a, values_t, scale=scale, modes=modes, extents=extents and extents[::-1])
    out, out_t = values_t.new_empty(values_t.shape), values.new_empty(values.shape)
    plan = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b}
    results = {"values": values, "values_t": values_t, "out": out, "out_t": out_t}
    run("transport", flags, modes, {**plan, **results}, extents, scale=scale)
    return out, out_t


@opaque
def plan_gradient(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    marginal: Tensor,
    *,
    scale: Scalar,
    cost: float = 1.0,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> Tensor:
    """2·cost·(marginal ∘ x − P y), (n, d): the derivative of the transport cost in x for the row marginal P·1 = `marginal`."""
    out = u.new_empty(x.shape)
    plan = {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b}
    run("transport", GRADIENT, modes, {**plan, "marginal": marginal, "out": out, "cost": cost}, extents, scale=scale)
    return out


@opaque
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
    run("hvp", MATVEC, modes, {"x": x, "y": y, "u": u, "v": v, **vectors, **scalars}, None)
    return out


@opaque
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
    run("hvp", ASSEMBLY, modes, {**plan, **solution, **scalars}, None)
    return out
