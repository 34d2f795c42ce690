"""Legal variants from a family's space, which is never enumerated. Axes are read from the family: a new one is sampled too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from random import Random

from otgen.families import family
from otgen.gpus import Gpu
from otgen.problem import Problem, Value, Variant

STEPS = 3000

Chosen = tuple[tuple[str, Value], ...]
"""Values of some axes, as pairs of axis and value."""


@lru_cache(maxsize=256)
def walk(problem: Problem, gpu: Gpu) -> list[Variant]:
    """Legal variants that a random walk from the default passes. It changes up to three axes at a step, and only to what is legal.

    Of as many draws from the product of all axes fifteen times fewer are legal.
    """
    kind, axes, random = family(problem.family), family(problem.family).axes(problem), Random(0)
    passed = {kind.default(problem): None}
    here = kind.default(problem)
    for _ in range(STEPS):
        there = here.with_(**{axis: random.choice(axes[axis]) for axis in random.sample(sorted(axes), random.randint(1, 3))})
        if not kind.fits(problem, there, gpu):
            passed[there], here = None, there
    return list(passed)


def nearest(problem: Problem, gpu: Gpu, base: Variant, chosen: Chosen) -> Variant | None:
    """A legal variant with the `chosen` values, no other axis of which could be as in `base` by itself; None when none is found."""
    fits = family(problem.family).fits
    wanted = (start.with_(**dict(chosen)) for start in chain([base], walk(problem, gpu)))
    found = next((variant for variant in wanted if not fits(problem, variant, gpu)), None)
    if found is None:
        return None
    for axis in sorted(base.keys() - dict(chosen).keys()):
        closer = found.with_(**{axis: base[axis]})
        found = found if fits(problem, closer, gpu) else closer
    return found


def values(problem: Problem) -> Iterator[Chosen]:
    """Every value of every axis, alone."""
    return (((axis, value),) for axis, values in family(problem.family).axes(problem).items() for value in values)


def pair(problem: Problem, random: Random) -> Chosen:
    """A value of each of two axes."""
    axes = family(problem.family).axes(problem)
    return tuple((axis, random.choice(axes[axis])) for axis in random.sample(sorted(axes), 2))


def ends(problem: Problem) -> Iterator[Sequence[Chosen]]:
    """Of every axis of numbers its values from the smallest up, and from the largest down; of every other axis each name."""
    for axis, values in family(problem.family).axes(problem).items():
        orders = (values, values[::-1]) if isinstance(values[0], int) else [(name,) for name in values]
        yield from ([((axis, value),) for value in order] for order in orders)
