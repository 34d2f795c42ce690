"""Sinkhorn potential updates:  u* = u − log2 Σ_j b_j 2^S_ij,  S_ij = u_i + v_j + scale·<x_i, y_j>.

Scaled potentials, in base 2 and without weights:  u = log2(e)/eps·f − scale/2·|x|²,  scale = 2·s·log2(e)/eps for C = s·|x − y|²,
plan P_ij = a_i b_j 2^S_ij. An update is damped for a relaxed marginal and averaged in the symmetric schedule:

    u ← (1 − step)·u + step·(damping·u* − (1 − damping)·scale/2·|x|²)

A *batch* of problems side by side is the same update of each, with a scale and a damping of its own (`otgen.families.batches`).
*Listed* rows visit only the blocks of columns in a list (`otgen.families.lists`).

Schedules: *alternating* updates one side (Gauss–Seidel; OTT-JAX, POT), *symmetric* both from the old pair (Jacobi; GeomLoss), *own*
the one potential of a measure's transport to itself, whose scores are symmetric: half of them give all sums. *debiased* is a
symmetric step between x and y and an own step of each: an iteration of OT(x, y) − ½OT(x, x) − ½OT(y, y).
Source: Feydy, *Geometric data analysis, beyond convolutions* (2020), ch. 3; the biased-dot-product form: arXiv 2602.03067.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from otgen.families import batches, lists, packed, splits, tiles
from otgen.precision import MODES
from otgen.problem import BYTES, Argument, Family, Problem, Spec, Sweep, Value, Variant, Work

if TYPE_CHECKING:
    import torch

    from otgen.gpus import Gpu


STRUCTURE: Mapping[str, tuple[Value, ...]] = {
    "precision": tuple(MODES),
    "bias": ("added", "mma", "wgmma"),
    "operands": ("stored", "packed"),
    **splits.AXIS,
    "sums": ("atomic", "ordered"),
    "exp2_by_fma": (0, 1, 2, 4),
    "loads": ("pointers", "descriptor"),
    "eviction": ("normal", "last"),
    "GROUP": (0, 1, 8, 32),
}

REFINEMENTS: Mapping[str, Value] = {
    "sums": "atomic",
    "exp2_by_fma": 0,
    "loads": "pointers",
    "eviction": "normal",
    "GROUP": 0,
}

FUSIONS = {
    "alternating": ("half_step", "split_step"),
    "symmetric": ("two_launches", "one_launch", "one_sweep"),
    "own": ("half_step", "half_sweep"),
    "debiased": ("three_sweeps",),
}

SWEPT = ("split_step", "one_sweep", "half_sweep", "three_sweeps")
"""Fusions of which a first launch sums, and a second one updates."""


def axes(problem: Problem) -> dict[str, tuple[Value, ...]]:
    fusions = ("half_step",) if problem.listed > 1 else FUSIONS[str(problem.flag("schedule"))]
    return {**tiles.tile_axes(problem), **STRUCTURE, "fusion": fusions}


def fits(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    if problem.own and problem.n != problem.m:
        return "a measure's transport to itself has as many columns as rows"
    if variant["fusion"] in SWEPT and variant["stabiliser"] != "shifted":
        return "a launch that only sums hands on sums under a common shift"
    if variant["fusion"] not in SWEPT and variant.get("SPLITS", 1) != 1:
        return "only a sweep whose sums another launch reads can share its rows among programs"
    if variant.get("sums") == "ordered":
        if variant["fusion"] not in SWEPT:
            return "a program that has its sums to itself has no order to keep"
        if scratch_bytes(problem, variant) > splits.LARGEST_SCRATCH:
            return f"the shares of its sums exceed {splits.LARGEST_SCRATCH} bytes"
    if variant["fusion"] == "split_step" and not tiles.is_packed(variant) and variant.get("SPLITS", 1) == 1:
        return "a program that has a row to itself can update it"
    fewest = min(problem.n, problem.m) if problem.flag("schedule") == "debiased" else problem.m
    if variant.get("SPLITS", 1) != 1 and variant.int("SPLITS") * variant.int("BLOCK_N") > fewest:
        return "a program would have no columns"
    if variant.get("GROUP", 0) and variant["SPLITS"] == 1:
        return "a block of rows has one part, all columns"
    if variant.get("GROUP", 0) and variant.int("GROUP") * variant.int("BLOCK_M") >= problem.n:
        return "all blocks of rows would be one group, as without groups"
    if tiles.is_packed(variant):
        if variant["fusion"] not in SWEPT:
            return "a sweep of packed operands leaves what it cannot hold to the launch that updates"
        if variant["fusion"] == "three_sweeps":
            return "four potentials would have to be packed with two clouds"
    return (
        lists.misfit(problem, variant)
        or packed.packed_misfit(problem, variant, gpu)
        or tiles.tile_misfit(problem, variant, gpu)
        or tiles.bias_misfit(problem, variant, gpu)
        or tiles.exp2_misfit(variant, gpu)
        or tiles.loads_misfit(problem, variant, gpu)
        or tiles.eviction_misfit(variant, gpu)
    )


def scratch_bytes(problem: Problem, variant: Variant) -> int:
    """What a sweep of ordered sums writes: SPLITS shares of its rows' sums, and of the columns' one for each block of rows."""
    n, m, splits = problem.n, problem.m, variant.int("SPLITS")
    row_blocks, column_blocks = (ceil(size / variant.int("BLOCK_M")) for size in (n, m))
    numbers = splits * n + (row_blocks * m if variant["fusion"] != "split_step" else 0)
    if variant["fusion"] == "three_sweeps":
        numbers += (splits + row_blocks) * n + (splits + column_blocks) * m
    return BYTES["fp32"] * problem.batch * numbers


def default(problem: Problem) -> Variant:
    tile = tiles.default_tile(problem)
    if problem.flag("schedule") == "debiased" or problem.listed > 1:
        tile["stabiliser"] = "shifted"
    if problem.listed > 1:
        tile |= {"BLOCK_M": min(64, problem.listed)}
    return Variant(tile, **{axis: values[0] for axis, values in axes(problem).items() if axis not in tile})


@batches.arguments
@lists.arguments
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
    weights = {"a": row, "b": column, "x_sq": row, "y_sq": column}
    sums = {"rho": row_out, "gamma": column_out}
    tensors = {"x": x, "y": y, "u": row, "v": column, **weights, "u_out": row_out, "v_out": column_out, **sums}
    if problem.flag("schedule") == "debiased":
        potentials = {"u": row, "v": column, "p": row, "q": column}
        outputs = {f"{name}_out": replace(spec, role="out") for name, spec in potentials.items()}
        tensors = {"x": x, "y": y, **potentials, **weights, **outputs, **sums, "rho_p": row_out, "rho_q": column_out}
    return {**tensors, "scale": 1.0, "damping_a": 1.0, "damping_b": 1.0, "step": 0.5}


def work(problem: Problem, variant: Variant) -> Work:
    work = _work(problem, variant)
    if not tiles.is_packed(variant):
        return work
    return replace(work, launches=(packed.packing(problem.n, problem.m, variant, problem.batch), *work.launches))


def _work(problem: Problem, variant: Variant) -> Work:
    n, m, batch, fusion = problem.n, problem.m, problem.batch, variant["fusion"]
    rows, columns = (tiles.sweep(*sizes, variant, batch=batch) for sizes in ((n, m), (m, n)))
    if fusion == "half_step":
        return Work((lists.sweep(problem, rows),))
    if fusion == "two_launches":
        return Work((rows, columns))
    if fusion == "one_launch":
        return Work((_together(rows, columns),))
    splits, ordered = variant.int("SPLITS"), variant.get("sums") == "ordered"
    pair = replace(rows, programs=rows.programs * splits, tiles=ceil(rows.tiles / splits))
    updates = [replace(side, tiles=0, shares=ordered * n) for side, n in ((rows, splits), (columns, rows.programs / batch))]
    alone = [_from_the_diagonal(tiles.sweep(size, size, variant, batch=batch), splits, variant) for size in (n, m)]
    own_updates = [replace(side, tiles=0, shares=ordered * (splits + (side.programs / batch - 1) / 2)) for side in (rows, columns)]
    sweeps, updates = {
        "split_step": ([pair], updates[:1]),
        "one_sweep": ([pair], updates),
        "half_sweep": (alone[:1], own_updates[:1]),
        "three_sweeps": ([pair, *alone], [*updates, *own_updates]),
    }[str(fusion)]
    return Work((_together(*sweeps), _together(*updates)), both_sums=fusion != "split_step", ordered=ordered)


def _from_the_diagonal(sweep: Sweep, splits: int, variant: Variant) -> Sweep:
    """The launch of half of the tiles of `sweep`: a block of rows has its own columns and the later ones."""
    visited = (sweep.tiles + variant.int("BLOCK_M") / variant.int("BLOCK_N")) / 2
    return replace(sweep, programs=sweep.programs * splits, tiles=visited / splits)


def _together(*sweeps: Sweep) -> Sweep:
    """One launch of the programs of several: what one does on average."""
    programs = sum(sweep.programs for sweep in sweeps)
    tiles_, shares = (sum(sweep.programs * getattr(sweep, what) for sweep in sweeps) / programs for what in ("tiles", "shares"))
    return Sweep(programs, tiles_, max(sweep.streamed for sweep in sweeps), shares)


@batches.inputs
def inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """Almost solved clouds; one row is shifted so far down that a shifted sweep must notice and redo it.

    Where rows and columns of a debiased step are one cloud, the columns' tensors have names of their own, ending in _again.
    """
    import torch

    given = tiles.clouds(problem, seed)
    x_sq, y_sq = ((given[side] ** 2).sum(1).float().double() for side in "xy")
    noise = given["u"] + 0.5 * given["scale"] * x_sq
    if problem.own:
        u = _own_potential(given["x"], given["a"], given["scale"], noise)
        return {**given, "y": given["x"], "u": u, "v": u, "b": given["a"], "x_sq": x_sq, "damping": 0.9, "step": 0.5}
    given["u"][0] -= 100.0
    given |= {"x_sq": x_sq, "y_sq": y_sq}
    if problem.flag("schedule") == "alternating":
        given |= {"damping": 0.9, "step": 0.75}
        return lists.inputs(problem, given, seed) if problem.listed > 1 else given
    given |= {"damping_a": 0.9, "damping_b": 0.8, "step": 0.5}
    if problem.flag("schedule") == "symmetric":
        return given
    more = noise.std(correction=0) * torch.randn(problem.m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given["p"] = _own_potential(given["x"], given["a"], given["scale"], noise)
    given["q"] = _own_potential(given["y"], given["b"], given["scale"], more)
    return given | {f"{name}_again": given[name] for name in ("x", "p", "a", "y", "q", "b")}


def _own_potential(x: torch.Tensor, a: torch.Tensor, scale: float, noise: torch.Tensor) -> torch.Tensor:
    """The potential of a cloud's transport to itself, a little off the solution, and far off in one row."""
    import torch

    u = -0.5 * scale * (x * x).sum(1).float().double()
    for _ in range(5):
        u = u - 0.5 * torch.logsumexp((u[:, None] + u + scale * x @ x.T) * tiles.LN2 + a.log(), 1) / tiles.LN2
    u = (u + noise).float().double()
    u[0] -= 100.0 if len(u) > 1 else 50.0  # twice for a point alone, whose sum fp32 is to hold
    return u


@batches.reference
def reference(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
    step, scale, schedule = given["step"], given["scale"], problem.flag("schedule")
    s = tiles.scores(given)
    if schedule not in ("symmetric", "debiased"):
        log_rho = lists.log_sums(problem, given) if problem.listed > 1 else _log_sums(s, given["b"])
        u_out, rho = _update(log_rho, given["u"], given["x_sq"], scale, given["damping"], step)
        return {"u_out": u_out, "rho": rho}
    damping_a, damping_b = given["damping_a"], given["damping_b"]
    u_out, rho = _update(_log_sums(s, given["b"]), given["u"], given["x_sq"], scale, damping_a, step)
    v_out, gamma = _update(_log_sums(s.T, given["a"]), given["v"], given["y_sq"], scale, damping_b, step)
    found = {"u_out": u_out, "v_out": v_out, "rho": rho, "gamma": gamma}
    if schedule == "debiased":
        for own, x, a, x_sq, damping in (("p", "x", "a", "x_sq", damping_a), ("q", "y", "b", "y_sq", damping_b)):
            s = tiles.scores({"u": given[own], "v": given[f"{own}_again"], "x": given[x], "y": given[f"{x}_again"], "scale": scale})
            out, sums = _update(_log_sums(s, given[f"{a}_again"]), given[own], given[x_sq], scale, damping, step)
            found |= {f"{own}_out": out, f"rho_{own}": sums}
    return found


def _log_sums(s: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.logsumexp(s * tiles.LN2 + b.log(), 1) / tiles.LN2


def _update(
    log_rho: torch.Tensor, u: torch.Tensor, x_sq: torch.Tensor, scale: float, damping: float, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

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
    return {"schedule": "alternating"}, {"schedule": "symmetric"}, *own, {"schedule": "debiased"}, *lists.standard(d)


FAMILY = Family(
    name="sinkhorn",
    formula="u* = u − log2 Σ_j b_j 2^(u_i + v_j + scale·<x_i, y_j>)",
    flags={"schedule": tuple(FUSIONS), "batch": int, "listed": int},
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
    later_axes=("bias", "operands", "SPLITS", *REFINEMENTS),
    refinements=REFINEMENTS,
)
