"""Hessian-vector products of the transport cost in x, streamed.

*matvec*, the conjugate-gradient product with a diagonally scaled plan, of either side:

    out_i = beta·z_i + alpha·left_i Σ_j 2^S_ij right_j w_j

*assembly*, one sweep from the solution (w_f, w_g) of the linearised marginal equations to the product with a direction A:

    (H A)_i = 2s·r_i A_i + (2s/eps)·(x_i Σ_j Q_ij − Σ_j Q_ij y_j)
    Q_ij = P_ij (w_f_i + w_g_j − dC_ij),   dC_ij = 2s (<x_i, A_i> − <y_j, A_i>)

Scaled potentials and P as in `otgen.families.sinkhorn`. Source: docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from otgen.families import splits, tiles
from otgen.problem import Argument, Family, Problem, Spec, Value, Variant, Work

if TYPE_CHECKING:
    from otgen.gpus import Gpu


def sums(problem: Problem) -> int:
    """Numbers a launch sums up for each row."""
    return 1 if problem.flag("product") == "matvec" else problem.d + 1


def axes(problem: Problem) -> dict[str, tuple[Value, ...]]:
    common = {**tiles.tile_axes(problem), **splits.AXIS}
    return common if problem.flag("product") == "matvec" else {**common, "BLOCK_W": tiles.width_axis(problem.d)}


def fits(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    if problem.flag("product") == "assembly" and 2 * variant.int("BLOCK_M") * variant.int("BLOCK_N") > (
        tiles.TILE_REGISTERS * variant.int("num_warps") * gpu.warp_size
    ):
        return "two score tiles, S and <y, A>, are alive at once"
    return splits.misfit(problem, variant, sums(problem)) or tiles.tile_misfit(problem, variant, gpu)


def default(problem: Problem) -> Variant:
    tile = {**tiles.default_tile(problem), "SPLITS": 1}
    if problem.flag("product") == "matvec":
        return Variant(tile)
    return Variant(tile, BLOCK_W=min(32, tiles.power_of_two(problem.d)))


def arguments(problem: Problem) -> dict[str, Argument]:
    n, m = problem.n, problem.m
    x, y, row, column = tiles.points(n, problem), tiles.points(m, problem), Spec((n,)), Spec((m,))
    pair: dict[str, Argument] = {"x": x, "y": y, "u": row, "v": column}
    if problem.flag("product") == "matvec":
        vectors = {"left": row, "right": column, "w": column, "z": row, "out": Spec((n,), role="out")}
        return {**pair, **vectors, "scale": 1.0, "alpha": -1.0, "beta": 1.0}
    direction, out = Spec((n, problem.d)), Spec((n, problem.d), role="out")
    solution = {"a": row, "b": column, "marginal": row, "direction": direction, "w_f": row, "w_g": column, "out": out}
    return {**pair, **solution, "scale": 1.0, "cost": 1.0, "inverse_eps": 1.0}


def work(problem: Problem, variant: Variant) -> Work:
    if problem.flag("product") == "matvec":
        return Work(splits.launches(tiles.sweep(problem.n, problem.m, variant), variant, 1))
    sweep = tiles.sweep(problem.n, problem.m, variant, problem.d)
    block = variant.int("BLOCK_W")
    launches = splits.launches(sweep, variant, block + 1)
    return Work(launches, products=2, width=block, own_values=tiles.reuses_columns(problem, variant))


def inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """Almost solved clouds; one column of zero weight has a potential that would overflow if it were looked at."""
    import torch

    given = tiles.clouds(problem, seed)
    given["v"][given["b"] == 0] = 500.0
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    if problem.flag("product") == "matvec":
        vectors = {"left": given["a"].sqrt().float().double(), "right": given["b"].sqrt().float().double()}
        return given | vectors | {"w": normal(problem.m), "z": normal(problem.n), "alpha": -1.0, "beta": 0.75}
    solution = {"w_f": normal(problem.n), "w_g": normal(problem.m), "direction": normal(problem.n, problem.d)}
    return given | solution | {"marginal": tiles.plan(given).sum(1).float().double(), "inverse_eps": 1.0 / given["eps"]}


def reference(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    if problem.flag("product") == "matvec":
        kernel = torch.exp2(torch.where(given["right"] != 0, tiles.scores(given), -torch.inf))
        return {"out": given["beta"] * given["z"] + given["alpha"] * given["left"] * (kernel @ (given["right"] * given["w"]))}
    x, y, direction, s = given["x"], given["y"], given["direction"], given["cost"]
    d_cost = 2 * s * ((x * direction).sum(1)[:, None] - direction @ y.T)
    q = tiles.plan(given) * (given["w_f"][:, None] + given["w_g"] - d_cost)
    curvature = x * q.sum(1)[:, None] - q @ y
    return {"out": 2 * s * (given["marginal"][:, None] * direction + given["inverse_eps"] * curvature)}


def budget(problem: Problem, variant: Variant, given: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Each term of a sum moves by the relative budget, so the sum by that share of its absolute terms."""
    import torch

    share = tiles.relative_budget(variant, given)
    slack = tiles.FP32_SLACK * float(expected["out"].abs().max())
    if problem.flag("product") == "matvec":
        kernel = torch.exp2(torch.where(given["right"] != 0, tiles.scores(given), -torch.inf))
        return {"out": share * float((given["left"] * (kernel @ (given["right"] * given["w"]).abs())).max()) + slack}
    x, y, direction, s = given["x"].abs(), given["y"].abs(), given["direction"].abs(), given["cost"]
    factor = given["w_f"].abs()[:, None] + given["w_g"].abs() + 2 * s * ((x * direction).sum(1)[:, None] + direction @ y.T)
    q = tiles.plan(given) * factor
    terms = 2 * s * given["inverse_eps"] * (x * q.sum(1)[:, None] + q @ y)
    return {"out": 2.0 * share * float(terms.max()) + slack}


def standard(n: int, m: int, d: int) -> tuple[Mapping[str, Value], ...]:
    return {"product": "matvec"}, {"product": "assembly"}


FAMILY = Family(
    name="hvp",
    formula="(H A)_i = 2s·r_i A_i + (2s/eps)·(x_i Σ_j Q_ij − Σ_j Q_ij y_j)",
    flags={"product": ("matvec", "assembly")},
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
