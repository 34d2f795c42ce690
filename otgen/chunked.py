"""The launches of the kernel families in plain PyTorch, streamed: O((n + m) d) memory, any device, float32 and float64.

Each function takes the keyword arguments of the rendered module it stands for (`otgen.families`), and fills the same outputs. The
score matrix exists one tile at a time, sized to stay in cache. With [scale·x, u, 1]·[y, 1, v] = S one matrix product yields a tile
of finished scores, then one ``exp2_`` in place and a matrix-vector product: nothing else is done per pair. Notation and formulas:
`otgen.families.sinkhorn`; a sum whose shift is too far off is redone with the running maximum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LOWEST, HIGHEST = 2.0**-80, 2.0**120
"""Sums of shifted exponentials outside this range are redone: nearer to float32's limits, terms that matter are lost."""

NEVER = -1e30
"""The potential of a point without weight: its exponentials are exact zeros, and it never is a maximum."""

CPU_TILE = 1 << 18
"""Pairs in a tile, for each thread: a megabyte in float32, a core's second-level cache."""

GPU_TILE = 1 << 24

SLOW_STRIDE = 512
"""A row stride that is a multiple of this makes MKL's narrow products up to five times slower (same cache sets)."""


def half_step(
    *,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    b: Tensor,
    x_sq: Tensor,
    u_out: Tensor,
    rho: Tensor,
    scale: float,
    damping: float = 1.0,
    step: float = 1.0,
) -> None:
    """The alternating update of `u` (n,) and the row sums `rho` (n,) at the pair that came in."""
    left, right = left_factor(x, u, scale), right_factor(y, masked(v, b))
    rho.zero_()
    for rows, columns, tile in score_tiles(left, right):
        rho[rows].addmv_(tile.exp2_(), b[columns])
    log_rho = log_sums(rho, left, right, b)
    update(u, log_rho, x_sq, scale, damping, step, u_out)


def symmetric_step(
    *,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    x_sq: Tensor,
    y_sq: Tensor,
    u_out: Tensor,
    v_out: Tensor,
    rho: Tensor,
    gamma: Tensor,
    scale: float,
    damping_a: float = 1.0,
    damping_b: float = 1.0,
    step: float = 0.5,
) -> None:
    """Both potentials from the old pair, with row sums `rho` (n,) and column sums `gamma` (m,) of the same exponentials."""
    left, right = left_factor(x, u, scale), right_factor(y, v)
    rho.zero_()
    gamma.zero_()
    for rows, columns, tile in score_tiles(left, right):
        rho[rows].addmv_(tile.exp2_(), b[columns])
        gamma[columns].addmv_(tile.T, a[rows])
    log_rho = log_sums(rho, left, right_factor(y, masked(v, b)), b)
    log_gamma = log_sums(gamma, right, left_factor(x, masked(u, a), scale), a)
    update(u, log_rho, x_sq, scale, damping_a, step, u_out)
    update(v, log_gamma, y_sq, scale, damping_b, step, v_out)


def own_step(
    *,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    a: Tensor,
    x_sq: Tensor,
    u_out: Tensor,
    rho: Tensor,
    scale: float,
    damping: float = 1.0,
    step: float = 0.5,
) -> None:
    """The update of the one potential `u` (n,) of a measure's transport to itself, and the row sums `rho`, from half of the scores.

    y  the points of x as right factors: x itself, or with label costs what makes the scores symmetric
    """
    left, right = left_factor(x, u, scale), right_factor(y, u)
    rho.zero_()
    for rows, columns, tile in score_tiles(left, right, later=True):
        rho[rows].addmv_(tile.exp2_(), a[columns])
        after = max(rows.stop - columns.start, 0)
        if after < tile.shape[1]:
            rho[columns][after:].addmv_(tile[:, after:].T, a[rows])
    log_rho = log_sums(rho, left, right_factor(y, masked(u, a)), a)
    update(u, log_rho, x_sq, scale, damping, step, u_out)


def apply_vector(
    *, x: Tensor, y: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, values: Tensor, out: Tensor, scale: float
) -> None:
    """P·values for one vector (m,) → (n,)."""
    apply_matrix(x=x, y=y, u=u, v=v, a=a, b=b, values=values[:, None], out=out[:, None], scale=scale)


def apply_matrix(
    *, x: Tensor, y: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, values: Tensor, out: Tensor, scale: float
) -> None:
    """P·values for any number of columns, (m, k) → (n, k)."""
    weighted = values * b[:, None]
    out.zero_()
    for rows, columns, tile in score_tiles(left_factor(x, masked(u, a), scale), right_factor(y, masked(v, b))):
        out[rows].addmm_(tile.exp2_(), weighted[columns])
    out.mul_(a[:, None])


def apply_both(
    *,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    values_t: Tensor,
    out: Tensor,
    out_t: Tensor,
    scale: float,
) -> None:
    """P·values (n, k) and Pᵀ·values_t (m, k) from the same exponentials."""
    weighted, weighted_t = values * b[:, None], values_t * a[:, None]
    out.zero_()
    out_t.zero_()
    for rows, columns, tile in score_tiles(left_factor(x, masked(u, a), scale), right_factor(y, masked(v, b))):
        out[rows].addmm_(tile.exp2_(), weighted[columns])
        out_t[columns].addmm_(tile.T, weighted_t[rows])
    out.mul_(a[:, None])
    out_t.mul_(b[:, None])


def gradient(
    *,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    marginal: Tensor,
    out: Tensor,
    scale: float,
    cost: float = 1.0,
) -> None:
    """The derivative of the transport cost in x, (n, d), by the envelope theorem."""
    apply_matrix(x=x, y=y, u=u, v=v, a=a, b=b, values=y, out=out, scale=scale)
    torch.sub(marginal[:, None] * x, out, out=out).mul_(2.0 * cost)


def matvec(
    *,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    left: Tensor,
    right: Tensor,
    w: Tensor,
    z: Tensor,
    out: Tensor,
    scale: float,
    alpha: float,
    beta: float,
) -> None:
    """beta·z + alpha·left ∘ (2^S (right ∘ w)), (n,)."""
    apply_vector(x=x, y=y, u=u, v=v, a=left, b=right, values=w, out=out, scale=scale)
    out.mul_(alpha).add_(z, alpha=beta)


def assemble(
    *,
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
    out: Tensor,
    scale: float,
    cost: float,
    inverse_eps: float,
) -> None:
    """The Hessian's product with `direction`, (n, d), from the solution (w_f, w_g) of the linearised marginal equations."""
    constant = w_f - 2.0 * cost * (x * direction).sum(1)
    factors = score_tiles(left_factor(direction, constant, 2.0 * cost), right_factor(y, w_g))
    plan = score_tiles(left_factor(x, masked(u, a), scale), right_factor(y, masked(v, b)))
    weighted = torch.cat((y, torch.ones_like(b)[:, None]), 1) * b[:, None]
    sums = torch.zeros_like(x[:, :1]).repeat(1, x.shape[1] + 1)
    for (rows, columns, tile), (_, _, factor) in zip(plan, factors):
        sums[rows].addmm_(tile.exp2_().mul_(factor), weighted[columns])
    sums *= a[:, None]
    curvature = x * sums[:, -1:] - sums[:, :-1]
    out.copy_(2.0 * cost * (marginal[:, None] * direction + inverse_eps * curvature))


def exponentials(x: Tensor, y: Tensor, u: Tensor, v: Tensor, scale: float | Tensor, *, out: Tensor) -> None:
    """2^S, (…, n, m), all at once; for a batch `scale` is (batch, 1)."""
    scale = scale[..., None] if isinstance(scale, Tensor) else scale
    torch.matmul(left_factor(x, u, scale), right_factor(y, v).mT, out=out).exp2_()


def left_factor(x: Tensor, u: Tensor, scale: float | Tensor) -> Tensor:
    """[scale·x, u, 1], (…, n, d + 2); for a batch `scale` is (batch, 1, 1)."""
    d = x.shape[-1]
    left = x.new_empty((*x.shape[:-1], d + 2))
    torch.mul(x, scale, out=left[..., :d])
    left[..., d] = u
    left[..., d + 1] = 1.0
    return left


def right_factor(y: Tensor, v: Tensor) -> Tensor:
    """[y, 1, v], (…, m, d + 2)."""
    d = y.shape[-1]
    right = y.new_empty((*y.shape[:-1], d + 2))
    right[..., :d] = y
    right[..., d] = 1.0
    right[..., d + 1] = v
    return right


def masked(potential: Tensor, weights: Tensor) -> Tensor:
    """`potential`, and NEVER where the weight is zero."""
    return torch.where(weights != 0, potential, NEVER)


def score_tiles(left: Tensor, right: Tensor, *, later: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of left·rightᵀ with their rows and columns. A tile may be overwritten, and is, by the next one.

    later  leaves out the columns before the first row of each tile: n = m
    """
    n, m = left.shape[0], right.shape[0]
    height, width = _tile(n, m, CPU_TILE * torch.get_num_threads() if left.device.type == "cpu" else GPU_TILE)
    store = left.new_empty(height * width)
    for i in range(0, n, height):
        rows = slice(i, min(i + height, n))
        for j in range(i if later else 0, m, width):
            columns = slice(j, min(j + width, m))
            shape = rows.stop - i, columns.stop - j
            yield rows, columns, torch.mm(left[rows], right[columns].T, out=store[: shape[0] * shape[1]].view(shape))


def _tile(n: int, m: int, area: int) -> tuple[int, int]:
    """Height and width of the tiles, about `area` in size: evenly cut and never of a slow stride."""
    height = _even(n, max(256, area // m))
    width = _even(m, max(1, area // height))
    while width % SLOW_STRIDE == 0:
        width = _even(m, width - 1)
    return height, width


def _even(total: int, limit: int) -> int:
    """The length of the fewest equal pieces of `total` that are no longer than `limit`."""
    return -(-total // -(-total // limit))


def log_sums(sums: Tensor, left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """log2 of `sums` = 2^(left·rightᵀ)·weights, after those out of range were redone, in place, with the running maximum.

    right  carries NEVER where `weights` are zero
    """
    smallest, largest = torch.aminmax(sums)
    if bool((smallest > LOWEST) & (largest < HIGHEST)):
        return sums.log2()
    lost = torch.nonzero(~((sums > LOWEST) & (sums < HIGHEST))).squeeze(1)
    left = left[lost]
    top = torch.full_like(lost, -torch.inf, dtype=sums.dtype)
    total = torch.zeros_like(top)
    for rows, columns, tile in score_tiles(left, right):
        higher = torch.maximum(top[rows], tile.amax(1))
        total[rows].mul_(torch.exp2(top[rows] - higher)).addmv_(tile.sub_(higher[:, None]).exp2_(), weights[columns])
        top[rows] = higher
    logs = sums.log2()
    logs[lost] = top + total.log2()
    sums[lost] = torch.exp2(logs[lost])
    return logs


def update(
    u: Tensor, log_rho: Tensor, x_sq: Tensor, scale: float | Tensor, damping: float | Tensor, step: float, out: Tensor
) -> None:
    """The damped and averaged update of `otgen.families.sinkhorn`; of a batch with numbers (batch, 1)."""
    torch.sub(u, log_rho, out=out)
    if isinstance(damping, Tensor) or damping != 1.0:
        out.mul_(damping).sub_((1.0 - damping) * scale / 2 * x_sq)
    if step != 1.0:
        torch.lerp(u, out, step, out=out)
