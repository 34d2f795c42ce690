"""Rows that visit listed columns only: what the flag ``listed`` adds to the alternating update of `otgen.families.sinkhorn`.

    rho_i = Σ over j in the list of i's block, b_j 2^S_ij;   rho_i = Σ_j b_j 2^S_ij where that is not above floor_i, or out of range

Rows and columns come in blocks of so many points as the flag says, neighbours together (`otgen.halving`). Block I of rows visits
the blocks of columns ``columns[starts[I]] … columns[starts[I + 1] − 1]``, each once, in any order. What a list leaves out is
bounded by whoever makes it (`otgen.launched`): floor_i is that bound over the share of a sum that may be missing, so that a row is
right to this share, or complete, whatever its list. Nobody has to look whether it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from otgen.families import tiles
from otgen.problem import Argument, Problem, Spec, Sweep, Value, Variant

if TYPE_CHECKING:
    import torch

DIMENSIONS = 8
"""Beyond these, boxes around neighbours are as wide as the cloud, and bounds say nothing."""

WIDTH = 128
"""Points of a block, unless somebody asks for another number: the standard set's, and the solvers'."""

NARROWEST = 32
"""Points of a block at least: below, a tile of four warps is wider than a block."""

ASSUMED_VISITED = 0.1
"""Share of the columns that a list holds, to the model and where kernels are timed. An assumption: it depends on the clouds and the
regularisation. With blocks of 128 points 10 % of three-dimensional clouds were visited at a blur of .02 (docs/skipping.md)."""


def misfit(problem: Problem, variant: Variant) -> str:
    """Why rows of `problem` cannot visit listed columns in this way, or "" (also where they visit all)."""
    width = problem.listed
    if width == 1:
        return ""
    if problem.flag("schedule") != "alternating" or problem.batch > 1:
        return "lists are of the alternating update of one problem"
    if problem.d > DIMENSIONS:
        return f"tiles that hold nothing can be told in at most {DIMENSIONS} dimensions"
    if width < NARROWEST or width & (width - 1):
        return f"a block has a power of two of points, {NARROWEST} at least"
    if variant["stabiliser"] != "shifted":
        return "what is left out is bounded under a common shift"
    if max(variant.int("BLOCK_M"), variant.int("BLOCK_N")) > width:
        return "a tile is a part of a block of rows and a block of columns"
    return ""


def arguments(of: Callable[[Problem], dict[str, Argument]]) -> Callable[[Problem], dict[str, Argument]]:
    """`of` with and without lists: they come in after the other tensors."""

    def listed(problem: Problem) -> dict[str, Argument]:
        whole = of(problem)
        if problem.listed == 1:
            return whole
        rows, columns = blocks(problem)
        entries = rows * max(1, round(ASSUMED_VISITED * columns))
        lists = {"starts": Spec((rows + 1,), "int32"), "columns": Spec((entries,), "int32"), "floor": Spec((problem.n,))}
        tensors = {name: value for name, value in whole.items() if isinstance(value, Spec)}
        return {**tensors, **lists, **{name: value for name, value in whole.items() if name not in tensors}}

    return listed


def blocks(problem: Problem) -> tuple[int, int]:
    """Blocks of rows and of columns."""
    return ceil(problem.n / problem.listed), ceil(problem.m / problem.listed)


def standard(d: int) -> tuple[Mapping[str, Value], ...]:
    """The flags of what is tuned with lists when nobody asks for others."""
    return ({"schedule": "alternating", "listed": WIDTH},) if d <= DIMENSIONS else ()


def sweep(problem: Problem, whole: Sweep) -> Sweep:
    """`whole`, the sweep of all columns, as the model takes it to be with lists."""
    return whole if problem.listed == 1 else replace(whole, tiles=whole.tiles * ASSUMED_VISITED)


def inputs(problem: Problem, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """`given` with lists of half of the tiles, in no order, of the second block none; some rows have a floor above their sum."""
    import torch

    from otgen.chunked import HIGHEST

    generator = torch.Generator().manual_seed(seed)
    rows, columns = blocks(problem)
    visited = torch.rand(rows, columns, generator=generator) < 0.5
    visited[0, 0] = True
    visited[1:2] = False
    order = [torch.randperm(columns, generator=generator) for _ in range(rows)]
    chosen = [one[own[one]] for one, own in zip(order, visited)]
    starts = torch.tensor([0, *(len(own) for own in chosen)]).cumsum(0)
    found = {**given, "starts": starts, "columns": torch.cat(chosen), "floor": torch.zeros_like(given["u"])}
    sums = torch.exp2(_log_sums(problem, found)[0]).clamp(max=HIGHEST)
    floor = torch.zeros_like(sums)
    floor[2::3], floor[4::7] = sums[2::3] / 2, 2 * sums[4::7]
    return {**found, "floor": floor.float().double()}


def bands(problem: Problem) -> dict[str, Any]:
    """Lists of ASSUMED_VISITED of the columns, those that lie where the rows do in their cloud, and floors of zero."""
    import torch

    rows, columns = blocks(problem)
    each = max(1, round(ASSUMED_VISITED * columns))
    first = torch.arange(rows) * columns // rows
    entries = (first[:, None] + torch.arange(each)) % columns
    floor = torch.zeros(problem.n, dtype=torch.float64)
    return {"starts": torch.arange(rows + 1) * each, "columns": entries.flatten(), "floor": floor}


def log_sums(problem: Problem, given: Mapping[str, Any]) -> torch.Tensor:
    """log2 rho (n,): over the list where that is above the floor and in range, else over all columns.

    Where `given` has ``places`` (n,), its rows are those of a larger problem, of which it has the lists and the floors.
    """
    import torch

    from otgen.chunked import HIGHEST, LOWEST

    listed, whole = _log_sums(problem, given)
    rho = torch.exp2(listed)
    trusted = (rho > given["floor"][_places(problem, given)]) & (rho >= LOWEST) & (rho <= HIGHEST)
    return torch.where(trusted, listed, whole)


def _log_sums(problem: Problem, given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """log2 of the sums over the listed and over all columns."""
    import torch

    exponents = tiles.scores(given) * tiles.LN2 + given["b"].log()
    masked = torch.where(_visited(problem, given), exponents, -torch.inf)
    return torch.logsumexp(masked, 1) / tiles.LN2, torch.logsumexp(exponents, 1) / tiles.LN2


def _visited(problem: Problem, given: Mapping[str, Any]) -> torch.Tensor:
    """(n, m): whether a row's list holds a column."""
    import torch

    counts = given["starts"].diff()
    found = torch.zeros(len(counts), blocks(problem)[1], dtype=torch.bool)
    found[torch.arange(len(counts)).repeat_interleave(counts), given["columns"]] = True
    rows = found[_places(problem, given) // problem.listed]
    return rows.repeat_interleave(problem.listed, 1)[:, : problem.m]


def _places(problem: Problem, given: Mapping[str, Any]) -> torch.Tensor:
    import torch

    places: torch.Tensor = given["places"] if "places" in given else torch.arange(problem.n)
    return places
