"""The axis SPLITS: programs that share a block of rows, each with its part of the columns; a second launch merges their sums.

Blocks of rows alone leave most of a GPU idle where n is small, however many columns there are. A part's sums go to scratch memory;
where they were taken below a running maximum, that of the part goes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from otgen.families import tiles
from otgen.problem import BYTES, LARGE, Problem, Sweep, Value, Variant

AXIS: Mapping[str, tuple[Value, ...]] = {"SPLITS": tiles.powers_of_two(1, 16)}

LARGEST_SCRATCH = 1 << 30
"""Bytes that shares of sums may take: of a symmetric step at n = m, blocks of 128 rows, up to 185 000 points."""

ROOMIEST = ((1, LARGE),)
"""The n and m that forbid least: the fewest shares, of the most columns."""


def splits(variant: Variant) -> int:
    """Programs that share a block of rows."""
    return int(variant.get("SPLITS", 1))


def misfit(problem: Problem, variant: Variant, sums: int) -> str:
    """Why the columns cannot be shared out like that, or "".

    sums  numbers that a launch keeps of each row
    """
    if splits(variant) == 1:
        return ""
    if splits(variant) * variant.int("BLOCK_N") > problem.m:
        return "a program would have no columns"
    if scratch_bytes(problem, variant, sums) > LARGEST_SCRATCH:
        return f"the shares of its sums exceed {LARGEST_SCRATCH} bytes"
    return ""


def scratch_bytes(problem: Problem, variant: Variant, sums: int) -> int:
    """What the programs that share a block of rows write: of each row `sums`, and their peak below a running maximum."""
    return BYTES["fp32"] * problem.batch * splits(variant) * problem.n * (sums + _peaks(variant))


def launches(whole: Sweep, variant: Variant, sums: int) -> tuple[Sweep, ...]:
    """`whole`, or the sweep of parts and what merges `sums` numbers of each row in each of its programs."""
    parts = splits(variant)
    if parts == 1:
        return (whole,)
    merge = replace(whole, tiles=0, shares=parts * (sums + _peaks(variant)))
    return replace(whole, programs=whole.programs * parts, tiles=ceil(whole.tiles / parts)), merge


def _peaks(variant: Variant) -> int:
    return int(variant["stabiliser"] == "running")
