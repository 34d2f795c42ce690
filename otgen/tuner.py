"""A tuning run: for each problem and precision mode ask a study, compile, predict or measure, verify, record, decide.

Every trial is stored the moment it is known: an interrupted run loses what was in flight, and the same command goes on from there.
Without the target GPU a variant's time is predicted from its machine code, and each one that would lead is first checked against
float64 in the interpreter. With the GPU, every variant is checked and timed on it.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

from otgen import __version__
from otgen.compile import compile_key, inspect_variant
from otgen.errors import CompileError, UsageError
from otgen.families import family
from otgen.gpus import GPUS, Gpu
from otgen.measure import PROTOCOL, Timing, measure, quantile
from otgen.model import Prediction, predict
from otgen.pool import Outcome, Pool, Role
from otgen.problem import Problem, Variant
from otgen.render import body_digest, source
from otgen.resources import template_hash
from otgen.search import Study
from otgen.store import Accuracy, Compiled, Measurement, Store, StoredTrial, Trial, Winner
from otgen.store import Prediction as StoredPrediction
from otgen.verify import failures, interpret
from otgen.workload import CompiledLaunch, estimate, launch_costs

STANDARD_SIZES = (4096, 1024, 16384, 65536)
STANDARD_DIMENSIONS = (3, 16, 64, 128, 512)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run searches.

    max_trials  variants per problem, all precision modes together, those of earlier runs counted in
    budget      seconds for the whole run, None for no limit
    measured    whether the target GPU is here and times are taken on it
    """

    max_trials: int = 36
    budget: float | None = None
    sampler: str = "tpe"
    seed: int = 0
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    measured: bool = False
    compile_limit: float = 60.0


@dataclass(slots=True)
class Progress:
    """Where a run stands; `listener`s get it after every trial. `best` is the leading trial's text for the present problem."""

    problem: Problem
    done: int = 0
    total: int = 0
    trials: int = 0
    best_us: float = math.inf
    best: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of a problem after its search: winners, all its trials, and how many were added by this run."""

    problem: Problem
    winners: Sequence[Winner]
    trials: Sequence[StoredTrial]
    added: int

    @property
    def failures(self) -> Counter[str]:
        """Status → how many trials ended in it, of those that are not ok."""
        return Counter(trial.status for trial in self.trials if trial.status != "ok")


def standard_problems(
    families: Sequence[str], shapes: Sequence[tuple[int, int, int]] | None, dtypes: Sequence[str]
) -> list[Problem]:
    """The problems of `families` at `shapes` (None: the standard set), every standard combination of flags."""
    every = shapes or [(n, n, d) for d in STANDARD_DIMENSIONS for n in STANDARD_SIZES]
    return [
        family(name).problem(n, m, d, dtype, **flags)
        for n, m, d in every
        for name in families
        for flags in family(name).standard(d)
        for dtype in dtypes
    ]


def legal_variants(problem: Problem, gpu: Gpu) -> list[Variant]:
    """Every variant of the family's space that `fits` allows on `gpu`, in a fixed order."""
    kind = family(problem.family)
    axes = kind.axes(problem)
    variants = (Variant(dict(zip(axes, values))) for values in product(*axes.values()))
    return [variant for variant in variants if not kind.fits(problem, variant, gpu)]


def tune(
    problems: Sequence[Problem], gpu: Gpu, store: Store, settings: Settings, listener: Callable[[Progress], None]
) -> Iterator[Summary]:
    """Tunes `problems` one after the other, yielding a summary of each; stops early when the budget is spent.

    Raises KeyboardInterrupt through, after the winners of the present problem are decided.
    """
    deadline = math.inf if settings.budget is None else time.monotonic() + settings.budget
    with tempfile.TemporaryDirectory(prefix="otgen-triton-") as cache:
        compiling = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": cache}
        roles = {"compile": Role(settings.jobs, settings.compile_limit, compiling)}
        if settings.measured:
            roles["measure"] = Role(1, 2 * settings.compile_limit, {"TRITON_INTERPRET": None})
        else:
            roles["check"] = Role(1, settings.compile_limit, {"TRITON_INTERPRET": "1"})
        with Pool(**roles) as pool:
            environment = store.environment(_environment(gpu, settings.measured))
            progress = Progress(problems[0], total=settings.max_trials * len(problems))
            for number, problem in enumerate(problems):
                progress.problem, progress.best_us, progress.best = problem, math.inf, ""
                progress.done = number * settings.max_trials
                run = _Run(problem, gpu, store, settings, pool, environment, progress, listener)
                try:
                    run.search(deadline)
                finally:
                    winners = store.decide(problem, gpu.slug)
                yield Summary(problem, winners, store.trials(problem, gpu.slug), run.added)
                if time.monotonic() >= deadline:
                    return


def _environment(gpu: Gpu, measured: bool) -> dict[str, str]:
    facts = {"gpu": gpu.name if measured else "", "otgen": __version__}
    for package in ("torch", "triton"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError as error:
            raise UsageError(f"expected {package} to be installed; it is not; run pip install {package}") from error
    return facts


@dataclass(slots=True)
class _Trial:
    """A variant on its way through the phases."""

    variant: Variant
    key: str
    launches: list[CompiledLaunch] | None = None
    prediction: Prediction | None = None
    times_ms: dict[str, float] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return str(self.variant["precision"])


class _Run:
    """The search of one problem: a study per precision mode, in turn, so that each gets its share of the trials.

    A mode whose share is used up with nothing to show gets one more trial: the default, if it was not tried.
    """

    def __init__(
        self,
        problem: Problem,
        gpu: Gpu,
        store: Store,
        settings: Settings,
        pool: Pool,
        environment: int,
        progress: Progress,
        listener: Callable[[Progress], None],
    ) -> None:
        self._problem, self._gpu, self._store, self._settings = problem, gpu, store, settings
        self._pool, self._environment, self._progress, self._listener = pool, environment, progress, listener
        self._best: dict[str, float] = {}
        self._standing: set[str] = set()
        self._rescued: set[str] = set()
        self.added = 0
        legal = legal_variants(problem, gpu)
        self._modes = list(dict.fromkeys(str(variant["precision"]) for variant in legal))
        self._left = {mode: -(-settings.max_trials // len(self._modes)) for mode in self._modes}
        kin = [entry.slug for entry in GPUS.values() if entry.arch == gpu.arch] or [gpu.slug]
        relatives = [self._regridded(variant) for variant in store.relatives(problem, kin)]
        self._studies = {mode: self._study(legal, relatives, mode) for mode in self._modes}
        for past in store.trials(problem, gpu.slug):
            self._learn(past)

    def _study(self, legal: list[Variant], relatives: list[Variant], mode: str) -> Study:
        """A study that starts from what did well at other sizes (and is compiled already), the model's favourites, the default.

        No two favourites differ in num_stages alone.
        """
        legal = [variant for variant in legal if variant["precision"] == mode]
        known = [variant for variant in dict.fromkeys(relatives) if variant["precision"] == mode]
        count = max(min(2, self._left[mode]), self._left[mode] * 2 // 3)
        favourites: dict[Variant, Variant] = {}
        for variant in sorted(legal, key=self._estimate):
            favourites.setdefault(variant.with_(num_stages=0), variant)
            if len(favourites) == count:
                break
        default = family(self._problem.family).default(self._problem).with_(precision=mode)
        first = [*known[:count], *favourites.values(), default]
        return Study(legal, first, self._settings.sampler, self._settings.seed)

    def _estimate(self, variant: Variant) -> float:
        return estimate(self._problem, variant, self._gpu)

    def _regridded(self, variant: Variant) -> Variant:
        """The variant with the number of programs that suits this problem's sizes: that costs no compilation."""
        kind = family(self._problem.family)
        axes = {axis: values for axis, values in kind.axes(self._problem).items() if axis in kind.grid_axes and axis in variant}
        choices = [variant.with_(**dict(zip(axes, values))) for values in product(*axes.values())]
        legal = [choice for choice in choices if not kind.fits(self._problem, choice, self._gpu)]
        return min(legal or choices, key=self._estimate)

    def _learn(self, past: StoredTrial) -> None:
        mode = str(past.variant["precision"])
        if mode in self._studies:
            good = past.status == "ok" and past.us is not None
            self._studies[mode].tell(past.variant, past.us if good else None)
            self._left[mode] -= 1
            if good:
                self._standing.add(mode)
            if good and past.error is not None and past.error <= 1:
                self._best[mode] = min(self._best.get(mode, math.inf), past.us or math.inf)

    def search(self, deadline: float) -> None:
        """Keeps twice as many trials in flight as there are compilers, until all shares are used up or time is."""
        turn = 0
        while True:
            while len(self._pool) < 2 * self._settings.jobs and time.monotonic() < deadline:
                mode = next((m for m in self._rotated(turn) if self._left[m] > 0), None)
                if mode is None:
                    break
                turn += 1
                self._start(mode)
            if not len(self._pool):
                return
            self._receive(self._pool.next())

    def _rotated(self, turn: int) -> list[str]:
        cut = turn % len(self._modes)
        return self._modes[cut:] + self._modes[:cut]

    def _start(self, mode: str) -> None:
        variant = self._studies[mode].ask()
        self._left[mode] -= 1
        if variant is None:
            self._left[mode] = 0
            return
        trial = _Trial(variant, compile_key(self._problem, variant, self._gpu))
        known = self._store.compiled(trial.key)
        if known is None:
            self._pool.submit("compile", trial, inspect_variant, self._problem, variant, self._gpu.slug)
        else:
            trial.launches = [CompiledLaunch.from_json(entry) for entry in known.instructions["launches"]]
            self._predict(trial)

    def _receive(self, outcome: Outcome) -> None:
        trial: _Trial = outcome.key
        if trial.launches is None:
            trial.times_ms["compile_ms"] = 1000 * outcome.seconds
            if outcome.status == "ok":
                trial.launches = outcome.value
                self._predict(trial)
            elif isinstance(outcome.error, CompileError):
                self._finish(trial, outcome.error.status, str(outcome.error))
            else:
                self._finish(trial, "compile_error" if outcome.status == "error" else outcome.status, outcome.message)
        elif outcome.status != "ok":
            lost = "illegal_access" if "illegal" in outcome.message else "launch_error"
            self._finish(trial, lost if outcome.status == "error" else outcome.status, outcome.message)
        elif self._settings.measured:
            trial.times_ms["measure_ms"] = 1000 * outcome.seconds
            checks, timing = outcome.value
            self._judge(trial, checks, timing)
        else:
            trial.times_ms["verify_ms"] = 1000 * outcome.seconds
            self._judge(trial, outcome.value, None)

    def _predict(self, trial: _Trial) -> None:
        assert trial.launches is not None
        began = time.perf_counter()
        spills = sum(launch.spills for launch in trial.launches)
        try:
            trial.prediction = predict(self._gpu, launch_costs(self._problem, trial.variant, self._gpu, trial.launches))
        except CompileError as error:
            self._finish(trial, error.status, str(error))
            return
        trial.times_ms["predict_ms"] = 1000 * (time.perf_counter() - began)
        if self._settings.measured:
            self._pool.submit("measure", trial, measure, self._problem, trial.variant)
        elif spills:
            self._finish(trial, "resource", f"spills {spills} bytes; what that costs the model cannot tell")
        elif trial.prediction.microseconds < self._best.get(trial.mode, math.inf):
            self._best[trial.mode] = trial.prediction.microseconds
            self._pool.submit("check", trial, interpret, self._problem, trial.variant)
        else:
            self._finish(trial, "ok")

    def _judge(self, trial: _Trial, checks: Sequence[Any], timing: Timing | None) -> None:
        wrong = "; ".join(failures(checks))
        worst: dict[str, Accuracy] = {}
        for check in checks:
            entry = Accuracy(check.output, check.error, check.budget)
            if check.output not in worst or entry.value / entry.budget > worst[check.output].value / worst[check.output].budget:
                worst[check.output] = entry
        measurement = _measurement(timing) if timing else None
        self._finish(trial, "wrong_result" if wrong else "ok", wrong, tuple(worst.values()), measurement)

    def _finish(
        self,
        trial: _Trial,
        status: str,
        message: str = "",
        accuracy: Sequence[Accuracy] = (),
        measurement: Measurement | None = None,
    ) -> None:
        us = measurement.median_us if measurement else trial.prediction.microseconds if trial.prediction else None
        if status == "wrong_result" and self._best.get(trial.mode) == us:
            del self._best[trial.mode]
        prediction = trial.prediction
        stored = Trial(
            self._problem,
            self._gpu.slug,
            trial.variant,
            status,
            template_hash(self._problem.family),
            message,
            self._settings.seed,
            **trial.times_ms,
        )
        self._store.record(
            stored,
            environment=self._environment,
            compiled=_compiled(self._problem, trial),
            prediction=StoredPrediction(prediction.microseconds, prediction.terms) if prediction else None,
            measurement=measurement,
            accuracy=accuracy,
        )
        self.added += 1
        self._studies[trial.mode].tell(trial.variant, us if status == "ok" else None)
        if status == "ok":
            self._standing.add(trial.mode)
        elif not self._left[trial.mode] and trial.mode not in self._standing | self._rescued:
            self._rescued.add(trial.mode)
            self._left[trial.mode] = 1
        self._progress.trials += 1
        self._progress.done += 1
        if status == "ok" and us is not None and us < self._progress.best_us:
            self._progress.best_us, self._progress.best = us, trial.variant.text
        self._listener(replace(self._progress))


def _compiled(problem: Problem, trial: _Trial) -> Compiled | None:
    if trial.launches is None:
        return None
    return Compiled(
        key=trial.key,
        source_hash=body_digest(source(problem, trial.variant)),
        registers=max(launch.registers for launch in trial.launches),
        spills=sum(launch.spills for launch in trial.launches),
        shared_bytes=max(launch.shared_bytes for launch in trial.launches),
        instructions={"launches": [launch.to_json() for launch in trial.launches]},
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
