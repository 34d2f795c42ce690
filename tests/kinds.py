"""Every kind of launch a family has."""

from __future__ import annotations

from collections.abc import Mapping

from otgen.problem import Family, Value


def every(kind: Family, d: int) -> list[Mapping[str, Value]]:
    """The standard combinations of flags, and a batch of each where the family has batches."""
    single = kind.standard(d)
    return [*single, *({**flags, "batch": 4} for flags in single if "batch" in kind.flags)]
