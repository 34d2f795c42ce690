"""The problems a tuning run covers at one shape when nobody names their flags, and the words that name others."""

from __future__ import annotations

from collections.abc import Mapping

from otgen.families import family
from otgen.problem import Problem, Value


def combinations(name: str, n: int, m: int, d: int, dtype: str, flags: Mapping[str, Value]) -> list[Problem]:
    """The problems of the family called `name` in its standard combinations of flags, those in `flags` set besides.

    Of combinations that differ in a flag given, those that have the value stay, and the others go; where none has it, all take it,
    but that lists are one problem's, and no batch's.
    Raises UsageError for a flag or a value that the family does not have.
    """
    kind = family(name)
    chosen = [kind.problem(n, m, d, dtype, **combination) for combination in kind.standard(n, m, d)]
    for flag, value in flags.items():
        kept = [problem for problem in chosen if (flag, value) in problem.flags]
        chosen = kept or [kind.problem(n, m, d, dtype, **{**dict(problem.flags), flag: value}) for problem in chosen]
    return list(dict.fromkeys(problem for problem in chosen if problem.batch == 1 or problem.listed == 1))


def flag_words(problem: Problem) -> list[str]:
    """What `otgen tune` needs to be told to cover `problem` besides its family, shape and dtype: ``["batch=64"]``.

    All flags, when those that the standard combinations lack would join others than the problem's own.
    """
    standard = combinations(problem.family, problem.n, problem.m, problem.d, problem.dtype, {})
    if problem in standard:
        return []
    lacking = {flag: value for flag, value in problem.flags if all((flag, value) not in other.flags for other in standard)}
    varied = any(len({dict(other.flags).get(flag) for other in standard}) > 1 for flag in lacking)
    covered = combinations(problem.family, problem.n, problem.m, problem.d, problem.dtype, lacking)
    words = dict(problem.flags) if varied or problem not in covered else lacking
    return [f"{flag}={value}" for flag, value in words.items()]
