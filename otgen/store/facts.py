"""A fact: a trial and all that was learnt of it, whole, outside any file. Read back, every field is checked, nothing is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

from otgen import families, gpus
from otgen.errors import UsageError
from otgen.precision import MODES
from otgen.problem import DTYPES, Problem, Variant
from otgen.store.again import CARRIED
from otgen.store.records import ENVIRONMENT, STATUSES, Accuracy, Compiled, Measurement, Prediction, Trial
from otgen.store.rows import FINITE, Row, expected

PHASES = ("render_ms", "compile_ms", "verify_ms", "predict_ms", "measure_ms")
SENSORS = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")
MOST_SAMPLES = 10_000

_TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
_FAMILY = r"[a-z][a-z0-9_]{0,63}"
_SLUG = r"[a-z0-9][a-z0-9-]{0,63}"
_HASH = r"[0-9A-Za-z]{1,64}"
_KEY = r"[ -~]{1,128}"


@dataclass(frozen=True, slots=True)
class Fact:
    """A trial, when and where it was made (names in `ENVIRONMENT`), and what the compiler, model, clock and check said of it."""

    trial: Trial
    created_at: str
    environment: Mapping[str, str]
    compiled: Compiled | None
    prediction: Prediction | None
    measurement: Measurement | None
    accuracy: tuple[Accuracy, ...]

    @property
    def identity(self) -> str:
        """Equal for facts that are the same one, whatever files they lie in: a digest of all of it.

        A trial carried over to a later template was run once, however often it was carried: when that was does not count.
        """
        content = self.to_json()
        if CARRIED in self.trial.message:
            del content["created_at"]
        if content["compile"]:
            content["compile"]["key"] = plain_key(content["compile"]["key"])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The fact as `otgen export --format json` writes it."""
        trial, problem = self.trial, self.trial.problem
        row = {
            "created_at": self.created_at,
            "environment": {name: self.environment[name] for name in ENVIRONMENT},
            "family": problem.family,
            "gpu": trial.gpu,
            "n": problem.n,
            "m": problem.m,
            "d": problem.d,
            "dtype": problem.dtype,
            "flags": dict(problem.flags),
            "variant": dict(trial.variant),
            "template_hash": trial.template_hash,
            "status": trial.status,
            "message": trial.message,
            "seed": trial.seed,
        }
        row |= {phase: getattr(trial, phase) for phase in PHASES}
        row |= {name: part and asdict(part) for name, part in (("compile", self.compiled), ("prediction", self.prediction))}
        row["measurement"] = self.measurement and asdict(self.measurement) | {"samples_us": list(self.measurement.samples_us)}
        row["accuracy"] = [asdict(entry) | {"value": entry.value if isfinite(entry.value) else None} for entry in self.accuracy]
        return row

    @classmethod
    def from_json(cls, values: object) -> Fact:
        """The fact that `to_json` wrote. Raises UsageError for a field that is missing, unknown, or not of its type and range."""
        row = Row(values, "a trial")
        created_at = row.text("created_at", _TIMESTAMP)
        where = Row(row.take("environment"), "an environment")
        environment = {name: where.text(name) for name in ENVIRONMENT}
        where.end()
        trial = _trial(row)
        compiled = _compiled(Row(row.take("compile"), "a compile row")) if row.maybe("compile") else None
        prediction = _prediction(Row(row.take("prediction"), "a prediction")) if row.maybe("prediction") else None
        measurement = _measurement(Row(row.take("measurement"), "a measurement")) if row.maybe("measurement") else None
        entries = row.take("accuracy")
        if not isinstance(entries, list) or len(entries) > 64:
            raise expected("accuracy as a list of at most 64 objects", entries)
        accuracy = tuple(_accuracy(Row(entry, "an accuracy")) for entry in entries)
        if len({entry.metric for entry in accuracy}) < len(accuracy):
            raise expected("one accuracy per output", [entry.metric for entry in accuracy])
        row.end()
        return cls(trial, created_at, environment, compiled, prediction, measurement, accuracy)


def plain_key(key: str) -> str:
    """The compile key without what tells two binaries of one key apart (`otgen.store.union`)."""
    return key.partition("~")[0]


def misfit(fact: Fact, present: str, *, strangers: bool) -> str:
    """Why the fact lies outside the declared space, "" when it does not: the flags, and on the present template axes and fit.

    present    hash of the family's present template;  strangers  whether families and GPUs unknown to this otgen may be
    """
    problem, name = fact.trial.problem, fact.trial.gpu
    try:
        if not strangers or problem.family in families.FAMILIES:
            _in_space(fact, present)
        if strangers and name not in gpus.GPUS:
            return ""
        target = gpus.gpu(name)
        if target.slug != name:
            return f"expected the GPU as {target.slug}; got {name}"
        if fact.trial.template_hash == present:
            reason = families.FAMILIES[problem.family].fits(problem, fact.trial.variant, target)
            return f"expected a variant that is legal on {name}; got {fact.trial.variant.text}: {reason}" if reason else ""
    except UsageError as error:
        return str(error)
    return ""


def _in_space(fact: Fact, present: str) -> None:
    problem = fact.trial.problem
    kind = families.family(problem.family)
    if kind.problem(problem.n, problem.m, problem.d, problem.dtype, **dict(problem.flags)) != problem:
        raise expected(f"every flag of {kind.name}", dict(problem.flags))
    if fact.trial.template_hash == present:
        kind.check(problem, fact.trial.variant)


def _trial(row: Row) -> Trial:
    family, gpu = row.text("family", _FAMILY), row.text("gpu", _SLUG)
    n, m, d = (row.integer(name, 1, 1 << 31) for name in "nmd")
    dtype = row.text("dtype", "|".join(DTYPES))
    problem = Problem(family, n, m, d, dtype, tuple(row.axes("flags").items()))
    variant = Variant(row.axes("variant"))
    if variant.get("precision") not in MODES:
        raise expected(f"a variant with a precision among {', '.join(MODES)}", variant.text)
    return Trial(
        problem,
        gpu,
        variant,
        template_hash=row.text("template_hash", _HASH),
        status=row.text("status", "|".join(STATUSES)),
        message=row.message("message"),
        seed=row.integer("seed", -(1 << 63), (1 << 63) - 1) if row.maybe("seed") else None,
        **{phase: row.number(phase, 0.0) if row.maybe(phase) else None for phase in PHASES},
    )


def _compiled(row: Row) -> Compiled:
    key, source = row.text("key", _KEY), row.text("source_hash", _KEY)
    registers, spills, shared_bytes = (row.integer(name, 0, 1 << 31) for name in ("registers", "spills", "shared_bytes"))
    instructions = row.open_ended("instructions")
    row.end()
    return Compiled(key, source, registers, spills, shared_bytes, instructions)


def _prediction(row: Row) -> Prediction:
    prediction = Prediction(row.time("us"), row.open_ended("terms"))
    row.end()
    return prediction


def _measurement(row: Row) -> Measurement:
    protocol = row.text("protocol")
    median, low, high = row.time("median_us"), row.time("p20_us"), row.time("p80_us")
    if not low <= median <= high:
        raise expected("p20_us ≤ median_us ≤ p80_us", [low, median, high])
    samples = row.numbers("samples_us", MOST_SAMPLES)
    default = row.time("default_us") if row.maybe("default_us") else None
    sensors = (row.number(name, -FINITE) if row.maybe(name) else None for name in SENSORS)
    measurement = Measurement(protocol, median, low, high, samples, default, *sensors)
    row.end()
    return measurement


def _accuracy(row: Row) -> Accuracy:
    metric = row.text("metric", r"[A-Za-z_][A-Za-z0-9_]{0,63}")
    accuracy = Accuracy(metric, row.number("value", 0.0) if row.maybe("value") else inf, row.time("budget"))
    row.end()
    return accuracy
