"""Arguments that several commands share: ``k=v`` words, and the problem and variant they add up to."""

from __future__ import annotations

from collections.abc import Iterable

from otgen.errors import NoValidVariant, UsageError, unknown
from otgen.families import family
from otgen.gpus import Gpu
from otgen.precision import MODES, mode_name
from otgen.problem import Problem, Value, Variant, parse_shape


def assignment(word: str) -> tuple[str, Value]:
    """``"BLOCK_M=128"`` → ("BLOCK_M", 128). Raises UsageError for a word of another form."""
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise UsageError(f"expected name=value; got {word!r}; write for example schedule=symmetric or BLOCK_M=128")
    return name, int(value) if value.isdecimal() else value


def parse_problem(name: str, shape: str, dtype: str, words: Iterable[str]) -> tuple[Problem, dict[str, Value]]:
    """The problem that a family, a shape and the flags among `words` make, and the axes among `words`.

    Raises UsageError for anything unknown.
    """
    kind = family(name)
    given = dict(assignment(word) for word in words)
    n, m, d = parse_shape(shape)
    problem = kind.problem(n, m, d, dtype, **{k: v for k, v in given.items() if k in kind.flags})
    axes = {k: v for k, v in given.items() if k not in kind.flags}
    for axis in axes:
        if axis not in kind.axes(problem):
            raise unknown(f"flag or axis of {kind.name}", axis, [*kind.flags, *kind.axes(problem)])
    return problem, axes


def parse_variant(problem: Problem, axes: dict[str, Value], gpu: Gpu, *, winner: bool) -> Variant:
    """The stored winner on `gpu` (or the family's default) with `axes` changed.

    Raises UsageError for a value outside the space, NoValidVariant for a combination that is not legal on `gpu`.
    """
    kind = family(problem.family)
    if "precision" in axes:
        axes = {**axes, "precision": mode_name(str(axes["precision"]))}
    if winner:
        from otgen.dispatch import choose, cure

        modes = (str(axes["precision"]),) if "precision" in axes else tuple(MODES)
        choice = choose(problem.family, gpu.slug, problem.n, problem.m, problem.d, problem.dtype, problem.flags, modes)
        if choice.cache == "default":
            raise NoValidVariant(
                f"expected a stored winner for {problem} on {gpu.slug}; found none; run `{cure(problem, gpu.slug)}`"
            )
        base = choice.variant
    else:
        base = kind.default(problem)
    variant = kind.check(problem, base.with_(**axes))
    misfit = kind.fits(problem, variant, gpu)
    if misfit:
        raise NoValidVariant(
            f"expected a variant that is legal on {gpu.slug}; got {variant.text}: {misfit}; change one of its axes"
        )
    return variant
