"""Which rows of the tuning databases could answer for a problem, in what order, and what keeps one from it. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log2, prod
from typing import TYPE_CHECKING, Any, Literal

from otgen import families
from otgen.errors import UsageError
from otgen.precision import MODES
from otgen.problem import Problem, Value, Variant, bucket
from otgen.resources import template_hash
from otgen.store import Winner

if TYPE_CHECKING:
    from otgen.gpus import Gpu

Cache = Literal["exact", "nearest", "ported", "predicted", "default", "pinned"]

REACH = 4.0
"""How far a measured row is believed before a prediction for a nearer shape: one cell of the standard set (n and m 4 times apart,
d about 4 times; in powers of two, with integer flags, summed up)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row considered for a problem: the variant it gives there, and why it was refused ("" when it was not)."""

    winner: Winner
    cache: Cache
    variant: Variant
    refused: str


def centre(problem: Problem) -> Problem:
    """The problem that stands for all of the same bucket: n and m rounded to powers of two."""
    return Problem(problem.family, 1 << bucket(problem.n), 1 << bucket(problem.m), problem.d, problem.dtype, problem.flags)


def stale(winner: Winner) -> bool:
    """Whether the winner was tuned on another template than the present one."""
    return winner.problem.family not in families.FAMILIES or winner.template_hash != template_hash(winner.problem.family)


def distance(one: Problem, other: Problem) -> float | None:
    """Powers of two between two problems: buckets of n and m, d, integer flags, summed up. None when they are of another kind."""
    flags, others = dict(one.flags), dict(other.flags)
    if (one.family, one.dtype, set(flags)) != (other.family, other.dtype, set(others)):
        return None
    total = abs(bucket(one.n) - bucket(other.n)) + abs(bucket(one.m) - bucket(other.m)) + abs(log2(one.d / other.d))
    for name, value in flags.items():
        if isinstance(value, int) and isinstance(others[name], int):
            total += abs(log2(value / int(others[name])))
        elif value != others[name]:
            return None
    return total


def ranked(winners: Iterable[Winner], target: Problem, gpu: Gpu, modes: tuple[str, ...]) -> Iterator[Candidate]:
    """The rows of `target`'s kind, best first: by tier, this GPU before its kin, the nearest shape, the least time per pair.

    target  the centre of a bucket;  winners  of this GPU and of others of its architecture;  modes  the admissible precision modes
    """
    keyed: list[tuple[tuple[Any, ...], Winner, Cache]] = []
    for winner in winners:
        far = distance(winner.problem, target)
        if far is not None:
            tier, cache = _tier(winner, gpu, far)
            per_pair = winner.us / (winner.problem.n * winner.problem.m)
            keyed.append(((tier, winner.gpu != gpu.slug, far, per_pair, list(MODES).index(winner.precision)), winner, cache))
    for _, winner, cache in sorted(keyed, key=lambda item: item[0]):
        variant = _adapted(winner, target, gpu)
        yield Candidate(winner, cache, variant, _refusal(winner, variant, target, gpu, modes))


def _tier(winner: Winner, gpu: Gpu, far: float) -> tuple[int, Cache]:
    if winner.evidence != "measured":
        return 3, "predicted"
    if winner.gpu != gpu.slug:
        return (2 if far <= REACH else 4), "ported"
    if far > 0:
        return (1 if far <= REACH else 4), "nearest"
    return 0, "exact"


def _adapted(winner: Winner, target: Problem, gpu: Gpu) -> Variant:
    """The row's variant for `target`: numbers beyond the end of their axis are cut to it, and a row block that stayed resident
    (BLOCK_K ≥ d) stays so where the space allows. Where it has too many programs, it gets as many as are legal."""
    kind = families.family(target.family)
    axes = kind.axes(target)
    cut: dict[str, Value] = {}
    for axis, value in winner.variant.items():
        allowed = [size for size in axes.get(axis, ()) if isinstance(size, int)]
        if isinstance(value, int) and allowed:
            grown = axis == "BLOCK_K" and value >= winner.problem.d
            cut[axis] = min([size for size in allowed if grown and size >= target.d] or [min(value, max(allowed))])
    variant = winner.variant.with_(**cut)
    if stale(winner) or not kind.fits(target, variant, gpu):
        return variant

    def programs(of: Variant) -> int:
        return prod(of.int(axis) for axis in kind.grid_axes if axis in of)

    fewer = [other for other in kind.grids(target, variant) if programs(other) < programs(variant)]
    legal = (other for other in sorted(fewer, key=programs, reverse=True) if not kind.fits(target, other, gpu))
    return next(legal, variant)


def _refusal(winner: Winner, variant: Variant, target: Problem, gpu: Gpu, modes: tuple[str, ...]) -> str:
    family = families.family(target.family)
    if stale(winner):
        return f"stale: tuned on template {winner.template_hash}, the template is now {template_hash(family.name)}"
    if winner.precision not in modes:
        return f"precision {winner.precision} is not admissible here ({', '.join(modes)})"
    try:
        family.check(target, variant)
    except UsageError as error:
        return f"not in the space of {target.shape}: {error}"
    misfit = family.fits(target, variant, gpu)
    return f"does not fit {target.shape} on {gpu.slug}: {misfit}" if misfit else ""
