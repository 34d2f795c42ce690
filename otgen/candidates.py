"""Which variants a search starts from: what is legal, what did well at other sizes, what the model favours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from random import Random

from otgen.families import family
from otgen.gpus import Gpu
from otgen.problem import Problem, Variant
from otgen.workload import estimate

SCORED = 1500
"""Variants the model looks at, of one precision mode, to find its favourites: estimates cost a tenth of a millisecond each."""


def legal_variants(problem: Problem, gpu: Gpu) -> list[Variant]:
    """Every variant of the family's space that `fits` allows on `gpu`, in a fixed order."""
    fits = family(problem.family).fits
    return [variant for variant in _legal_when_large(replace(problem, n=LARGE, m=LARGE), gpu) if not fits(problem, variant, gpu)]


LARGE = 1 << 30


@lru_cache(maxsize=32)
def _legal_when_large(problem: Problem, gpu: Gpu) -> list[Variant]:
    """What is legal for large clouds holds all that is legal for smaller ones: a small size only ever forbids."""
    kind = family(problem.family)
    axes = kind.axes(problem)
    variants = (Variant(dict(zip(axes, values))) for values in product(*axes.values()))
    return [variant for variant in variants if not kind.fits(problem, variant, gpu)]


def favourites(problem: Problem, gpu: Gpu, variants: Sequence[Variant], count: int) -> list[Variant]:
    """The `count` variants the model expects most of without compiling, no two of which differ in num_stages alone.

    Shallow pipelines and the smallest grid stand for the others; of those at most SCORED are looked at, drawn with a fixed seed.
    """
    axes = family(problem.family).axes(problem)
    grid = {axis: axes[axis][0] for axis in family(problem.family).grid_axes if axis in axes}
    plain = [v for v in variants if v.int("num_stages") <= 2 and all(v[axis] == value for axis, value in grid.items())]
    scored = Random(0).sample(plain, SCORED) if len(plain) > SCORED else plain
    scored = [regridded(problem, gpu, variant) for variant in scored]
    chosen: dict[Variant, Variant] = {}
    for variant in sorted(scored, key=lambda variant: estimate(problem, variant, gpu)):
        chosen.setdefault(variant.with_(num_stages=0), variant)
        if len(chosen) == count:
            break
    return list(chosen.values())


def regridded(problem: Problem, gpu: Gpu, variant: Variant) -> Variant:
    """`variant` with the number of programs that suits the problem's sizes: it compiles to the same kernels."""
    kind = family(problem.family)
    axes = {axis: values for axis, values in kind.axes(problem).items() if axis in kind.grid_axes and axis in variant}
    if not axes:
        return variant
    choices = [variant.with_(**dict(zip(axes, values))) for values in product(*axes.values())]
    legal = [choice for choice in choices if not kind.fits(problem, choice, gpu)]
    return min(legal or choices, key=lambda choice: estimate(problem, choice, gpu))


def first_variants(problem: Problem, gpu: Gpu, legal: Sequence[Variant], relatives: Iterable[Variant], share: int) -> list[Variant]:
    """What a study of `share` trials tries first: relatives (compiled already), favourites, the default.

    legal, relatives  of one precision mode
    """
    count = max(min(2, share), share * 2 // 3)
    known = list(dict.fromkeys(regridded(problem, gpu, variant) for variant in relatives))[:count]
    default = family(problem.family).default(problem)
    mode = legal[0]["precision"]
    return [*known, *favourites(problem, gpu, legal, count), default.with_(precision=mode)]
