"""Which variants a search starts from: what is legal, what did well at other sizes, what the model favours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from otgen.families import family
from otgen.gpus import Gpu
from otgen.problem import Problem, Variant
from otgen.workload import estimate


def legal_variants(problem: Problem, gpu: Gpu) -> list[Variant]:
    """Every variant of the family's space that `fits` allows on `gpu`, in a fixed order."""
    kind = family(problem.family)
    axes = kind.axes(problem)
    variants = (Variant(dict(zip(axes, values))) for values in product(*axes.values()))
    return [variant for variant in variants if not kind.fits(problem, variant, gpu)]


def favourites(problem: Problem, gpu: Gpu, variants: Iterable[Variant], count: int) -> list[Variant]:
    """The `count` variants the model expects most of without compiling, no two of which differ in num_stages alone."""
    chosen: dict[Variant, Variant] = {}
    for variant in sorted(variants, key=lambda variant: estimate(problem, variant, gpu)):
        chosen.setdefault(variant.with_(num_stages=0), variant)
        if len(chosen) == count:
            break
    return list(chosen.values())


def regridded(problem: Problem, gpu: Gpu, variant: Variant) -> Variant:
    """`variant` with the number of programs that suits the problem's sizes: it compiles to the same kernels."""
    kind = family(problem.family)
    axes = {axis: values for axis, values in kind.axes(problem).items() if axis in kind.grid_axes and axis in variant}
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
