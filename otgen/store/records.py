"""What goes into the tuning database and what comes out. Times are in microseconds (us) or milliseconds (ms), sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from otgen.problem import Problem, Variant

STATUSES = (
    "ok",
    "pruned",
    "compile_error",
    "resource",
    "wrong_result",
    "launch_error",
    "illegal_access",
    "timeout",
    "oom",
    "crashed",
    "duplicate",
)
"""How a trial may end."""

EVIDENCE = ("measured", "ported", "interpolated", "predicted", "default")
"""What a winner rests on, strongest first."""

ENVIRONMENT = ("gpu", "driver", "torch", "triton", "ptxas", "otgen")
"""What an environment is told by; a fact that does not apply (no driver, no GPU) is empty."""


class TuningWarning(UserWarning):
    """A kernel choice that is not the best the tuner could give, or a row of a database that was skipped."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One variant of one problem, tried for one GPU; `template_hash` is `otgen.resources.template_hash(problem.family)`."""

    problem: Problem
    gpu: str
    variant: Variant
    status: str
    template_hash: str
    message: str = ""
    seed: int | None = None
    render_ms: float | None = None
    compile_ms: float | None = None
    verify_ms: float | None = None
    predict_ms: float | None = None
    measure_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of one rendered source.

    key           names everything the binary depends on (source, target, options, signature): one row per key, shared by trials
    registers     per thread;  spills  bytes per thread;  shared_bytes  per block
    instructions  open-ended: what was counted in its loops
    """

    key: str
    source_hash: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's time and the terms it is made of."""

    us: float
    terms: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Times on the real GPU. `default_us` is the family's default variant, timed in the same batch."""

    protocol: str
    median_us: float
    p20_us: float
    p80_us: float
    samples_us: Sequence[float] = ()
    default_us: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The largest |error| of one output against float64 and what was allowed; a non-finite value is stored as NULL."""

    metric: str
    value: float
    budget: float


@dataclass(frozen=True, slots=True)
class StoredTrial:
    """A trial read back, with what decides between trials.

    error     the largest accuracy value / budget
    issue_us  of a prediction, how long the issue of instructions alone takes: they are counted, the rest of it is modelled
    environment, default_us, interval_us  of a measurement: the id of where it was made, the default variant's time in the same
              batch, the ends of a 95 % confidence interval of its median (without samples, its quantiles 20 and 80)
    """

    id: int
    variant: Variant
    status: str
    message: str
    predicted_us: float | None
    measured_us: float | None
    error: float | None
    registers: int | None
    spills: int | None
    shared_bytes: int | None
    issue_us: float | None = None
    environment: int | None = None
    default_us: float | None = None
    interval_us: tuple[float, float] | None = None

    @property
    def us(self) -> float | None:
        return self.predicted_us if self.measured_us is None else self.measured_us


@dataclass(frozen=True, slots=True)
class PastTrial:
    """A trial on an earlier template: what tells whether it holds on the present one.

    variant               with all axes that its family has now
    compile, source_hash  the id of its compile row, and the digest of the source that was compiled
    triton                the version it was compiled with
    """

    id: int
    variant: Variant
    compile: int
    source_hash: str
    triton: str


@dataclass(frozen=True, slots=True)
class Winner:
    """The best variant known for a problem on a GPU in one precision mode, and what that rests on.

    trial and path say where it comes from: the id of the trial, and the file it was read from.
    """

    problem: Problem
    gpu: str
    precision: str
    evidence: str
    variant: Variant
    predicted_us: float | None
    measured_us: float | None
    registers: int | None
    spills: int | None
    shared_bytes: int | None
    template_hash: str
    trial: int
    path: Path

    @property
    def key(self) -> tuple[Problem, str, str]:
        return self.problem, self.gpu, self.precision

    @property
    def us(self) -> float:
        """The measured time where there is one, else the predicted one."""
        us = self.predicted_us if self.measured_us is None else self.measured_us
        return float("inf") if us is None else us

    def to_json(self) -> dict[str, Any]:
        """The winner as `otgen show --json` prints it."""
        problem = self.problem
        return {
            "family": problem.family,
            "gpu": self.gpu,
            "n": problem.n,
            "m": problem.m,
            "d": problem.d,
            "flags": dict(problem.flags),
            "dtype": problem.dtype,
            "precision": self.precision,
            "evidence": self.evidence,
            "variant": dict(self.variant),
            "predicted_us": self.predicted_us,
            "measured_us": self.measured_us,
            "registers": self.registers,
            "spills": self.spills,
            "shared_bytes": self.shared_bytes,
            "template_hash": self.template_hash,
        }
