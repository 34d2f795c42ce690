"""The launches of batches of problems in plain PyTorch: a batched matrix product for as many small problems as fill a tile.

Each function takes the keyword arguments of the rendered module it stands for, and fills the same outputs: those of `otgen.chunked`
with an axis of problems ahead (`otgen.families.batches`). Problems are taken in their order, a run of neighbours at a time, cut to
the largest of the run; problems that rest are passed over, and one that fills a tile alone is streamed by `otgen.chunked`. A batch
sorted by size wastes the least on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otgen import chunked
from otgen.chunked import CPU_TILE, GPU_TILE, HIGHEST, LOWEST, NEVER, left_factor, masked, right_factor

LEFT = ("x", "u", "a", "x_sq", "u_out", "rho", "marginal", "values_t", "out")
RIGHT = ("y", "v", "b", "y_sq", "v_out", "gamma", "values", "out_t")
"""Which side's points an argument belongs to; the others are numbers."""


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring problems that are computed together: `at` in the batch; at most n and m points each.

    rows, columns  (problems, n), (problems, m): whether it is a point, and not padding
    """

    at: slice
    n: int
    m: int
    rows: Tensor
    columns: Tensor

    def of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The run's part of a launch's arguments: views of its tensors, and its numbers (problems,)."""
        sizes = {**dict.fromkeys(LEFT, self.n), **dict.fromkeys(RIGHT, self.m)}
        return {
            name: value[self.at, : sizes[name]] if name in sizes else value[self.at] if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }


def runs(rows: Tensor, columns: Tensor) -> Iterator[Run]:
    """The problems that are awake, in runs of about a tile's worth of pairs. Reads the extents, which waits for a GPU."""
    limit = CPU_TILE * torch.get_num_threads() if rows.device.type == "cpu" else GPU_TILE
    sizes = list(zip(rows.tolist(), columns.tolist()))
    start = 0
    while start < len(sizes):
        n, m = sizes[start]
        stop = start + 1
        while n and stop < len(sizes) and sizes[stop][0]:
            n_more, m_more = max(n, sizes[stop][0]), max(m, sizes[stop][1])
            if n_more * m_more * (stop + 1 - start) > limit:
                break
            n, m, stop = n_more, m_more, stop + 1
        if n:
            at = slice(start, stop)
            inside = (torch.arange(size, device=rows.device) < counts[at, None] for size, counts in ((n, rows), (m, columns)))
            yield Run(at, n, m, *inside)
        start = stop


def half_step(*, rows: Tensor, columns: Tensor, **arguments: Any) -> None:
    """The alternating updates `u_out` of `u` (batch, n), and the row sums `rho` at the pairs that came in."""
    _rest(arguments)
    _each(rows, columns, arguments, chunked.half_step, _half_steps)


def symmetric_step(*, rows: Tensor, columns: Tensor, **arguments: Any) -> None:
    """Both potentials from the old pairs, with row sums `rho` (batch, n) and column sums `gamma` (batch, m)."""
    _rest(arguments)
    _each(rows, columns, arguments, chunked.symmetric_step, _symmetric_steps)


def own_step(*, rows: Tensor, columns: Tensor, **arguments: Any) -> None:
    """The updates `u_out` of the one potential `u` (batch, n) of measures' transport to themselves, and their row sums `rho`."""
    _rest(arguments)
    _each(rows, rows, arguments, chunked.own_step, _own_steps)


def apply_vector(*, values: Tensor, out: Tensor, **arguments: Any) -> None:
    """P·values for one vector a problem, (batch, m) → (batch, n)."""
    apply_matrix(values=values[..., None], out=out[..., None], **arguments)


def apply_matrix(*, rows: Tensor, columns: Tensor, **arguments: Any) -> None:
    """P·values for any number of columns, (batch, m, k) → (batch, n, k)."""
    arguments["out"].zero_()
    _each(rows, columns, arguments, chunked.apply_matrix, _products)


def apply_both(*, rows: Tensor, columns: Tensor, **arguments: Any) -> None:
    """P·values and Pᵀ·values_t of each problem, (batch, n, k) and (batch, m, k)."""
    arguments["out"].zero_()
    arguments["out_t"].zero_()
    _each(rows, columns, arguments, chunked.apply_both, _both_products)


def gradient(*, marginal: Tensor, cost: float = 1.0, **arguments: Any) -> None:
    """The derivatives of the transport costs in x, (batch, n, d), by the envelope theorem."""
    apply_matrix(values=arguments["y"], **arguments)
    x, out, rows = arguments["x"], arguments["out"], arguments["rows"]
    counted = torch.arange(x.shape[1], device=x.device) < rows[:, None]
    torch.sub((marginal * counted)[..., None] * x, out, out=out).mul_(2.0 * cost)


def _each(
    rows: Tensor,
    columns: Tensor,
    arguments: dict[str, Any],
    single: Callable[..., None],
    several: Callable[[Run, dict[str, Any]], None],
) -> None:
    for run in runs(rows, columns):
        own = run.of(arguments)
        if run.at.stop - run.at.start > 1:
            several(run, own)
        else:
            views = {name: value[0] if isinstance(value, Tensor) else value for name, value in own.items()}
            single(**{name: float(v) if isinstance(v, Tensor) and v.ndim == 0 else v for name, v in views.items()})


def _rest(arguments: dict[str, Any]) -> None:
    """What padding keeps: its potentials, and sums of 1."""
    for new, old, sums in (("u_out", "u", "rho"), ("v_out", "v", "gamma")):
        if new in arguments:
            arguments[new].copy_(arguments[old])
            arguments[sums].fill_(1.0)


def _half_steps(run: Run, own: dict[str, Any]) -> None:
    u, b, scale = own["u"], own["b"], own["scale"][:, None]
    left, right = left_factor(own["x"], u, scale[..., None]), right_factor(own["y"], masked(own["v"], b))
    sums = _weighted(torch.bmm(left, right.mT).exp2_(), b)
    logs, sums = _log_sums(sums, run.rows, left, right, b)
    _write(run.rows, _updated(u, logs, own["x_sq"], scale, own["damping"], own["step"]), sums, own["u_out"], own["rho"])


def _own_steps(run: Run, own: dict[str, Any]) -> None:
    _half_steps(run, {**own, "v": own["u"], "b": own["a"]})


def _symmetric_steps(run: Run, own: dict[str, Any]) -> None:
    x, y, u, v, a, b, step = (own[name] for name in ("x", "y", "u", "v", "a", "b", "step"))
    scale = own["scale"][:, None]
    left = left_factor(x, u.where(run.rows, NEVER), scale[..., None])
    right = right_factor(y, v.where(run.columns, NEVER))
    p = torch.bmm(left, right.mT).exp2_()
    rho, gamma = _weighted(p, b), _weighted(p.mT, a)
    logs, rho = _log_sums(rho, run.rows, left, right_factor(y, masked(v, b)), b)
    across, gamma = _log_sums(gamma, run.columns, right, left_factor(x, masked(u, a), scale[..., None]), a)
    _write(run.rows, _updated(u, logs, own["x_sq"], scale, own["damping_a"], step), rho, own["u_out"], own["rho"])
    _write(run.columns, _updated(v, across, own["y_sq"], scale, own["damping_b"], step), gamma, own["v_out"], own["gamma"])


def _products(run: Run, own: dict[str, Any]) -> None:
    a, b = own["a"], own["b"]
    own["out"].copy_(torch.bmm(_exponentials(own), own["values"] * b[..., None]).mul_(a[..., None]))


def _both_products(run: Run, own: dict[str, Any]) -> None:
    p, a, b = _exponentials(own), own["a"][..., None], own["b"][..., None]
    own["out"].copy_(torch.bmm(p, own["values"] * b).mul_(a))
    own["out_t"].copy_(torch.bmm(p.mT, own["values_t"] * a).mul_(b))


def _exponentials(own: dict[str, Any]) -> Tensor:
    """2^S, zero where a weight is."""
    left = left_factor(own["x"], masked(own["u"], own["a"]), own["scale"][:, None, None])
    return torch.bmm(left, right_factor(own["y"], masked(own["v"], own["b"])).mT).exp2_()


def _weighted(p: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(p, weights[..., None])[..., 0]


def _log_sums(sums: Tensor, inside: Tensor, left: Tensor, right: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log2 of `sums`, `sums`); when one inside is out of range, those are taken from a second round with the running maximum."""
    trusted = (sums > LOWEST) & (sums < HIGHEST) | ~inside
    if bool(trusted.all()):
        return sums.log2(), sums
    scores = torch.bmm(left, right.mT)
    top = scores.amax(2)
    logs = top + _weighted(scores.sub_(top[..., None]).exp2_(), weights).log2()
    logs = torch.where(trusted, sums.log2(), logs)
    return logs, torch.where(trusted, sums, logs.exp2())


def _updated(u: Tensor, log_rho: Tensor, x_sq: Tensor, scale: Tensor, damping: Tensor, step: float) -> Tensor:
    out = torch.empty_like(u)
    chunked.update(u, log_rho, x_sq, scale, damping[:, None], step, out)
    return out


def _write(inside: Tensor, potentials: Tensor, sums: Tensor, out: Tensor, sums_out: Tensor) -> None:
    out.copy_(torch.where(inside, potentials, out))
    sums_out.copy_(torch.where(inside, sums, sums_out))
