"""Every kind of launch a family has."""

from __future__ import annotations

from dataclasses import replace

from otgen.families.tiles import is_whole
from otgen.problem import Family, Problem, Variant


def standard(kind: Family, n: int, m: int, d: int, dtype: str = "fp32", **more: int | str) -> list[Problem]:
    """A problem of each standard combination of flags; a measure's transport to itself is one of n × n, lists no batch's."""
    combinations = [{**flags, **more} for flags in kind.standard(n, n, d) if "listed" not in flags or more.get("batch", 1) == 1]
    return [kind.problem(n, n if flags.get("schedule") == "own" else m, d, dtype, **flags) for flags in combinations]


def every(kind: Family, n: int, m: int, d: int, dtype: str = "fp32") -> list[Problem]:
    """The problems of `standard`, and a batch of each where the family has batches."""
    batches = standard(kind, n, m, d, dtype, batch=4) if "batch" in kind.flags else []
    return standard(kind, n, m, d, dtype) + batches


def held(problem: Problem, variant: Variant) -> tuple[Problem, Variant]:
    """Both, but where the tile is the whole problem: then a square one, one program's, and as many points as it is sure to hold."""
    if not is_whole(variant):
        return problem, variant
    most = variant.int("BLOCK_M") // 2
    sides = {"n": min(problem.n, most), "m": min(problem.m, most)}
    return replace(problem, **sides), variant.with_(BLOCK_N=variant["BLOCK_M"], num_stages=1, PROGRAMS=1)
