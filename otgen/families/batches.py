"""A family's problems side by side: arguments, test input and reference of a batch, from those of its single problems.

A batch has one more axis ahead of every array, and one number a problem for each scalar in PER_PROBLEM. Problems are padded to the
largest: `rows` and `columns` (batch,) say how many points of each count. Padding has no weight. Outputs of padding are `PADDING`'s;
potentials stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from otgen.problem import Argument, Problem, Spec, Variant

if TYPE_CHECKING:
    import torch

PER_PROBLEM = ("scale", "damping", "damping_a", "damping_b", "tol")

PADDING = {"rho": 1.0, "gamma": 1.0, "rho_p": 1.0, "rho_q": 1.0, "out": 0.0, "out_t": 0.0}
"""What a kernel writes for padding, besides potentials, which it copies from the input they are the update of."""

SECOND = ("v_out", "gamma", "q_out", "rho_q", "out_t")
"""Outputs that belong to the columns."""

OF_NO_POINT = ("missed",)
"""Outputs that are not of points: numbers of a problem, all of them zero where it rests."""

Inputs = Callable[[Problem, int], dict[str, Any]]
Reference = Callable[[Problem, Mapping[str, Any]], dict[str, Any]]
Budget = Callable[[Problem, Variant, Mapping[str, Any], Mapping[str, Any]], dict[str, float]]


def arguments(of: Callable[[Problem], dict[str, Argument]]) -> Callable[[Problem], dict[str, Argument]]:
    """`of` for single problems and for batches: the extents come in after the tensors."""

    def batched(problem: Problem) -> dict[str, Argument]:
        single = of(problem)
        if problem.batch == 1:
            return single
        lead, one = problem.batch, Spec((problem.batch,))
        tensors = {name: replace(a, shape=(lead, *a.shape)) for name, a in single.items() if isinstance(a, Spec)}
        extents = {name: Spec((lead,), "int32") for name in ("rows", "columns")}
        scalars = {name: one if name in PER_PROBLEM else a for name, a in single.items() if not isinstance(a, Spec)}
        return {**tensors, **extents, **scalars}

    return batched


def inputs(of: Inputs) -> Inputs:
    """`of` for single problems and for batches of them: each a little smaller than the one before, and the second one resting."""

    def batched(problem: Problem, seed: int) -> dict[str, Any]:
        if problem.batch == 1:
            return of(problem, seed)
        import torch

        parts = [_part(problem, i) for i in range(problem.batch)]
        given = [of(part, seed + i) for i, part in enumerate(parts)]
        names = [name for name, value in given[0].items() if isinstance(value, torch.Tensor)]
        shared = {name: value for name, value in given[0].items() if name not in (*names, *PER_PROBLEM)}
        tensors = {name: _padded([one[name] for one in given]) for name in names}
        scalars = {
            name: torch.tensor([one[name] for one in given], dtype=torch.float64) for name in PER_PROBLEM if name in given[0]
        }
        awake = torch.tensor([i != 1 for i in range(problem.batch)])
        extents = {
            "rows": torch.tensor([part.n for part in parts]) * awake,
            "columns": torch.tensor([part.m for part in parts]) * awake,
        }
        return {**shared, **tensors, **scalars, **extents, "parts": list(zip(parts, given))}

    return batched


def repeated(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
    """Input of a batch that is one problem's, `given`, as often as the batch is large: no padding, and nothing rests."""
    import torch

    every = {name: value.expand(problem.batch, *value.shape) for name, value in given.items() if isinstance(value, torch.Tensor)}
    numbers = {name: torch.full((problem.batch,), given[name], dtype=torch.float64) for name in PER_PROBLEM if name in given}
    extents = {name: torch.full((problem.batch,), size) for name, size in (("rows", problem.n), ("columns", problem.m))}
    return {**given, **every, **numbers, **extents}


def one_of(problem: Problem) -> Problem:
    """The problem of which `problem` is a batch."""
    return replace(problem, flags=tuple(flag for flag in problem.flags if flag[0] != "batch"))


def reference(of: Reference) -> Reference:
    """`of` for single problems and for the batches that `inputs` makes."""

    def batched(problem: Problem, given: Mapping[str, Any]) -> dict[str, Any]:
        if problem.batch == 1:
            return of(problem, given)
        import torch

        expected = [of(*part) for part in given["parts"]]
        found = {}
        for name in expected[0]:
            values = _padded([one[name] for one in expected])
            if name in OF_NO_POINT:
                found[name] = torch.where(given["rows"][:, None] > 0, values, 0.0)
                continue
            kept = given[name.removesuffix("_out")] if name.endswith("_out") else values.new_full(values.shape, PADDING[name])
            counts = given["columns" if name in SECOND else "rows"]
            real = _inside(values, counts)
            found[name] = kept.where(~real, values)
        return found

    return batched


def budget(of: Budget) -> Budget:
    """`of` for single problems; for a batch the largest that any of its problems is allowed."""

    def batched(problem: Problem, variant: Variant, given: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
        if problem.batch == 1:
            return of(problem, variant, given, expected)
        allowed = []
        for i, (part, one) in enumerate(given["parts"]):
            own = {name: value[i, : _size(part, name)] for name, value in expected.items()}
            allowed.append(of(part, variant, one, own))
        return {name: max(one[name] for one in allowed) for name in allowed[0]}

    return batched


def _size(problem: Problem, name: str) -> int | None:
    """How many entries of an output there are, None for all."""
    return None if name in OF_NO_POINT else problem.m if name in SECOND else problem.n


def _part(problem: Problem, i: int) -> Problem:
    n = max(1, problem.n - 3 * i)
    return replace(one_of(problem), n=n, m=n if problem.own else max(1, problem.m - 5 * i))


def _padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stacked, each filled up with zeros to the size of the largest."""
    import torch

    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def _inside(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Whether an entry of `values` (batch, n, …) belongs to one of the first `counts` points of its problem."""
    import torch

    inside = torch.arange(values.shape[1]) < counts[:, None]
    return inside.reshape(*inside.shape, *(1,) * (values.ndim - 2)).expand_as(values)
