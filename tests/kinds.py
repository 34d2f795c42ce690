"""Every kind of launch a family has."""

from __future__ import annotations

from otgen.problem import Family, Problem


def standard(kind: Family, n: int, m: int, d: int, dtype: str = "fp32", **more: int | str) -> list[Problem]:
    """A problem of each standard combination of flags; a measure's transport to itself is one of n × n."""
    combinations = [{**flags, **more} for flags in kind.standard(n, n, d)]
    return [kind.problem(n, n if flags.get("schedule") == "own" else m, d, dtype, **flags) for flags in combinations]


def every(kind: Family, n: int, m: int, d: int, dtype: str = "fp32") -> list[Problem]:
    """The problems of `standard`, and a batch of each where the family has batches."""
    batches = standard(kind, n, m, d, dtype, batch=4) if "batch" in kind.flags else []
    return standard(kind, n, m, d, dtype) + batches
