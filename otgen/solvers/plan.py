"""The plan without its matrix: draws from it and the largest entries of its rows, in O((n + m + k) d) memory.

Entries are read off tiles of scores,  P_ij = 2^(u_i + log2 a_i + scale·<x_i, y_j> + v_j + log2 b_j),  with a weight of zero an
exact zero (`otgen.chunked`). A pair with replacement costs one uniform number a tile, not one a column: the tile that holds j is
chosen while tiles go by, each with its share of what went by so far (Chao 1982), and j by inversion inside it. Distinct pairs are
draws less the repeated ones, the last of them the largest log P_ij plus independent Gumbel variables (Vieira 2014; Kool, van Hoof
and Welling 2019).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from otgen import ops
from otgen.chunked import CPU_TILE, GPU_TILE, NEVER, left_factor, masked, right_factor, score_tiles
from otgen.errors import InputError
from otgen.solvers.inputs import Given
from otgen.solvers.solution import Solution
from otgen.solvers.steps import scale

WIDTH = 4000
"""Columns of a tile that is drawn from. Unlike the tiles of `otgen.chunked` these ignore the threads, so that draws do too."""

ROUNDS = 8
"""Tries at distinct pairs, each a sweep over the rows drawn. A sweep with a Gumbel variable a pair costs a CPU fifty of them."""


def sample(solution: Solution, given: Given, k: int, generator: torch.Generator | None, replace: bool) -> tuple[Any, Any]:
    """k pairs (i, j) from P/ΣP: what `OTResult.sample` documents."""
    k = count(k)
    check_generator(generator, solution.clouds.x.device)
    _refuse_nan(solution)
    i, j = _with_replacement(solution, k, generator) if replace else _distinct(solution, k, generator)
    return _indices(given, i), _indices(given, j)


def follow(solution: Solution, i: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(k,): a column drawn from each row of the plan in `i` (k,), which may repeat; rows without mass go where they would."""
    c, (u, v) = solution.clouds, (solution.outcome.u, solution.outcome.v)
    unit, _ = ops.sinkhorn_half_step(c.x, c.y, u, v, c.b, c.x_sq, scale=scale(solution.eps), modes=solution.steps.modes)
    return _columns(solution, unit, i, generator)


def top_k(solution: Solution, given: Given, k: int) -> tuple[Any, Any]:
    """The k largest entries of each row: what `OTResult.top_k` documents."""
    _refuse_nan(solution)
    left, right, a = _log_plan(solution)
    k, m = count(k), right.shape[0]
    if k > m:
        raise InputError(f"expected k of at most {m}, the points of X_b; got {k}; type k={m}")
    best = left.new_full((left.shape[0], k), -torch.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    for rows, columns, tile in score_tiles(left, right):
        scores, at = tile.topk(min(k, tile.shape[1]), 1)
        best[rows], kept = torch.cat((best[rows], scores), 1).topk(k, 1)
        index[rows] = torch.cat((index[rows], at + columns.start), 1).gather(1, kept)
    return given.answer(torch.where(a[:, None] > 0, best.exp2_(), 0.0)), _indices(given, index)


def argmax(solution: Solution, given: Given) -> Any:
    """(n,): the column of the largest entry of each row."""
    _refuse_nan(solution)
    left, right, _ = _log_plan(solution)
    return _indices(given, largest(left, right))


def largest(left: Tensor, right: Tensor) -> Tensor:
    """(n,): the column of the largest entry of each row of left·rightᵀ, the first of equals."""
    best = left.new_full(left.shape[:1], -torch.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    for rows, columns, tile in score_tiles(left, right):
        top, at = tile.max(1)
        better = top > best[rows]
        best[rows] = torch.where(better, top, best[rows])
        index[rows] = torch.where(better, at + columns.start, index[rows])
    return index


def draw(weights: Tensor, k: int, generator: torch.Generator | None, *, replace: bool) -> Tensor:
    """(k,): indices drawn in proportion to `weights` (n,), float64 and not negative; distinct ones by successive draws."""
    if not replace:
        race = torch.empty_like(weights).exponential_(generator=generator)
        return (weights.log() - race.log()).topk(k).indices
    cumulative = weights.cumsum(0)
    target = torch.rand(k, generator=generator, dtype=torch.float64, device=weights.device) * cumulative[-1]
    return torch.searchsorted(cumulative, _below(target, cumulative[-1]), right=True)


def count(k: Any, name: str = "k") -> int:
    """k as an integer of at least 1; `name` is what the caller calls it."""
    try:
        number = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"expected an integer of at least 1 for {name}; got {k!r}; type for example {name}=10")
    return number


def check_generator(generator: Any, device: torch.device) -> None:
    """Raise InputError for what `torch.rand` on `device` cannot draw from."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        came = type(generator).__name__
        raise InputError(f"expected a torch.Generator; got {came}; type generator=torch.Generator({str(device)!r}).manual_seed(0)")
    if generator.device.type != device.type:
        raise InputError(
            f"expected a generator on the points' device {device}; got one on {generator.device}; "
            f"type torch.Generator({str(device)!r}).manual_seed(0)"
        )


def _refuse_nan(solution: Solution) -> None:
    r = solution.outcome.r
    if not bool(r.isfinite().all() & (r.sum() > 0)):
        raise InputError(
            f"expected a plan with finite marginals and some mass; got one that stopped by {solution.outcome.stop!r}; "
            "raise reg, or pass float64 points"
        )


def _indices(given: Given, index: Tensor) -> Any:
    return index.numpy() if given.numpy else index


def _log_plan(solution: Solution) -> tuple[Tensor, Tensor, Tensor]:
    """(left, right, a) with left·rightᵀ = log2 P_ij, but for rows without weight: theirs are as if it were 1."""
    c, outcome = solution.clouds, solution.outcome
    u = torch.where(c.a > 0, outcome.u + c.a.log2(), outcome.u)
    return left_factor(c.x, u, scale(solution.eps)), right_factor(c.y, masked(outcome.v + c.b.log2(), c.b)), c.a


def _with_replacement(solution: Solution, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The row sums r of the plan are known, so a row costs no sweep, and neither does the shift that makes its own sum 1."""
    r, a = solution.outcome.r, solution.clouds.a
    i = draw(r.double(), k, generator, replace=True)
    unit = torch.where(r > 0, solution.outcome.u - (r / a).log2(), 0.0)
    return i, _columns(solution, unit, i, generator)


def _columns(solution: Solution, unit: Tensor, i: Tensor, generator: torch.Generator | None) -> Tensor:
    """(k,): a column for each row in `i` (k,), with probability b_j·2^(unit_i + v_j + scale·<x_i, y_j>), whose sum is about 1."""
    c = solution.clouds
    i, order = i.sort()
    visited, line = torch.unique_consecutive(i, return_inverse=True)
    left = left_factor(c.x[visited], unit[visited], scale(solution.eps))
    right = right_factor(c.y, masked(solution.outcome.v + c.b.log2(), c.b))
    height, width = _drawn_tile(right)
    starts = range(0, len(visited), height)
    ends = torch.searchsorted(line, torch.tensor([start + height for start in starts], device=line.device)).tolist()
    found = torch.empty_like(i)
    for start, first, last in zip(starts, [0, *ends], ends):
        at = line[first:last] - start
        seen = torch.zeros(min(height, len(visited) - start), dtype=torch.float64, device=i.device)
        for j in range(0, len(right), width):
            tile = torch.mm(left[start : start + height], right[j : j + width].T).exp2_()
            sums = tile.sum(1).double()
            seen += sums
            target = torch.rand(len(at), generator=generator, dtype=torch.float64, device=i.device) * seen[at]
            hit = torch.nonzero(target < sums[at]).squeeze(1)
            lines, among = torch.unique(at[hit], return_inverse=True)
            found[first + hit] = j + _first_above(tile[lines].double().cumsum_(1), among, target[hit])
    return torch.empty_like(found).scatter_(0, order, found)


def _first_above(cumulative: Tensor, line: Tensor, target: Tensor) -> Tensor:
    """(h,): where row `line` (h,) of `cumulative` (r, w) first exceeds `target` (h,): never at a weight of zero."""
    target = _below(target, cumulative[line, -1])
    low, high = torch.zeros_like(line), torch.full_like(line, cumulative.shape[1] - 1)
    for _ in range(cumulative.shape[1].bit_length()):
        middle = (low + high) // 2
        above = cumulative[line, middle] > target
        low, high = torch.where(above, low, middle + 1), torch.where(above, middle, high)
    return high


def _below(target: Tensor, total: Tensor) -> Tensor:
    """`target`, kept under `total`, which rounding may let it reach."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _distinct(solution: Solution, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draws with replacement, less those met before, and what ROUNDS of them leave to find by one sweep over all pairs."""
    m = len(solution.clouds.y)
    pairs = int((solution.clouds.a > 0).sum()) * int((solution.clouds.b > 0).sum())
    if k > pairs:
        raise InputError(f"expected at most {pairs} distinct pairs, as many as have weight; got k={k}; type replace=True")
    flat = torch.empty(0, dtype=torch.int64, device=solution.clouds.x.device)
    for _ in range(ROUNDS):
        i, j = _with_replacement(solution, 2 * (k - len(flat)), generator)
        flat = _first_met(torch.cat((flat, i * m + j)))[:k]
        if len(flat) == k:
            break
    else:
        raced = _raced(solution, k, generator)
        flat = torch.cat((flat, raced[~torch.isin(raced, flat)]))[:k]
    return flat // m, flat % m


def _first_met(values: Tensor) -> Tensor:
    """The distinct `values` in the order they first come in."""
    found, which = torch.unique(values, return_inverse=True)
    at = torch.arange(len(values), device=values.device)
    return values[torch.full_like(found, len(values)).scatter_reduce_(0, which, at, "amin").sort().values]


def _raced(solution: Solution, k: int, generator: torch.Generator | None) -> Tensor:
    """(k,): i·m + j of the largest log P_ij + Gumbel, in descending order: what k distinct draws are in law.

    In float64: the upper tail of Gumbel variables in float32, where the largest of n·m are, has few values.
    """
    left, right, a = _log_plan(solution)
    left[:, -2] = masked(left[:, -2], a)
    height, width = _drawn_tile(right)
    best = left.new_empty(0, dtype=torch.float64)
    flat = torch.empty_like(best, dtype=torch.int64)
    for i in range(0, len(left), height):
        for j in range(0, len(right), width):
            keys = torch.mm(left[i : i + height], right[j : j + width].T).double()
            keys.sub_(torch.empty_like(keys).exponential_(generator=generator).log2_())
            rows, columns = torch.nonzero(keys > (best[-1] if len(best) == k else NEVER / 2), as_tuple=True)
            best, kept = torch.cat((best, keys[rows, columns])).sort(descending=True)
            best, flat = best[:k], torch.cat((flat, (i + rows) * len(right) + j + columns))[kept[:k]]
    return flat


def _drawn_tile(right: Tensor) -> tuple[int, int]:
    """Height and width of the tiles that are drawn from."""
    width = min(WIDTH, len(right))
    return max(1, (CPU_TILE if right.device.type == "cpu" else GPU_TILE) // width), width
