"""Which variants a search looks at and starts from: what is legal, what did well at other sizes, what the model favours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from random import Random

from otgen.families import family
from otgen.families.tiles import TILE_AXES, tile_misfit
from otgen.gpus import Gpu
from otgen.guess import estimate
from otgen.problem import Problem, Variant

SCORED = 1500
"""Variants the model looks at, of one precision mode, to find its favourites: estimates cost a tenth of a millisecond each."""


def legal_variants(problem: Problem, gpu: Gpu) -> list[Variant]:
    """Every plain variant of the family's space that `fits` allows on `gpu`, in a fixed order: `Refinements` go on from these."""
    fits = family(problem.family).fits
    return [variant for variant in _legal_somewhere(_roomiest(problem), gpu) if not fits(problem, variant, gpu)]


def legal_modes(problem: Problem, gpu: Gpu) -> list[str]:
    """The precision modes that `legal_variants` holds, without going through them all where the default is legal."""
    kind = family(problem.family)
    default, roomiest = kind.default(problem), _roomiest(problem)

    def legal(mode: str) -> bool:
        if not kind.fits(problem, default.with_(precision=mode), gpu):
            return True
        return any(_legal_mode(other, mode, gpu) for other in roomiest) and _legal_mode(problem, mode, gpu)

    return [mode for mode in map(str, kind.axes(problem)["precision"]) if legal(mode)]


def _roomiest(problem: Problem) -> tuple[Problem, ...]:
    """What is legal for one of them holds all that is legal for `problem`: one list serves all sizes."""
    return tuple(replace(problem, n=n, m=m) for n, m in family(problem.family).roomiest)


@lru_cache(maxsize=1024)
def _legal_mode(problem: Problem, mode: str, gpu: Gpu) -> bool:
    return any(not reason for reason, _, _ in refusals(problem, gpu, [mode]))


def refusals(problem: Problem, gpu: Gpu, modes: Iterable[str] = ()) -> Iterator[tuple[str, int, Variant]]:
    """The plain variants of the space, why each is refused ("": it is legal), and how many it stands for: those of a tile that
    cannot work are one.

    modes  precision modes to go through; none: all
    """
    kind = family(problem.family)
    axes = kind.listed_axes(problem)
    axes["precision"] = tuple(modes) or axes["precision"]
    outer = [axis for axis in TILE_AXES if axis in axes]
    inner = [axis for axis in axes if axis not in outer]
    structures = [dict(zip(inner, values)) for values in product(*(axes[axis] for axis in inner))]
    for values in product(*(axes[axis] for axis in outer)):
        tile = dict(zip(outer, values))
        first = Variant(tile, **structures[0])
        misfit = tile_misfit(problem, first, gpu)
        if misfit:
            yield misfit, len(structures), first
        else:
            for structure in structures:
                variant = Variant(tile, **structure)
                yield kind.fits(problem, variant, gpu), 1, variant


@lru_cache(maxsize=32)
def _legal_somewhere(problems: tuple[Problem, ...], gpu: Gpu) -> list[Variant]:
    """What is legal for one of the problems, once."""
    legal = (variant for problem in problems for reason, _, variant in refusals(problem, gpu) if not reason)
    return list(dict.fromkeys(legal))


@dataclass(frozen=True)
class Refinements:
    """The axes of a problem's family that are tried on top of what did well, on `gpu`."""

    problem: Problem
    gpu: Gpu

    def plain(self, variant: Variant) -> Variant:
        return family(self.problem.family).plain(variant)

    def allow(self, variant: Variant) -> bool:
        return not family(self.problem.family).fits(self.problem, variant, self.gpu)

    def near(self, variant: Variant) -> list[Variant]:
        """The legal variants that differ from `variant` in one refinement."""
        kind = family(self.problem.family)
        axes = {axis: values for axis, values in kind.axes(self.problem).items() if axis in kind.refinements}
        plain = kind.refinements
        others = (
            variant.with_(**{axis: value})
            for axis, values in axes.items()
            for value in values
            if value != variant.get(axis, plain[axis])
        )
        return [other for other in others if self.allow(other)]


def by_mode(variants: Iterable[Variant]) -> dict[str, list[Variant]]:
    """Precision mode → its variants, in their order."""
    modes: dict[str, list[Variant]] = {}
    for variant in variants:
        modes.setdefault(str(variant["precision"]), []).append(variant)
    return modes


def siblings(problem: Problem, gpu: Gpu, variant: Variant) -> list[Variant]:
    """The legal variants that compile to the kernels of `variant`, itself among them: they differ in the number of programs."""
    kind = family(problem.family)
    kernels, choices = kind.same_kernels(variant), kind.grids(problem, variant)
    return [c for c in choices if c == variant or (kind.same_kernels(c) == kernels and not kind.fits(problem, c, gpu))]


def score(problem: Problem, gpu: Gpu) -> Callable[[Variant], float]:
    """What the model expects of a variant without compiling it, in microseconds: of its siblings, the best."""
    return lambda variant: min(estimate(problem, choice, gpu) for choice in siblings(problem, gpu, variant))


def favourites(problem: Problem, gpu: Gpu, variants: Sequence[Variant], count: int) -> list[Variant]:
    """The `count` variants the model expects most of without compiling, no two of which differ in num_stages alone.

    Pipelines of two stages, where legal, and one variant of those that compile alike stand for the others; of these at most SCORED
    are looked at, drawn with a fixed seed. Of several one makes as many columns of the output as any, and repeats the scores least:
    once compiled, such variants were found 10 to 40 % faster than the model expects of them (256 columns, d = 64, H100).
    """
    same_kernels = family(problem.family).same_kernels
    shallow = (variant for variant in variants if variant.int("num_stages") <= 2 and same_kernels(variant) == variant)
    deepest = {v.with_(num_stages=0): v for v in sorted(shallow, key=lambda v: v.int("num_stages"))}
    plain = list(deepest.values())
    looked_at = Random(0).sample(plain, SCORED) if len(plain) > SCORED else plain
    ranked = sorted(looked_at, key=score(problem, gpu))
    chosen, most = ranked[:count], max(map(_columns, ranked), default=0)
    if len(chosen) > 1 and max(map(_columns, chosen)) < most:
        chosen[-1] = next(variant for variant in ranked if _columns(variant) == most)
    return chosen


def _columns(variant: Variant) -> int:
    """Columns of the output that a program makes."""
    return int(variant.get("BLOCK_W", 0))


def first_variants(
    problem: Problem,
    gpu: Gpu,
    legal: Sequence[Variant],
    relatives: Iterable[Variant],
    share: int,
    turn: tuple[int, int] = (0, 1),
) -> list[Variant]:
    """What a study of `share` trials tries first: relatives (compiled already), favourites, the default; each for its siblings.

    legal, relatives  of one precision mode
    turn              (number, of): modes that cost the same divide their favourites among them; this one is the number-th
    """
    count = max(min(2, share), share // 2)
    number, of = turn
    known = list(dict.fromkeys(map(family(problem.family).same_kernels, relatives)))[:count]
    default = family(problem.family).default(problem).with_(precision=legal[0]["precision"])
    return [*known, *favourites(problem, gpu, legal, count * of)[number::of], default]


def in_best_grid(problem: Problem, gpu: Gpu, variant: Variant) -> Variant:
    """Of the variant's siblings the one the model expects most of without compiling."""
    return min(siblings(problem, gpu, variant), key=lambda choice: estimate(problem, choice, gpu))
