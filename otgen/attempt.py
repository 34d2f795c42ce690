"""One variant on its way through a search: what was learnt of it, and the rows it leaves in the store."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from otgen.compile import compile_key
from otgen.gpus import Gpu
from otgen.measure import PROTOCOL, Timing, quantile
from otgen.model import Prediction, predict
from otgen.problem import Problem, Variant
from otgen.store import Accuracy, Compiled, Measurement
from otgen.store import Prediction as StoredPrediction
from otgen.verify import Accuracy as Check
from otgen.workload import CompiledLaunch, launch_costs


@dataclass(slots=True)
class Attempt:
    """A variant of `problem` for `gpu`.

    asked     the variant the study asked for;  variant  the one it became: of those that compile alike, the one predicted fastest
    launches  what the compiler made of it, once known;  source_hash  of the source it was given
    times_ms  phase of the store's trial table → milliseconds it took
    """

    problem: Problem
    gpu: Gpu
    asked: Variant
    variant: Variant
    launches: list[CompiledLaunch] | None = None
    source_hash: str = ""
    prediction: Prediction | None = None
    times_ms: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return str(self.variant["precision"])

    @property
    def key(self) -> str:
        return compile_key(self.problem, self.variant, self.gpu)

    @property
    def predicted_us(self) -> float:
        """Infinite while nothing was predicted."""
        return self.prediction.microseconds if self.prediction else math.inf

    @property
    def spills(self) -> int:
        return sum(launch.spills for launch in self.launches or ())

    def predict(self, variants: Iterable[Variant]) -> None:
        """Becomes the fastest of `variants`, which all compile to `launches`.

        Raises CompileError when a launch needs more than the GPU has.
        """
        assert self.launches is not None
        found = {variant: predict(self.gpu, launch_costs(self.problem, variant, self.gpu, self.launches)) for variant in variants}
        self.variant = min(found, key=lambda variant: found[variant].microseconds)
        self.prediction = found[self.variant]

    def compiled_row(self) -> Compiled | None:
        if self.launches is None:
            return None
        return Compiled(
            key=self.key,
            source_hash=self.source_hash,
            registers=max(launch.registers for launch in self.launches),
            spills=self.spills,
            shared_bytes=max(launch.shared_bytes for launch in self.launches),
            instructions={"launches": [launch.to_json() for launch in self.launches]},
        )

    def prediction_row(self) -> StoredPrediction | None:
        return StoredPrediction(self.prediction.microseconds, self.prediction.terms) if self.prediction else None


def accuracy_rows(checks: Iterable[Check]) -> tuple[Accuracy, ...]:
    """Of each output the check that came nearest to its budget, or exceeded it most."""
    worst: dict[str, Accuracy] = {}
    for check in checks:
        entry = Accuracy(check.output, check.error, check.budget)
        known = worst.get(check.output)
        if known is None or entry.value / entry.budget > known.value / known.budget:
            worst[check.output] = entry
    return tuple(worst.values())


def measurement_row(timing: Timing) -> Measurement:
    return Measurement(
        protocol=PROTOCOL,
        median_us=quantile(timing.samples_us, 0.5),
        p20_us=quantile(timing.samples_us, 0.2),
        p80_us=quantile(timing.samples_us, 0.8),
        samples_us=timing.samples_us,
        default_us=quantile(timing.default_us, 0.5),
        sm_clock_mhz=timing.sm_clock_mhz,
        temperature_c=timing.temperature_c,
        power_w=timing.power_w,
    )
