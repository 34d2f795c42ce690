"""Precision modes of the score product, their rounding, and the rule that says which of them a solve may use.

A mode says how the tensor core multiplies coordinates; sums are always accumulated in fp32. The score x·y·scale carries an error of
about 2s·u·|x||y|/eps, so what a mode can reach depends on R²/eps, with R the radius of the centred clouds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from otgen.errors import InputError, unknown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Mode:
    """A precision mode.

    floor       L1 marginal error reached per unit of R²/eps (measured in 2-D; about 3× lower in 64-D)
    products    how many tensor-core products of type `unit` replace one exact product
    unit        the operand type the tensor core sees; "fma" when it is not used
    mantissa    bits of an operand, the implicit one included (the emulated rounding of `rounded`)
    """

    name: str
    floor: float
    products: int
    unit: str
    mantissa: int


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("ieee", 2e-8, 1, "fma", 24),
        Mode("tf32x3", 2e-8, 3, "tf32", 22),
        Mode("bf16x3", 1e-6, 3, "bf16", 16),
        Mode("tf32", 1e-4, 1, "tf32", 11),
        Mode("fp16", 1e-4, 1, "fp16", 11),
        Mode("bf16", 1e-3, 1, "bf16", 8),
    )
}
"""Every mode, most accurate first."""

ALIASES = {"fp32": "ieee"}

FP16_LIMIT = 6e4
"""Largest scaled coordinate fp16 operands may hold."""


def mode_name(name: str) -> str:
    """The mode a user's spelling names (``fp32`` means ``ieee``). Raises UsageError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in MODES:
        raise unknown("precision", name, ["auto", "fp64", *ALIASES, *MODES])
    return name


def floor(mode: str, radius: float, eps: float, cost: float = 1.0) -> float:
    """L1 marginal error below which `mode` cannot go.

    radius  R = max |x| over both centred clouds;  eps, cost  of C = cost·|x−y|² (the table is for cost = ½).
    """
    return MODES[mode].floor * radius * radius * 2.0 * cost / eps


def admissible(radius: float, eps: float, tol: float, cost: float = 1.0) -> tuple[str, ...]:
    """The modes whose floor lies below a third of `tol`, most accurate first; never empty: fp32 is the last resort."""
    fine = [name for name in MODES if floor(name, radius, eps, cost) <= tol / 3 and representable(name, radius, eps, cost)]
    return tuple(fine) or ("ieee",)


def representable(mode: str, radius: float, eps: float, cost: float = 1.0) -> bool:
    """Whether coordinates scaled by 2·cost·log2(e)/eps stay inside the range of the mode's operands."""
    return mode != "fp16" or 2.0 * cost * 1.4426950408889634 / eps * radius < FP16_LIMIT


def rounded(x: torch.Tensor, mode: str) -> torch.Tensor:
    """`x` in float64 after the rounding its mode applies to an operand: to nearest, ties to even, range not emulated."""
    import torch

    if not torch.is_floating_point(x):
        raise InputError(f"expected a floating-point tensor; got {x.dtype}")
    mantissa, exponent = torch.frexp(x.double())
    scale = float(2 ** MODES[mode].mantissa)
    return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)
