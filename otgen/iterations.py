"""Runs of Sinkhorn iterations as one launch each (`otgen.families.loop`), beside the single launches of `otgen.ops`.

Where `otgen.ops` streams in plain PyTorch, a run is its steps one after the other: nothing is gained there, and the answers are
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otgen import ops
from otgen.families import loop
from otgen.ops import Extents, Scalar

STARTED_US = 20.0
"""Microseconds that Python takes to start a step, at least: what benchmarks/launches.py found on one machine."""

SCHEDULES = {"alternating": ops.ALTERNATING, "symmetric": ops.SYMMETRIC, "own": ops.OWN}


def pays(x: Tensor, y: Tensor, schedule: str, modes: tuple[str, ...]) -> bool:
    """Whether runs for the clouds x (…, n, d) and y (…, m, d) should be single launches: small ones, for which a loop was tuned.

    Steps take what their kernels take, or what Python takes to start them, whichever is longer. No loop where the caller names the
    variant of single launches.
    """
    if ops.streamed(x) or max(x.shape[-2], y.shape[-2]) > loop.LARGEST:
        return False
    from otgen.override import variant_of

    flags = SCHEDULES[schedule]
    if variant_of("sinkhorn", flags) is not None:
        return False
    looped, alone = per_iteration(schedule, *(ops.known_us(family, x, y, flags, modes) for family in ("loop", "sinkhorn")))
    return looped < alone


def per_iteration(schedule: str, loop_us: float, step_us: float) -> tuple[float, float]:
    """Microseconds of an iteration in a loop whose launch takes `loop_us`, and by single steps, each of `step_us`."""
    return loop_us / loop.ITERATIONS, (2 if schedule == "alternating" else 1) * max(STARTED_US, step_us)


def sinkhorn_iterations(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    x_sq: Tensor,
    y_sq: Tensor,
    *,
    course: Tensor,
    schedule: str,
    step: float,
    tol: Scalar = -1.0,
    modes: tuple[str, ...] = ("ieee",),
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(u_new, v_new, rho, gamma, missed): all iterations of a `course` (…, k, 5), as `otgen.families.loop` says them.

    schedule  "alternating", "symmetric" or "own": one potential; v, b and y_sq are then not looked at, and v_new and gamma are
              u_new and rho
    tol       a problem stops after the first iteration whose pair missed no more than this, of each problem or of all
    rho, gamma, missed   the last iteration's sums, of the pair that came in to it; (…, k) what each iteration's pair missed, NaN of
              those that were not needed

    Other arguments are those of `otgen.ops`. Raises what `otgen.dispatch.kernel` does.
    """
    if ops.streamed(x):
        return _step_by_step(x, y, u, v, a, b, x_sq, y_sq, course, schedule, step, tol, extents)
    own = schedule == "own"
    u_out, rho, missed = torch.empty_like(u), torch.empty_like(u), course.new_empty(course.shape[:-1])
    v_out, gamma = (u_out, rho) if own else (torch.empty_like(v), torch.empty_like(v))
    arguments: dict[str, Any] = {"x": x, "y": y, "u": u, "a": a, "x_sq": x_sq, "u_out": u_out, "rho": rho}
    if not own:
        arguments |= {"v": v, "b": b, "y_sq": y_sq, "v_out": v_out, "gamma": gamma}
    arguments |= {"missed": missed, "course": course, "step": step, "iterations": course.shape[-2]}
    ops.run("loop", SCHEDULES[schedule], modes, arguments, extents, tol=tol)
    return u_out, v_out, rho, gamma, missed


@dataclass(eq=False)
class _Side:
    """One side of a run: potential and sums (…, n), weights, squared norms, and which entries are points (None: all)."""

    potential: Tensor
    weights: Tensor
    squares: Tensor
    real: Tensor | None

    def level(self, potential: Tensor, scale: Scalar, lift: Scalar) -> Tensor:
        """log2(e)/eps·f."""
        return potential + 0.5 * scale * self.squares + lift

    def missed(self, sums: Tensor, scale: Scalar, share: Scalar, lift: Scalar) -> Tensor:
        """(…, 1): Σ weights·|sums − what they are at a solution|."""
        target = torch.exp2(-share / (1.0 - share) * self.level(self.potential, scale, lift))
        counted = self.weights > 0 if self.real is None else self.real & (self.weights > 0)
        return torch.where(counted, self.weights * (sums - target).abs(), 0.0).sum(-1, keepdim=True)

    def moved(self, full: Tensor, scale: Scalar, share: Scalar, lift: Scalar, step: float) -> Tensor:
        """The potential a step nearer to its `full` update."""
        return torch.lerp(self.potential, full - share * self.level(full, scale, lift), step)

    def take(self, potential: Tensor, awake: Tensor) -> None:
        """Takes over a potential where problems are awake."""
        self.potential = torch.where(awake if self.real is None else awake & self.real, potential, self.potential)


def _step_by_step(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    x_sq: Tensor,
    y_sq: Tensor,
    course: Tensor,
    schedule: str,
    step: float,
    tol: Scalar,
    extents: Extents | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`sinkhorn_iterations` as single launches. A full update, damping 1 and step 1, gives what is to be averaged and damped."""
    rows, columns = (None, None) if extents is None else (_points(side, count) for side, count in zip((u, v), extents))
    first = _Side(u, a, x_sq, rows)
    second = first if schedule == "own" else _Side(v, b, y_sq, columns)
    missed = course.new_full(course.shape[:-1], torch.nan)
    rho, gamma = torch.ones_like(u), torch.ones_like(v)
    awake = torch.ones_like(course[..., 0, :1], dtype=torch.bool)
    for t in range(course.shape[-2]):
        scale, share_a, share_b, lift, ratio = course[..., t, :, None].unbind(-2)
        at: dict[str, Any] = {"scale": scale}
        if extents is not None:
            at["extents"] = tuple(torch.where(awake[:, 0], count, 0) for count in extents)
        u, v = first.potential, second.potential
        if schedule == "own":
            full, sums = ops.sinkhorn_own_step(x, y, u, a, x_sq, step=1.0, **at)
            full_too, sums_too = full, sums
        elif schedule == "symmetric":
            full, full_too, sums, sums_too = ops.sinkhorn_symmetric_step(x, y, u, v, a, b, x_sq, y_sq, step=1.0, **at)
        else:
            full, sums = ops.sinkhorn_half_step(x, y, u, v, b, x_sq, step=1.0, **at)
        met = first.missed(sums, scale, share_a, lift)
        new = first.moved(full, scale, share_a, lift, step)
        if schedule == "alternating":
            swapped = {name: value[::-1] if name == "extents" else value for name, value in at.items()}
            full_too, sums_too = ops.sinkhorn_half_step(y, x, v, new, a, y_sq, step=1.0, **swapped)
        elif schedule == "symmetric":
            met = met + second.missed(sums_too, scale, share_b, -lift)
        if schedule != "own":
            second.take(ratio * second.moved(full_too, scale, share_b, -lift, step), awake)
        first.take(ratio * new, awake)
        rho, gamma = torch.where(awake, sums, rho), torch.where(awake, sums_too, gamma)
        missed[..., t] = torch.where(awake, met, torch.nan)[..., 0]
        awake = awake & (met > (tol.reshape(-1, 1) if isinstance(tol, Tensor) else tol))
        if not bool(awake.any()):
            break
    return first.potential, second.potential, rho, rho if schedule == "own" else gamma, missed


def _points(potential: Tensor, counts: Tensor) -> Tensor:
    """(batch, n): what is a point, and not padding."""
    return torch.arange(potential.shape[-1], device=potential.device) < counts[:, None]
