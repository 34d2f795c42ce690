"""A debiased step in plain PyTorch: the pair's symmetric step and each side's own, of `otgen.chunked` or `otgen.chunked_batch`.

Both functions take the keyword arguments of the rendered module they stand for (`otgen.families.sinkhorn`, schedule *debiased*),
and fill the same outputs.
"""

from __future__ import annotations

from typing import Any

from otgen import chunked, chunked_batch

SIDES = (
    {"x": "x", "u": "p", "a": "a", "x_sq": "x_sq", "u_out": "p_out", "rho": "rho_p", "damping": "damping_a"},
    {"x": "y", "u": "q", "a": "b", "x_sq": "y_sq", "u_out": "q_out", "rho": "rho_q", "damping": "damping_b"},
)
"""What the tensors and numbers of a side's own step are called in the debiased one."""

ALONE = ("p", "q", "p_out", "q_out", "rho_p", "rho_q")
"""The arguments that a symmetric step has not."""


def debiased_step(**arguments: Any) -> None:
    """The updates of u and v from each other, of p and of q from itself; with all their sums."""
    chunked.symmetric_step(**_pair(arguments))
    for side in _sides(arguments):
        chunked.own_step(**side)


def debiased_steps(*, rows: Any, columns: Any, **arguments: Any) -> None:
    """`debiased_step` of each problem of a batch."""
    chunked_batch.symmetric_step(rows=rows, columns=columns, **_pair(arguments))
    for counts, side in zip((rows, columns), _sides(arguments)):
        chunked_batch.own_step(rows=counts, columns=counts, **side)


def _pair(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in ALONE}


def _sides(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    shared = {"scale": arguments["scale"], "step": arguments["step"]}
    return [{name: arguments[ours] for name, ours in side.items()} | {"y": arguments[side["x"]], **shared} for side in SIDES]
