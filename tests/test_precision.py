"""Precision modes: emulated rounding is what the formats say, and a solve takes none whose floor it cannot afford."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otgen.errors import UsageError
from otgen.precision import MODES, admissible, floor, mode_name, of_family, representable, rounded


@given(st.floats(-1e4, 1e4, width=32))
def test_rounding_to_sixteen_bits_is_torchs_own(value: float) -> None:
    x = torch.tensor([value], dtype=torch.float64)
    if abs(value) > 1e-37:
        assert torch.equal(rounded(x, "bf16"), x.bfloat16().double())
    if abs(value) > 1e-4:
        assert torch.equal(rounded(x, "fp16"), x.half().double())


@pytest.mark.parametrize("mode", MODES)
def test_rounding_is_idempotent_and_half_a_unit_at_most(mode: str) -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = rounded(x, mode)
    assert torch.equal(rounded(once, mode), once)
    error = ((once - x) / x).abs()
    assert float(error.max()) <= 2.0 ** (MODES[mode].truncates - MODES[mode].mantissa)
    if MODES[mode].truncates:
        assert bool((once.abs() <= x.abs()).all())


FINE = ("ieee", "tf32x3", "fp16x3", "bf16x6")
"""Modes of fp32's own accuracy."""


def test_modes_are_ordered_by_accuracy_and_fp32_is_always_there() -> None:
    floors = [mode.floor for mode in MODES.values()]
    assert floors == sorted(floors)
    assert admissible(radius=1.0, eps=1e-9, tol=1e-12) == ("ieee",)


@pytest.mark.parametrize(
    ("radius", "eps", "tol", "modes"),
    [
        (1.0, 1.0, 1e-1, tuple(MODES)),
        (1.0, 0.1, 1e-1, (*FINE, "bf16x3", "fp16", "tf32", "bf16")),
        (1.0, 0.1, 1e-2, (*FINE, "bf16x3", "fp16")),
        (1.0, 0.01, 1e-3, (*FINE, "bf16x3")),
        (3.0, 0.001, 1e-3, FINE),
        (14.0, 0.01, 2e-3, ("ieee", "tf32x3", "bf16x6")),
    ],
)
def test_admissible_modes_follow_the_floor_rule(radius: float, eps: float, tol: float, modes: tuple[str, ...]) -> None:
    found = admissible(radius, eps, tol, cost=0.5)
    assert found == modes
    for mode in MODES:
        assert (mode in found) == (floor(mode, radius, eps, 0.5) <= tol / 3 and representable(mode, radius, eps, 0.5))


def test_fp16_needs_its_operands_in_range() -> None:
    assert representable("fp16", radius=1.0, eps=1e-2)
    assert not representable("fp16", radius=1000.0, eps=1e-2)
    assert representable("bf16", radius=1000.0, eps=1e-2)
    assert not representable("fp16", radius=1e6, eps=1e12), "the other cloud is not scaled"
    assert not representable("fp16", radius=1e-5, eps=1e-9), "subnormal coordinates"
    assert not representable("fp16x3", radius=100.0, eps=1e-1), "a packed product holds the potentials too"
    assert representable("fp16x3", radius=1e-4, eps=1e-4), "what is small for a part is held by the other"
    assert "fp16" not in admissible(radius=1e3, eps=1e-2, tol=1e12)


def test_a_family_without_a_mode_takes_one_as_accurate() -> None:
    stored = tuple(mode for mode in MODES if not MODES[mode].only_packed)
    assert of_family(("fp16x3", "tf32"), stored) == ("tf32",)
    assert of_family(("fp16x3",), stored) == ("ieee", "tf32x3")
    assert of_family(("bf16x6", "fp16x3"), tuple(MODES)) == ("bf16x6", "fp16x3")


def test_names() -> None:
    assert mode_name("fp32") == "ieee"
    assert mode_name("tf32") == "tf32"
    with pytest.raises(UsageError, match="Did you mean 'tf32'"):
        mode_name("tf23")
