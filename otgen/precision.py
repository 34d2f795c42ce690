"""Precision modes of the score product, their rounding, and the rule that says which of them a solve may use.

A mode says how the tensor core multiplies coordinates; sums are always accumulated in fp32. The score x·y·scale carries an error of
about 2s·u·|x||y|/eps, so what a mode can reach depends on R²/eps, with R the radius of the centred clouds.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from otgen.errors import InputError, unknown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Mode:
    """A precision mode.

    floor       L1 marginal error, as a share of the mass, reached per unit of R²/eps, by emulation in 2-D (about 3× lower in 64-D)
    products    how many tensor-core products of type `unit` replace one exact product
    unit        the operand type the tensor core sees; "fma" when it is not used
    mantissa    bits of an operand, the implicit one included (the emulated rounding of `rounded`)
    packed      which parts of the operands of a packed product are multiplied (`otgen.families.packed`), x's and y's, the largest
                part being the 0th; () where the mode has no such form
    only_packed whether it has no other
    truncates   whether the bits below are dropped rather than rounded: a tensor core reads fp32 registers as tf32 by ignoring them,
                and Triton converts nothing beforehand, so the errors add up instead of averaging out
    """

    name: str
    floor: float
    products: int
    unit: str
    mantissa: int
    truncates: bool = False
    packed: tuple[tuple[int, int], ...] = ()
    only_packed: bool = False

    @property
    def pace(self) -> tuple[int, str]:
        """Equal for modes that compile to kernels of the same speed: a tensor core takes all 16-bit floats alike."""
        return self.products, "16-bit" if self.unit in ("fp16", "bf16") else self.unit


ONE_PRODUCT = ((0, 0),)
THREE_PRODUCTS = ((0, 0), (0, 1), (1, 0))
SIX_PRODUCTS = (*THREE_PRODUCTS, (1, 1), (0, 2), (2, 0))

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("ieee", 2e-8, 1, "fma", 24),
        Mode("tf32x3", 2e-8, 3, "tf32", 22),
        Mode("fp16x3", 2e-8, 3, "fp16", 22, packed=THREE_PRODUCTS, only_packed=True),
        Mode("bf16x6", 2e-8, 6, "bf16", 24, packed=SIX_PRODUCTS, only_packed=True),
        Mode("bf16x3", 1e-6, 3, "bf16", 16, packed=THREE_PRODUCTS),
        Mode("fp16", 1e-4, 1, "fp16", 11, packed=ONE_PRODUCT),
        Mode("tf32", 6e-4, 1, "tf32", 11, truncates=True),
        Mode("bf16", 1e-3, 1, "bf16", 8, packed=ONE_PRODUCT),
    )
}
"""Every mode, most accurate first."""

LOG2_E = 1.4426950408889634
"""log2(e): kernels work in base 2."""

ALIASES = {"fp32": "ieee"}

FP16_RANGE = (6e-2, 6e4)
"""What the radius of the clouds, plain and scaled, must lie between in fp16: above, it overflows; below, its last bits are lost."""

BIAS_SHARE = 2.5
"""Scaled potentials of clouds of radius R reach this share of scale·R²: cost·(2R)² for f, less |x|²/2."""


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


def of_family(modes: tuple[str, ...], available: Collection[str]) -> tuple[str, ...]:
    """Those of `modes` that a kernel family has; where it has none, its modes of no lower accuracy than the finest of them."""
    finest = min(MODES[mode].floor for mode in modes)
    return tuple(mode for mode in modes if mode in available) or tuple(m for m in available if MODES[m].floor <= finest)


def representable(mode: str, radius: float, eps: float, cost: float = 1.0) -> bool:
    """Whether what a mode's operands hold stays inside their range.

    Coordinates, plain and multiplied by scale = 2·cost·log2(e)/eps; in packed products, where they are multiplied by its root,
    the potentials too. The small ones of a split operand are held by its other part.
    """
    smallest, largest = FP16_RANGE
    scale = 2.0 * cost * LOG2_E / eps
    if mode == "fp16x3":
        return max(math.sqrt(scale) * radius, BIAS_SHARE * scale * radius * radius) < largest
    return mode != "fp16" or (smallest < min(radius, scale * radius) and max(radius, scale * radius) < largest)


def rounded(x: torch.Tensor, mode: str) -> torch.Tensor:
    """`x` in float64 after what its mode does to an operand: rounded to nearest, ties to even, or truncated; range not emulated."""
    import torch

    if not torch.is_floating_point(x):
        raise InputError(f"expected a floating-point tensor; got {x.dtype}")
    mantissa, exponent = torch.frexp(x.double())
    scale = float(2 ** MODES[mode].mantissa)
    cut = torch.trunc if MODES[mode].truncates else torch.round
    return torch.ldexp(cut(mantissa * scale) / scale, exponent)
