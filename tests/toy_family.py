"""A family of two axes and no template, for tests of the database and the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest

from otgen import families
from otgen.problem import Family, Problem, Variant
from otgen.store import Accuracy, Measurement, Prediction, Store, Trial

HASH = "0123456789ab"
MODES = ("ieee", "tf32", "bf16")


def _unused(*_: Any) -> Any:
    raise AssertionError("a database has no use for this")


def _axes(problem: Problem) -> dict[str, tuple[int | str, ...]]:
    return {"BLOCK_M": (16, 32, 64), "BLOCK_K": tuple(k for k in (16, 32, 64, 128) if k < 2 * problem.d), "precision": MODES}


def _fits(problem: Problem, variant: Variant, gpu: Any) -> str:
    return "too large for a toy" if variant.int("BLOCK_M") * variant.int("BLOCK_K") > 4096 else ""


TOY = Family(
    name="toy",
    formula="out = x",
    flags={"schedule": ("alternating", "symmetric"), "width": int},
    axes=_axes,
    fits=_fits,
    default=lambda problem: Variant(BLOCK_M=16, BLOCK_K=16, precision="ieee"),
    arguments=_unused,
    inputs=_unused,
    reference=_unused,
    work=_unused,
    budget=_unused,
    standard=lambda n, m, d: ({},),
)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `TOY` known, with a template whose hash is `HASH`."""
    monkeypatch.setitem(families.FAMILIES, "toy", TOY)
    for module in ("otgen.store.database", "otgen.store.reading", "otgen.ranking"):
        monkeypatch.setattr(f"{module}.template_hash", lambda family: HASH)


def variant(precision: str = "ieee", **axes: int) -> Variant:
    return Variant({"BLOCK_M": 32, "BLOCK_K": 64} | axes, precision=precision)


def put(
    store: Store,
    problem: Problem,
    gpu: str = "a100",
    *,
    choice: Variant | None = None,
    status: str = "ok",
    predicted: float | None = None,
    measured: float | None = None,
    template: str = HASH,
    error: float = 0.5,
) -> int:
    """Record one trial."""
    return store.record(
        Trial(problem, gpu, choice or variant(), status, template),
        environment=store.environment({"gpu": gpu, "otgen": "test"}),
        prediction=Prediction(predicted) if predicted else None,
        measurement=Measurement("test", measured, measured, measured) if measured else None,
        accuracy=[Accuracy("out", error, 1.0)],
    )
