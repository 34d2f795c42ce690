"""Sinkhorn potential updates:  u* = u − log2 Σ_j b_j 2^S_ij,  S_ij = u_i + v_j + scale·<x_i, y_j>.

Scaled potentials, in base 2 and without weights:  u = log2(e)/eps·f − scale/2·|x|²,  scale = 2·s·log2(e)/eps for C = s·|x − y|²,
plan P_ij = a_i b_j 2^S_ij. An update is damped for a relaxed marginal and averaged in the symmetric schedule:

    u ← (1 − step)·u + step·(damping·u* − (1 − damping)·scale/2·|x|²)

A *batch* of problems side by side is the same update of each, with a scale and a damping of its own (`otgen.families.batches`).

Schedules: *alternating* updates one side (Gauss–Seidel; OTT-JAX, POT), *symmetric* both from the old pair (Jacobi; GeomLoss), *own*
the one potential of a measure's transport to itself, whose scores are symmetric: half of them give all sums.
Source: Feydy, *Geometric data analysis, beyond convolutions* (2020), ch. 3; the biased-dot-product form: arXiv 2602.03067.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from otgen.families import batches, packed, tiles
from otgen.precision import MODES
from otgen.problem import Argument, Family, Problem, Spec, Sweep, Value, Variant, Work

if TYPE_CHECKING:
    import torch

    from otgen.gpus import Gpu


STRUCTURE: Mapping[str, tuple[Value, ...]] = {
    "precision": tuple(MODES),
    "bias": ("added", "mma", "wgmma"),
    "operands": ("stored", "packed"),
    "exp2_by_fma": (0, 1, 2, 4),
}

SWEPT = ("one_sweep", "half_sweep")
"""Fusions of which a first launch sums, and a second one updates."""


def axes(problem: Problem) -> dict[str, tuple[Value, ...]]:
    shared = {**tiles.tile_axes(problem), **STRUCTURE}
    if problem.flag("schedule") == "alternating":
        return {**shared, "fusion": ("half_step",)}
    fusion = ("half_step", "half_sweep") if problem.own else ("two_launches", "one_launch", "one_sweep")
    return {**shared, "fusion": fusion, "SPLITS": tiles.powers_of_two(1, 16)}


def fits(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    if problem.own and problem.n != problem.m:
        return "a measure's transport to itself has as many columns as rows"
    if variant["fusion"] in SWEPT and variant["stabiliser"] != "shifted":
        return "rows and columns share one exponential only under a common shift"
    if variant["fusion"] not in SWEPT and variant.get("SPLITS", 1) != 1:
        return "only a sweep whose sums are added up by atomics can share its rows among programs"
    if variant.get("SPLITS", 1) != 1 and variant.int("SPLITS") * variant.int("BLOCK_N") > problem.m:
        return "a program would have no columns"
    if variant["fusion"] in SWEPT and packed.is_packed(variant):
        return "sweeps of packed operands are not there yet"
    return (
        packed.packed_misfit(problem, variant, gpu)
        or tiles.tile_misfit(problem, variant, gpu)
        or tiles.bias_misfit(problem, variant, gpu)
        or tiles.exp2_misfit(variant, gpu)
    )


def default(problem: Problem) -> Variant:
    tile = tiles.default_tile(problem)
    return Variant(tile, **{axis: values[0] for axis, values in axes(problem).items() if axis not in tile})


@batches.arguments
def arguments(problem: Problem) -> dict[str, Argument]:
    n, m = problem.n, problem.m
    x, y, row, column = tiles.points(n, problem), tiles.points(m, problem), Spec((n,)), Spec((m,))
    row_out, column_out = Spec((n,), role="out"), Spec((m,), role="out")
    if problem.flag("schedule") == "alternating":
        tensors = {"x": x, "y": y, "u": row, "v": column, "b": column, "x_sq": row, "u_out": row_out, "rho": row_out}
        return {**tensors, "scale": 1.0, "damping": 1.0, "step": 1.0}
    if problem.own:
        tensors = {"x": x, "y": y, "u": row, "a": row, "x_sq": row, "u_out": row_out, "rho": row_out}
        return {**tensors, "scale": 1.0, "damping": 1.0, "step": 0.5}
    tensors = {"x": x, "y": y, "u": row, "v": column, "a": row, "b": column, "x_sq": row, "y_sq": column}
    outputs = {"u_out": row_out, "v_out": column_out, "rho": row_out, "gamma": column_out}
    return {**tensors, **outputs, "scale": 1.0, "damping_a": 1.0, "damping_b": 1.0, "step": 0.5}


def work(problem: Problem, variant: Variant) -> Work:
    work = _work(problem, variant)
    if not packed.is_packed(variant):
        return work
    return replace(work, launches=(packed.packing(problem.n, problem.m, variant, problem.batch), *work.launches))


def _work(problem: Problem, variant: Variant) -> Work:
    n, m, batch = problem.n, problem.m, problem.batch
    rows, columns = (tiles.sweep(*sizes, variant, batch=batch) for sizes in ((n, m), (m, n)))
    programs = rows.programs + columns.programs
    if variant["fusion"] == "half_step":
        return Work((rows,))
    if variant["fusion"] == "two_launches":
        return Work((rows, columns))
    if variant["fusion"] == "one_launch":
        visited = rows.programs * rows.tiles + columns.programs * columns.tiles
        return Work((Sweep(programs, visited / programs, max(n, m) * batch),))
    splits = variant.int("SPLITS")
    if variant["fusion"] == "half_sweep":
        visited = (rows.tiles + variant.int("BLOCK_M") / variant.int("BLOCK_N")) / 2
        launches = Sweep(rows.programs * splits, visited / splits, n * batch), Sweep(rows.programs, 0, n * batch)
        return Work(launches, both_sums=True)
    sweep = Sweep(rows.programs * splits, ceil(rows.tiles / splits), m * batch)
    return Work((sweep, Sweep(programs, 0, m * batch)), both_sums=True)


@batches.inputs
def inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """Almost solved clouds; one row is shifted so far down that a shifted sweep must notice and redo it."""
    given = tiles.clouds(problem, seed)
    if problem.own:
        return _own_inputs(given)
    given["u"][0] -= 100.0
    given |= {"x_sq": (given["x"] ** 2).sum(1).float().double(), "y_sq": (given["y"] ** 2).sum(1).float().double()}
    if problem.flag("schedule") == "alternating":
        return given | {"damping": 0.9, "step": 0.75}
    return given | {"damping_a": 0.9, "damping_b": 0.8, "step": 0.5}


def _own_inputs(given: dict[str, Any]) -> dict[str, Any]:
    """The first cloud with itself, its potential a little off the solution, and far off in one row."""
    import torch

    x, a, scale = given["x"], given["a"], given["scale"]
    x_sq = (x * x).sum(1).float().double()
    noise, u = given["u"] + 0.5 * scale * x_sq, -0.5 * scale * x_sq
    for _ in range(5):
        u = u - 0.5 * torch.logsumexp((u[:, None] + u + scale * x @ x.T) * tiles.LN2 + a.log(), 1) / tiles.LN2
    u = (u + noise).float().double()
    u[0] -= 100.0 if len(u) > 1 else 50.0  # twice for a point alone, whose sum fp32 is to hold
    return {**given, "y": x, "u": u, "v": u, "b": a, "x_sq": x_sq, "damping": 0.9, "step": 0.5}


@batches.reference
def reference(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
    s = tiles.scores(given)
    if problem.flag("schedule") != "symmetric":
        u_out, rho = _update(s, given["u"], given["b"], given["x_sq"], given["scale"], given["damping"], given["step"])
        return {"u_out": u_out, "rho": rho}
    u_out, rho = _update(s, given["u"], given["b"], given["x_sq"], given["scale"], given["damping_a"], given["step"])
    v_out, gamma = _update(s.T, given["v"], given["a"], given["y_sq"], given["scale"], given["damping_b"], given["step"])
    return {"u_out": u_out, "v_out": v_out, "rho": rho, "gamma": gamma}


def _update(
    s: torch.Tensor, u: torch.Tensor, b: torch.Tensor, x_sq: torch.Tensor, scale: float, damping: float, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    log_rho = torch.logsumexp(s * tiles.LN2 + b.log(), 1) / tiles.LN2
    target = damping * (u - log_rho) - (1.0 - damping) * scale / 2 * x_sq
    return (1.0 - step) * u + step * target, torch.exp2(log_rho)


@batches.budget
def budget(problem: Problem, variant: Variant, given: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Potentials move by no more than their scores; sums of exponentials by no more than that, relatively."""
    potential = tiles.score_budget(variant, given)
    share = tiles.relative_budget(variant, given)
    return {
        name: potential + tiles.FP32_SLACK * float(value.abs().max()) if name.endswith("_out") else share * float(value.max())
        for name, value in expected.items()
    }


def standard(n: int, m: int, d: int) -> tuple[Mapping[str, Value], ...]:
    own: tuple[Mapping[str, Value], ...] = ({"schedule": "own"},) if n == m else ()
    return {"schedule": "alternating"}, {"schedule": "symmetric"}, *own


FAMILY = Family(
    name="sinkhorn",
    formula="u* = u − log2 Σ_j b_j 2^(u_i + v_j + scale·<x_i, y_j>)",
    flags={"schedule": ("alternating", "symmetric", "own"), "batch": int},
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
    later_axes=("bias", "operands", "exp2_by_fma"),
    refinements={"exp2_by_fma": 0},
)
