"""The transport plan applied:  (P·values)_i = a_i Σ_j b_j 2^S_ij values_j,  S_ij = u_i + v_j + scale·<x_i, y_j>.

Outputs: a *vector* (values (m,)), a *matrix* of any width k (values (m, k)), or the *gradient* of the transport cost in x,
2·s·(r_i x_i − (P·y)_i) with r the row marginal (envelope theorem). Pᵀ·values is the same problem with the sides swapped. *both* are
P·values and Pᵀ·values_t, matrices of one width, for values (m, k) and values_t (n, k).
Scaled potentials, and batches, as in `otgen.families.sinkhorn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from otgen.families import batches, splits, tiles
from otgen.problem import Argument, Family, Problem, Spec, Sweep, Value, Variant, Work

if TYPE_CHECKING:
    from otgen.gpus import Gpu


FUSIONS = ("two_launches", "one_sweep")
"""How both products are divided among launches."""


def width(problem: Problem) -> int:
    """Columns of the output."""
    return problem.d if problem.flag("output") == "gradient" else int(problem.flag("width"))


def axes(problem: Problem) -> dict[str, tuple[Value, ...]]:
    common: dict[str, tuple[Value, ...]] = {**tiles.tile_axes(problem), **splits.AXIS}
    if problem.flag("output") != "vector":
        common["BLOCK_W"] = tiles.width_axis(width(problem))
    return {**common, "fusion": FUSIONS} if problem.flag("output") == "both" else common


def fits(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    if problem.flag("output") not in ("matrix", "both") and problem.flag("width") != 1:
        return "only a matrix has a width"
    if problem.flag("output") == "both":
        misfit = _both_misfit(variant, gpu)
        if misfit:
            return misfit
    return splits.misfit(problem, variant, width(problem)) or tiles.tile_misfit(problem, variant, gpu)


def _both_misfit(variant: Variant, gpu: Gpu) -> str:
    block_m, block_n, block_w = (variant.int(axis) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_W"))
    if variant["fusion"] == "two_launches":
        return "" if splits.splits(variant) == 1 else "the columns of one application are the rows of the other"
    if variant["stabiliser"] != "shifted":
        return "sums over rows that are added by many programs are taken under a common shift"
    if block_m * block_n + (block_m + block_n) * block_w > tiles.TILE_REGISTERS * variant.int("num_warps") * gpu.warp_size:
        return f"the score tile and both outputs need more than {tiles.TILE_REGISTERS} registers a thread"
    return ""


def default(problem: Problem) -> Variant:
    tile = {**tiles.default_tile(problem), "SPLITS": 1}
    if problem.flag("output") == "vector":
        return Variant(tile)
    both: dict[str, Value] = {"fusion": FUSIONS[0]} if problem.flag("output") == "both" else {}
    return Variant(tile, BLOCK_W=min(32, tiles.power_of_two(width(problem))), **both)


@batches.arguments
def arguments(problem: Problem) -> dict[str, Argument]:
    n, m = problem.n, problem.m
    x, y, row, column = tiles.points(n, problem), tiles.points(m, problem), Spec((n,)), Spec((m,))
    plan: dict[str, Argument] = {"x": x, "y": y, "u": row, "v": column, "a": row, "b": column}
    if problem.flag("output") == "gradient":
        return {**plan, "marginal": row, "out": Spec((n, problem.d), role="out"), "scale": 1.0, "cost": 1.0}
    tail = () if problem.flag("output") == "vector" else (width(problem),)
    values, out = Spec((m, *tail)), Spec((n, *tail), role="out")
    if problem.flag("output") == "both":
        transposed = {"values_t": Spec((n, *tail)), "out": out, "out_t": Spec((m, *tail), role="out")}
        return {**plan, "values": values, **transposed, "scale": 1.0}
    return {**plan, "values": values, "out": out, "scale": 1.0}


def work(problem: Problem, variant: Variant) -> Work:
    if problem.flag("output") == "vector":
        return Work(splits.launches(tiles.sweep(problem.n, problem.m, variant, batch=problem.batch), variant, 1))
    own = problem.flag("output") == "gradient" and tiles.reuses_columns(problem, variant)
    sweep = tiles.sweep(problem.n, problem.m, variant, width(problem), problem.batch)
    block = variant.int("BLOCK_W")
    if problem.flag("output") == "both":
        return _both_work(problem, variant, sweep)
    return Work(splits.launches(sweep, variant, block), width=block, own_values=own)


def _both_work(problem: Problem, variant: Variant, rows: Sweep) -> Work:
    block = variant.int("BLOCK_W")
    columns = tiles.sweep(problem.m, problem.n, variant, width(problem), problem.batch)
    if variant["fusion"] == "two_launches":
        return Work((rows, columns), width=block)
    parts = splits.splits(variant)
    sweep = replace(rows, programs=rows.programs * parts, tiles=ceil(rows.tiles / parts))
    merges = replace(rows, tiles=0, shares=parts * block), replace(columns, tiles=0, shares=block)
    return Work((sweep, *merges), width=2 * block, added=block)


@batches.inputs
def inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """Almost solved clouds; one column of zero weight has a potential that would overflow if it were looked at."""
    import torch

    given = tiles.clouds(problem, seed)
    given["v"][given["b"] == 0] = 500.0
    generator = torch.Generator().manual_seed(seed + 1)
    tail = () if problem.flag("output") == "vector" else (width(problem),)
    given["values"] = torch.randn(problem.m, *tail, generator=generator, dtype=torch.float64).float().double()
    given["values_t"] = torch.randn(problem.n, *tail, generator=generator, dtype=torch.float64).float().double()
    given["marginal"] = tiles.plan(given).sum(1).float().double()
    return given


@batches.reference
def reference(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
    plan = tiles.plan(given)
    if problem.flag("output") == "gradient":
        return {"out": 2.0 * given["cost"] * (given["marginal"][:, None] * given["x"] - plan @ given["y"])}
    if problem.flag("output") == "both":
        return {"out": plan @ given["values"], "out_t": plan.T @ given["values_t"]}
    return {"out": plan @ given["values"]}


@batches.budget
def budget(problem: Problem, variant: Variant, given: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Each term of the sum moves by the relative budget, so the sum by that share of its absolute terms."""
    gradient, plan, share = problem.flag("output") == "gradient", tiles.plan(given), tiles.relative_budget(variant, given)
    terms = {"out": plan @ (given["y"] if gradient else given["values"]).abs() * (2.0 * given["cost"] if gradient else 1.0)}
    if problem.flag("output") == "both":
        terms["out_t"] = plan.T @ given["values_t"].abs()
    return {name: share * float(terms[name].max()) + tiles.FP32_SLACK * float(of.abs().max()) for name, of in expected.items()}


def standard(n: int, m: int, d: int) -> tuple[Mapping[str, Value], ...]:
    return {"output": "vector"}, {"output": "matrix", "width": d}, {"output": "gradient"}, {"output": "both", "width": d}


FAMILY = Family(
    name="transport",
    formula="(P·values)_i = a_i Σ_j b_j 2^(u_i + v_j + scale·<x_i, y_j>) values_j",
    flags={"output": ("vector", "matrix", "gradient", "both"), "width": int, "batch": int},
    axes=axes,
    fits=fits,
    default=default,
    arguments=arguments,
    inputs=inputs,
    reference=reference,
    work=work,
    budget=budget,
    standard=standard,
    grid_axes=("SPLITS",),
    later_axes=("SPLITS",),
    roomiest=splits.ROOMIEST,
)
