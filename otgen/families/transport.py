"""The transport plan applied:  (P·values)_i = a_i Σ_j b_j 2^S_ij values_j,  S_ij = u_i + v_j + scale·<x_i, y_j>.

Outputs: a *vector* (values (m,)), a *matrix* of any width k (values (m, k)), or the *gradient* of the transport cost in x,
2·s·(r_i x_i − (P·y)_i) with r the row marginal (envelope theorem). Pᵀ·values is the same problem with the sides swapped.
Scaled potentials, and batches, as in `otgen.families.sinkhorn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from otgen.families import batches, tiles
from otgen.problem import Argument, Family, Problem, Spec, Value, Variant, Work

if TYPE_CHECKING:
    import torch

    from otgen.gpus import Gpu


def width(problem: Problem) -> int:
    """Columns of the output."""
    return problem.d if problem.flag("output") == "gradient" else int(problem.flag("width"))


def axes(problem: Problem) -> dict[str, tuple[Value, ...]]:
    common = tiles.tile_axes(problem)
    return common if problem.flag("output") == "vector" else {**common, "BLOCK_W": tiles.width_axis(width(problem))}


def fits(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    if problem.flag("output") != "matrix" and problem.flag("width") != 1:
        return "only a matrix has a width"
    return tiles.tile_misfit(problem, variant, gpu)


def default(problem: Problem) -> Variant:
    tile = tiles.default_tile(problem)
    if problem.flag("output") == "vector":
        return Variant(tile)
    return Variant(tile, BLOCK_W=min(32, tiles.power_of_two(width(problem))))


@batches.arguments
def arguments(problem: Problem) -> dict[str, Argument]:
    n, m = problem.n, problem.m
    x, y, row, column = tiles.points(n, problem), tiles.points(m, problem), Spec((n,)), Spec((m,))
    plan: dict[str, Argument] = {"x": x, "y": y, "u": row, "v": column, "a": row, "b": column}
    if problem.flag("output") == "gradient":
        return {**plan, "marginal": row, "out": Spec((n, problem.d), role="out"), "scale": 1.0, "cost": 1.0}
    tail = () if problem.flag("output") == "vector" else (width(problem),)
    return {**plan, "values": Spec((m, *tail)), "out": Spec((n, *tail), role="out"), "scale": 1.0}


def work(problem: Problem, variant: Variant) -> Work:
    if problem.flag("output") == "vector":
        return Work((tiles.sweep(problem.n, problem.m, variant, batch=problem.batch),))
    own = problem.flag("output") == "gradient" and tiles.reuses_columns(problem, variant)
    sweep = tiles.sweep(problem.n, problem.m, variant, width(problem), problem.batch)
    return Work((sweep,), width=variant.int("BLOCK_W"), own_values=own)


@batches.inputs
def inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """Almost solved clouds; one column of zero weight has a potential that would overflow if it were looked at."""
    import torch

    given = tiles.clouds(problem, seed)
    given["v"][given["b"] == 0] = 500.0
    generator = torch.Generator().manual_seed(seed + 1)
    tail = () if problem.flag("output") == "vector" else (width(problem),)
    given["values"] = torch.randn(problem.m, *tail, generator=generator, dtype=torch.float64).float().double()
    given["marginal"] = tiles.plan(given).sum(1).float().double()
    return given


@batches.reference
def reference(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
    plan = tiles.plan(given)
    if problem.flag("output") == "gradient":
        return {"out": 2.0 * given["cost"] * (given["marginal"][:, None] * given["x"] - plan @ given["y"])}
    return {"out": plan @ given["values"]}


@batches.budget
def budget(problem: Problem, variant: Variant, given: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Each term of the sum moves by the relative budget, so the sum by that share of its absolute terms."""
    gradient = problem.flag("output") == "gradient"
    values: torch.Tensor = given["y"] if gradient else given["values"]
    terms = float((tiles.plan(given) @ values.abs()).max()) * (2.0 * given["cost"] if gradient else 1.0)
    return {"out": tiles.relative_budget(variant, given) * terms + tiles.FP32_SLACK * float(expected["out"].abs().max())}


def standard(n: int, m: int, d: int) -> tuple[Mapping[str, Value], ...]:
    return {"output": "vector"}, {"output": "matrix", "width": d}, {"output": "gradient"}


FAMILY = Family(
    name="transport",
    formula="(P·values)_i = a_i Σ_j b_j 2^(u_i + v_j + scale·<x_i, y_j>) values_j",
    flags={"output": ("vector", "matrix", "gradient"), "width": int, "batch": int},
    axes=axes,
    fits=fits,
    default=default,
    arguments=arguments,
    inputs=inputs,
    reference=reference,
    work=work,
    budget=budget,
    standard=standard,
)
