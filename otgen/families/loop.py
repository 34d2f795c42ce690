"""Whole runs of Sinkhorn iterations in one launch: those of `otgen.families.sinkhorn`, one after the other on the device.

    u* = u − log2 rho,   level = u* + scale/2·|x|² + lift,   u ← ratio·(u + step·(u* − share·level − u))

A *course* has a row (scale, share_a, share_b, lift, ratio) for each iteration, so that a schedule of regularisations is one launch.
share is eps/(eps + ρ) of a marginal relaxed with strength ρ, and 0 when balanced; lift is log2(e)/eps times the constant that f and
−g share (`otgen.solvers.steps.Steps.lift`); ratio is the eps of the iteration over that of the next: both potentials are multiplied
by it when they are handed on.

What an iteration's pair *missed* is Σ|a·rho − target|, with the target a·exp(−f/ρ) = a·2^(−share/(1 − share)·(u + scale/2·|x|² +
lift)), and the same of the columns, which is left out in the alternating schedule: they fit. The first iteration that missed no
more than `tol` is the last one.

Schedules: *alternating* (u from v, then v from the new u), *symmetric* (both from the old pair), *own* (one potential).
A launch of several programs is cooperative: they wait for each other, so all must be on the GPU at once, or it refuses the launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

from otgen.families import batches, tiles
from otgen.problem import LARGE, Argument, Family, Problem, Spec, Sweep, Value, Variant, Work, largest_alike

if TYPE_CHECKING:
    import torch

    from otgen.gpus import Gpu

ITERATIONS = 8
"""Iterations of the launch that is compiled, checked and timed."""

LARGEST = 4096
"""Points of the clouds of which a run should be one launch. A step between larger ones takes many times what its launches do, and
has better kernels: their tiles share columns among programs, and sum rows and columns at once."""

COURSE = ("scale", "share_a", "share_b", "lift", "ratio")

PROGRAMS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 144, 160, 192, 256, 304)
"""Programs of a problem: up to the multiprocessors of the largest GPU of the table."""

SCHEDULES = ("alternating", "symmetric", "own")


def axes(problem: Problem) -> dict[str, tuple[Value, ...]]:
    fusion = ("streamed", "resident")
    return {**tiles.tile_axes(problem), "fusion": fusion, "bias": ("added", "mma", "wgmma"), "PROGRAMS": PROGRAMS}


def fits(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    programs, block_m, block_n = (variant.int(axis) for axis in ("PROGRAMS", "BLOCK_M", "BLOCK_N"))
    if problem.own and problem.n != problem.m:
        return "a measure's transport to itself has as many columns as rows"
    if tiles.is_whole(variant):
        if largest_alike(problem.n) > block_m or largest_alike(problem.m) > block_n:
            return "a resident tile is the whole problem, and the largest of those that share its variant"
        if problem.own and block_m != block_n:
            return "rows and columns of a measure's transport to itself are the same points"
        if programs != 1 or variant["bias"] != "added" or variant["num_stages"] != 1:
            return "a resident tile has one program, and nothing is left to stream"
    if programs > 1 and programs * problem.batch > gpu.sms:
        return f"programs that wait for each other must all have a place: {gpu.slug} has {gpu.sms} multiprocessors"
    if programs > 1 and programs > _blocks(problem, variant):
        return "a program would have no rows"
    return tiles.tile_misfit(problem, variant, gpu) or tiles.bias_misfit(problem, variant, gpu)


def default(problem: Problem) -> Variant:
    """Of a single problem, programs for every GPU of the table that share it; more of them compile to the same kernel."""
    tile = tiles.default_tile(problem)
    most = min(32, _blocks(problem, tile)) if problem.batch == 1 else 1
    return Variant(tile, fusion="streamed", bias="added", PROGRAMS=max(number for number in PROGRAMS if number <= most))


@batches.arguments
def arguments(problem: Problem) -> dict[str, Argument]:
    n, m = problem.n, problem.m
    row, column, row_out, column_out = Spec((n,)), Spec((m,)), Spec((n,), role="out"), Spec((m,), role="out")
    course = {"missed": Spec((ITERATIONS,), role="out"), "course": Spec((ITERATIONS, len(COURSE)))}
    numbers: dict[str, Argument] = {"tol": -1.0, "step": 0.5, "iterations": ITERATIONS}
    clouds = {"x": tiles.points(n, problem), "y": tiles.points(m, problem), "u": row}
    if problem.own:
        return {**clouds, "a": row, "x_sq": row, "u_out": row_out, "rho": row_out, **course, **numbers}
    given = {"v": column, "a": row, "b": column, "x_sq": row, "y_sq": column}
    outputs = {"u_out": row_out, "v_out": column_out, "rho": row_out, "gamma": column_out}
    return {**clouds, **given, **outputs, **course, **numbers}


def work(problem: Problem, variant: Variant) -> Work:
    phases = 2 if problem.flag("schedule") == "alternating" else 1
    if tiles.is_whole(variant):
        return Work((Sweep(problem.batch, phases * ITERATIONS, problem.m * problem.batch),), products=0, both_sums=not problem.own)
    programs, m, n = variant.int("PROGRAMS"), problem.m, problem.n
    rows, columns = (ceil(size / variant.int("BLOCK_M")) for size in (n, m))
    across, down = (ceil(size / variant.int("BLOCK_N")) for size in (m, n))
    tiles_: float = ceil(rows / programs) * across
    if phases == 2:
        tiles_ += ceil(columns / programs) * down
    elif not problem.own:
        tiles_ = ceil((rows + columns) / programs) * (across * rows + down * columns) / (rows + columns)
    barriers = phases * ITERATIONS if programs > 1 else 0
    return Work((Sweep(programs * problem.batch, tiles_ * ITERATIONS, (n + m) * problem.batch, barriers=barriers),))


def _blocks(problem: Problem, variant: Mapping[str, Value]) -> int:
    """Blocks of rows between two waits."""
    rows, columns = (ceil(size / int(variant["BLOCK_M"])) for size in (problem.n, problem.m))
    return rows + columns if problem.flag("schedule") == "symmetric" else rows


@batches.inputs
def inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """Almost solved clouds, one row so far off that it must be redone, and a course in which eps falls and rests, both relaxed."""
    import torch

    from otgen.families import sinkhorn

    schedule = str(problem.flag("schedule"))
    given = sinkhorn.inputs(sinkhorn.FAMILY.problem(problem.n, problem.m, problem.d, problem.dtype, schedule=schedule), seed)
    eps = [given["eps"] * 1.25 ** max(0.0, 1.0 - k / 4) for k in range(ITERATIONS)]
    kappa = given["kappa"] * given["eps"]
    first = given["eps"] / eps[0]
    rho_a, rho_b, lift = 20.0, 20.0 if problem.own else 40.0, 0.0 if problem.own else 2.0
    course = [
        (2.0 * kappa / e, e / (e + rho_a), e / (e + rho_b), lift * kappa / e, e / following)
        for e, following in zip(eps, [*eps[1:], eps[-1]])
    ]
    potentials = {name: (first * given[name]).float().double() for name in ("u", "v")}
    return (
        given
        | potentials
        | {
            "course": torch.tensor(course, dtype=torch.float64).float().double(),
            "scale": course[0][0],
            "tol": -1.0,
            "step": 0.5,
            "iterations": ITERATIONS,
        }
    )


@batches.reference
def reference(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    schedule, product, step = problem.flag("schedule"), given["x"] @ given["y"].T, given["step"]
    a, b, (u, v) = given["a"], given["b"], (given["u"], given["v"])
    rho, gamma, missed = torch.ones_like(u), torch.ones_like(v), torch.full((len(given["course"]),), torch.nan, dtype=u.dtype)
    for t, row in enumerate(given["course"].tolist()):
        scale, share_a, share_b, lift, ratio = row
        rho = _sums(u[:, None] + v + scale * product, b)
        missed[t] = _missed(u, rho, a, given["x_sq"], scale, share_a, lift)
        new_u = _updated(u, rho, given["x_sq"], scale, share_a, lift, step)
        if problem.own:
            v = ratio * new_u
        else:
            gamma = _sums((v[:, None] + (new_u if schedule == "alternating" else u)) + scale * product.T, a)
            if schedule == "symmetric":
                missed[t] += _missed(v, gamma, b, given["y_sq"], scale, share_b, -lift)
            v = ratio * _updated(v, gamma, given["y_sq"], scale, share_b, -lift, step)
        u = ratio * new_u
        if missed[t] <= given["tol"]:
            break
    found = {"u_out": u, "rho": rho, "missed": missed}
    return found if problem.own else found | {"v_out": v, "gamma": gamma}


def _sums(s: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.exp2(torch.logsumexp(s * tiles.LN2 + weights.log(), 1) / tiles.LN2)


def _updated(
    u: torch.Tensor, rho: torch.Tensor, x_sq: torch.Tensor, scale: float, share: float, lift: float, step: float
) -> torch.Tensor:
    import torch

    full = u - torch.log2(rho)
    return u + step * (full - share * (full + 0.5 * scale * x_sq + lift) - u)


def _missed(
    u: torch.Tensor, rho: torch.Tensor, a: torch.Tensor, x_sq: torch.Tensor, scale: float, share: float, lift: float
) -> torch.Tensor:
    import torch

    target = torch.exp2(-share / (1.0 - share) * (u + 0.5 * scale * x_sq + lift))
    return torch.where(a > 0, a * (rho - target).abs(), 0.0).sum()


@batches.budget
def budget(problem: Problem, variant: Variant, given: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """An update moves no potential by more than scores are off, and none makes larger what earlier ones were off."""
    off = ITERATIONS * (tiles.score_budget(variant, given) + tiles.FP32_SLACK * float(expected["u_out"].abs().max()))
    share = 2.0 ** (2.0 * off) - 1.0 + tiles.relative_budget(variant, given)
    return {
        name: off if name.endswith("_out") else share * float(value.nan_to_num().max()) + tiles.FP32_SLACK
        for name, value in expected.items()
    }


def standard(n: int, m: int, d: int) -> tuple[Mapping[str, Value], ...]:
    if max(n, m) > LARGEST:
        return ()
    own: tuple[Mapping[str, Value], ...] = ({"schedule": "own"},) if n == m else ()
    return {"schedule": "alternating"}, {"schedule": "symmetric"}, *own


FAMILY = Family(
    name="loop",
    formula="u ← ratio·(u + step·(u* − share·level* − u)), u* = u − log2 Σ_j b_j 2^(u_i + v_j + scale·<x_i, y_j>), each iteration",
    flags={"schedule": SCHEDULES, "batch": int},
    axes=axes,
    fits=fits,
    default=default,
    arguments=arguments,
    inputs=inputs,
    reference=reference,
    work=work,
    budget=budget,
    standard=standard,
    grid_axes=("PROGRAMS",),
    coupled=True,
    roomiest=((LARGE, LARGE), (1, 1)),
)
