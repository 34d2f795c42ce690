"""The search of one problem: in each precision mode ask a study, compile, predict or measure, verify, record, tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from otgen.candidates import first_variants, legal_variants
from otgen.compile import compile_key, inspect_variant
from otgen.errors import CompileError
from otgen.gpus import GPUS, Gpu
from otgen.measure import PROTOCOL, Timing, measure, quantile
from otgen.model import Prediction, predict
from otgen.pool import Outcome, Pool
from otgen.problem import Problem, Variant
from otgen.render import body_digest, source
from otgen.resources import template_hash
from otgen.search import Study
from otgen.store import Accuracy, Compiled, Measurement, Store, StoredTrial, Trial
from otgen.store import Prediction as StoredPrediction
from otgen.verify import Accuracy as Check
from otgen.verify import failures, interpret
from otgen.workload import CompiledLaunch, launch_costs


@dataclass(slots=True)
class Progress:
    """Where a tuning run stands, told after every trial; `best` is the leading variant's text for the present problem."""

    problem: Problem
    done: int = 0
    total: int = 0
    trials: int = 0
    best_us: float = math.inf
    best: str = ""


@dataclass(frozen=True)
class Session:
    """What the problems of a tuning run share.

    measured  whether the GPU is here: trials are timed on it in the pool's role ``measure``, else checked in ``check``
    jobs      compilers at a time, in the role ``compile``
    """

    gpu: Gpu
    store: Store
    pool: Pool
    environment: int
    measured: bool
    jobs: int
    sampler: str
    seed: int
    progress: Progress
    listener: Callable[[Progress], None]


@dataclass(slots=True)
class _Candidate:
    """A variant on its way through the phases."""

    variant: Variant
    key: str
    launches: list[CompiledLaunch] | None = None
    prediction: Prediction | None = None
    times_ms: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return str(self.variant["precision"])


@dataclass(slots=True)
class _Mode:
    """The search in one precision mode.

    left       trials of its share yet to start
    best_us    of the leader: a variant that was checked, or is being checked
    unchecked  variants that compiled and were slower than the leader of their moment
    """

    study: Study
    left: int
    best_us: float = math.inf
    leader: _Candidate | None = None
    unchecked: list[_Candidate] = field(default_factory=list)
    rescued: bool = False


class Run:
    """The search of `problem`, `max_trials` shared evenly among its precision modes, earlier runs' trials counted in."""

    def __init__(self, problem: Problem, max_trials: int, session: Session) -> None:
        self._problem, self._session = problem, session
        self.added = 0
        store, gpu = session.store, session.gpu
        legal: dict[str, list[Variant]] = {}
        for variant in legal_variants(problem, gpu):
            legal.setdefault(str(variant["precision"]), []).append(variant)
        kin = [entry.slug for entry in GPUS.values() if entry.arch == gpu.arch] or [gpu.slug]
        relatives = store.relatives(problem, kin)
        self._modes: dict[str, _Mode] = {}
        for mode, variants in legal.items():
            share = -(-max_trials // len(legal))
            first = first_variants(problem, gpu, variants, [v for v in relatives if v["precision"] == mode], share)
            self._modes[mode] = _Mode(Study(variants, first, session.sampler, session.seed), share)
        for past in store.trials(problem, gpu.slug):
            self._learn(past)

    def _learn(self, past: StoredTrial) -> None:
        mode = self._modes.get(str(past.variant["precision"]))
        if mode is None or (self._session.measured and past.measured_us is None and past.status == "ok"):
            return  # a prediction is no reason not to measure
        mode.left -= 1
        us = past.us if past.status == "ok" else None
        mode.study.tell(past.variant, us)
        if us is not None and past.error is not None and past.error <= 1:
            mode.best_us = min(mode.best_us, us)

    def search(self, deadline: float) -> None:
        """Keeps twice as many trials in flight as there are compilers, until all shares are used up or `deadline` has passed.

        A mode whose leader fails its check falls back on its best unchecked variant; one that ends with nothing, on the default.
        """
        pool, turn = self._session.pool, 0
        while True:
            while len(pool) < 2 * self._session.jobs and time.monotonic() < deadline:
                waiting = [name for name, mode in self._modes.items() if mode.left > 0]
                if not waiting:
                    break
                self._start(waiting[turn % len(waiting)])
                turn += 1
            if len(pool):
                self._receive(pool.next())
            elif time.monotonic() >= deadline or not self._revive():
                return

    def _start(self, name: str) -> None:
        mode = self._modes[name]
        variant = mode.study.ask()
        mode.left = mode.left - 1 if variant is not None else 0
        if variant is None:
            return
        candidate = _Candidate(variant, compile_key(self._problem, variant, self._session.gpu))
        known = self._session.store.compiled(candidate.key)
        if known is None:
            self._session.pool.submit(
                "compile", candidate, inspect_variant, self._problem, candidate.variant, self._session.gpu.slug
            )
        else:
            candidate.launches = [CompiledLaunch.from_json(entry) for entry in known.instructions["launches"]]
            self._predict(candidate)

    def _revive(self) -> bool:
        """Gives modes that ended with nothing another chance; whether there was one to give."""
        revived = False
        for mode in self._modes.values():
            if mode.best_us < math.inf:
                continue
            if not mode.rescued:
                mode.rescued, mode.left, revived = True, 1, True
        return revived

    def _receive(self, outcome: Outcome) -> None:
        candidate: _Candidate = outcome.key
        if candidate.launches is None:
            candidate.times_ms["compile_ms"] = 1000 * outcome.seconds
            if outcome.status == "ok":
                candidate.launches = outcome.value
                self._predict(candidate)
            elif isinstance(outcome.error, CompileError):
                self._finish(candidate, outcome.error.status, str(outcome.error))
            else:
                self._finish(candidate, "compile_error" if outcome.status == "error" else outcome.status, outcome.message)
            return
        candidate.times_ms["measure_ms" if self._session.measured else "verify_ms"] = 1000 * outcome.seconds
        if outcome.status != "ok":
            lost = "illegal_access" if "illegal" in outcome.message else "launch_error"
            self._finish(candidate, lost if outcome.status == "error" else outcome.status, outcome.message)
        else:
            checks, timing = outcome.value if self._session.measured else (outcome.value, None)
            wrong = "; ".join(failures(checks))
            measurement = _measurement(timing) if timing else None
            self._finish(candidate, "wrong_result" if wrong else "ok", wrong, _worst(checks), measurement)

    def _predict(self, candidate: _Candidate) -> None:
        assert candidate.launches is not None
        began = time.perf_counter()
        spills = sum(launch.spills for launch in candidate.launches)
        try:
            costs = launch_costs(self._problem, candidate.variant, self._session.gpu, candidate.launches)
            candidate.prediction = predict(self._session.gpu, costs)
        except CompileError as error:
            self._finish(candidate, error.status, str(error))
            return
        candidate.times_ms["predict_ms"] = 1000 * (time.perf_counter() - began)
        mode = self._modes[candidate.mode]
        if self._session.measured:
            self._session.pool.submit("measure", candidate, measure, self._problem, candidate.variant)
        elif spills:
            self._finish(candidate, "resource", f"spills {spills} bytes; what that costs the model cannot tell")
        elif _predicted(candidate) < mode.best_us:
            self._check(mode, candidate)
        else:
            mode.unchecked.append(candidate)
            self._finish(candidate, "ok")

    def _check_next(self, mode: _Mode) -> None:
        """Checks the best variant that was passed over while a leader stood that has fallen since."""
        best = min(mode.unchecked, key=_predicted)
        mode.unchecked.remove(best)
        self._check(mode, best)

    def _check(self, mode: _Mode, candidate: _Candidate) -> None:
        mode.best_us, mode.leader = _predicted(candidate), candidate
        known = self._session.store.checked(self._problem, candidate.variant)
        if known:
            self._finish(candidate, "ok", accuracy=known)
        else:
            self._session.pool.submit("check", candidate, interpret, self._problem, candidate.variant)

    def _finish(
        self,
        candidate: _Candidate,
        status: str,
        message: str = "",
        accuracy: Sequence[Accuracy] = (),
        measurement: Measurement | None = None,
    ) -> None:
        """Records a trial, and tells the study and the listener of it."""
        session, mode, prediction = self._session, self._modes[candidate.mode], candidate.prediction
        us = measurement.median_us if measurement else _predicted(candidate)
        fallen = False
        if status == "ok" and accuracy:
            mode.best_us = min(mode.best_us, us)
        elif fallen := mode.leader is candidate:
            mode.best_us, mode.leader = math.inf, None
        template = template_hash(self._problem.family)
        trial = Trial(self._problem, session.gpu.slug, candidate.variant, status, template, message, session.seed)
        session.store.record(
            replace(trial, **candidate.times_ms),
            environment=session.environment,
            compiled=_compiled(self._problem, candidate),
            prediction=StoredPrediction(prediction.microseconds, prediction.terms) if prediction else None,
            measurement=measurement,
            accuracy=accuracy,
        )
        self.added += 1
        mode.study.tell(candidate.variant, us if status == "ok" else None)
        progress = session.progress
        progress.trials += 1
        progress.done += 1
        if status == "ok" and us < progress.best_us:
            progress.best_us, progress.best = us, candidate.variant.text
        session.listener(replace(progress))
        if fallen and mode.unchecked:
            self._check_next(mode)


def _predicted(candidate: _Candidate) -> float:
    return candidate.prediction.microseconds if candidate.prediction else math.inf


def _worst(checks: Iterable[Check]) -> tuple[Accuracy, ...]:
    """Of each output the check that came nearest to its budget, or exceeded it most."""
    worst: dict[str, Accuracy] = {}
    for check in checks:
        entry = Accuracy(check.output, check.error, check.budget)
        known = worst.get(check.output)
        if known is None or entry.value / entry.budget > known.value / known.budget:
            worst[check.output] = entry
    return tuple(worst.values())


def _compiled(problem: Problem, candidate: _Candidate) -> Compiled | None:
    if candidate.launches is None:
        return None
    return Compiled(
        key=candidate.key,
        source_hash=body_digest(source(problem, candidate.variant)),
        registers=max(launch.registers for launch in candidate.launches),
        spills=sum(launch.spills for launch in candidate.launches),
        shared_bytes=max(launch.shared_bytes for launch in candidate.launches),
        instructions={"launches": [launch.to_json() for launch in candidate.launches]},
    )


def _measurement(timing: Timing) -> Measurement:
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
