"""A half step over listed columns as one launch (`otgen.families.lists`), beside those of `otgen.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from otgen import ops
from otgen.errors import InputError
from otgen.families import lists
from otgen.ops import Flags


def flags_of(width: int) -> Flags:
    """The flags of a launch whose blocks have `width` points."""
    return (("listed", width), *ops.ALTERNATING)


def pays(x: Tensor, y: Tensor, modes: tuple[str, ...]) -> bool:
    """Whether half steps for the clouds x (n, d) and y (m, d), and back, are known to take less with lists than without."""

    def shorter(rows: Tensor, columns: Tensor) -> bool:
        listed, whole = (
            ops.known_us("sinkhorn", rows, columns, flags, modes) for flags in (flags_of(lists.WIDTH), ops.ALTERNATING)
        )
        return listed < whole

    return shorter(x, y) and shorter(y, x)


def sinkhorn_listed_step(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    b: Tensor,
    x_sq: Tensor,
    starts: Tensor,
    columns: Tensor,
    floor: Tensor,
    *,
    width: int,
    scale: float,
    damping: float = 1.0,
    step: float = 1.0,
    modes: tuple[str, ...] = ("ieee",),
) -> tuple[Tensor, Tensor]:
    """(u_new, rho), as `otgen.ops.sinkhorn_half_step` gives them, of rows that visit the columns of their lists.

    width    points of a block: x (n, d) and y (m, d) are in blocks of so many, the last of which may have fewer
    starts   (row blocks + 1,) int32, columns (entries,) int32: block I visits the blocks columns[starts[I]], …, of y
    floor    (n,) a row whose sum is not above it visits all columns after all, on the device, as one out of range does

    Nothing synchronises host and GPU. Raises InputError where `otgen.ops` streams, and what `otgen.dispatch.kernel` does.
    """
    if ops.streamed(x):
        came = f"{str(x.dtype).removeprefix('torch.')} on {x.device}"
        raise InputError(f"expected float32 points on a GPU for a listed step; got {came}; type otgen.listed.Tiles, or x.float()")
    u_out, rho = torch.empty_like(u), torch.empty_like(u)
    tensors = {"x": x, "y": y, "u": u, "v": v, "b": b, "x_sq": x_sq, "u_out": u_out, "rho": rho}
    arguments = {**tensors, "starts": starts, "columns": columns, "floor": floor, "step": step}
    ops.run("sinkhorn", flags_of(width), modes, arguments, None, scale=scale, damping=damping)
    return u_out, rho
