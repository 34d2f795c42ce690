"""The search of one problem: in each precision mode ask a study, compile, predict or measure, verify, record, tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from otgen.attempt import Attempt, accuracy_rows, measurement_row
from otgen.candidates import siblings
from otgen.compile import inspect_variants
from otgen.errors import CompileError
from otgen.families import family
from otgen.gpus import Gpu
from otgen.measure import measure
from otgen.mode import Mode, modes_of
from otgen.pool import Outcome, Pool
from otgen.problem import Problem, Variant
from otgen.resources import template_hash
from otgen.store import RESOLUTION, Accuracy, Measurement, Store, StoredTrial, Trial
from otgen.verify import failures, interpret
from otgen.workload import CompiledLaunch

GROUP = 4
"""Variants a compiler is given at a time: they share one start of the disassembler, a third of a compilation."""

QUEUE = 16
"""Tasks in flight at most, those waiting to be checked or measured among them: a question asked early knows few answers."""


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


class Run:
    """The search of `problem`, `max_trials` shared evenly among its precision modes, earlier runs' trials counted in."""

    def __init__(self, problem: Problem, max_trials: int, session: Session) -> None:
        self._problem, self._session = problem, session
        self._same_kernels = family(problem.family).same_kernels
        self.added = self._compiling = 0
        self._modes = modes_of(problem, max_trials, session)
        self._passed_over: dict[Variant, float] = {}
        for past in session.store.trials(problem, session.gpu.slug):
            self._learn(past)

    def _learn(self, past: StoredTrial) -> None:
        mode = self._modes.get(str(past.variant["precision"]))
        if mode is None or (self._session.measured and past.measured_us is None and past.status == "ok"):
            return  # a prediction is no reason not to measure
        mode.left -= 1
        us = past.us if past.status == "ok" else None
        variant = family(self._problem.family).complete(self._problem, past.variant)
        mode.tell(variant if self._session.measured else self._same_kernels(variant), us)
        self._passed_over.pop(past.variant, None)
        if us is not None and past.error is not None and past.error <= 1:
            mode.best_us = min(mode.best_us, us)
        elif us is not None and not self._session.measured:
            self._passed_over[past.variant] = us

    def search(self, deadline: float) -> None:
        """Keeps the compilers busy until all shares are used up or `deadline` has passed.

        A mode whose leader fails its check falls back on its best unchecked variant; one that ends with nothing, on the default.
        """
        pool = self._session.pool
        while True:
            while self._compiling <= self._session.jobs and len(pool) < QUEUE and time.monotonic() < deadline:
                if not self._start_group():
                    break
            if len(pool):
                self._receive(pool.next())
            elif time.monotonic() >= deadline or not (self._look_again() or self._revive()):
                return

    def _start_group(self) -> bool:
        """Asks for a few variants, of all modes in turn, and has them compiled together; whether there was one left to ask for.

        Towards the end groups get smaller, so that the compilers finish together and the last questions know most answers.
        """
        left = sum(mode.left for mode in self._modes.values())
        group: list[Attempt] = []
        while len(group) < max(1, min(GROUP, left // (2 * self._session.jobs))):
            waiting = [name for name, mode in self._modes.items() if mode.left > 0]
            if not waiting:
                break
            name = max(waiting, key=lambda name: self._modes[name].left)
            mode = self._modes[name]
            variant = mode.study.ask(self._hints(name))
            mode.left = mode.left - 1 if variant is not None else 0
            if variant is not None:
                attempt = Attempt(self._problem, self._session.gpu, variant, variant)
                if not self._known(attempt):
                    group.append(attempt)
        if group:
            self._compile(group)
        return bool(group) or any(mode.left > 0 for mode in self._modes.values())

    def _hints(self, name: str) -> list[Variant]:
        """The best variants of the other modes, in this one: what suits one precision often suits another."""
        others = (mode.study.best for other, mode in self._modes.items() if other != name)
        best = sorted((found for found in others if found), key=lambda found: found[0])
        return [variant.with_(precision=name) for _, variant in best]

    def _known(self, attempt: Attempt) -> bool:
        """Whether the attempt's kernels were compiled before; then it goes on at once."""
        known = self._session.store.compiled(attempt.key)
        if known is not None:
            attempt.launches = [CompiledLaunch.from_json(entry) for entry in known.instructions["launches"]]
            attempt.source_hash = known.source_hash
            self._predict(attempt)
        return known is not None

    def _compile(self, group: list[Attempt]) -> None:
        self._compiling += 1
        variants = [attempt.variant for attempt in group]
        self._session.pool.submit("compile", group, inspect_variants, self._problem, variants, self._session.gpu.slug)

    def _look_again(self) -> bool:
        """Goes on with what earlier runs left unchecked and could win now, once; whether there was any."""
        again = [v for v, us in self._passed_over.items() if us < (1.0 + RESOLUTION) * self._modes[str(v["precision"])].best_us]
        self._passed_over.clear()
        for variant in again:
            attempt = Attempt(self._problem, self._session.gpu, self._same_kernels(variant), variant)
            if not self._known(attempt):
                self._compile([attempt])
        return bool(again)

    def _revive(self) -> bool:
        """Gives modes that ended with nothing another chance; whether there was one to give."""
        empty = [mode for mode in self._modes.values() if mode.best_us == math.inf and not mode.rescued]
        for mode in empty:
            mode.rescued, mode.left = True, 1
        return bool(empty)

    def _receive(self, outcome: Outcome) -> None:
        if isinstance(outcome.key, list):
            self._compiled(outcome.key, outcome)
        else:
            self._checked(outcome.key, outcome)

    def _compiled(self, group: list[Attempt], outcome: Outcome) -> None:
        """One that hangs or kills its compiler takes its group with it: the others get another chance, each alone."""
        self._compiling -= 1
        if outcome.status != "ok" and len(group) > 1:
            for attempt in group:
                self._compile([attempt])
            return
        if outcome.status != "ok":
            group[0].times_ms["compile_ms"] = 1000 * outcome.seconds
            self._finish(group[0], "compile_error" if outcome.status == "error" else outcome.status, outcome.message)
            return
        for attempt, inspection in zip(group, outcome.value):
            attempt.times_ms["compile_ms"] = 1000 * inspection.seconds
            if inspection.error is None:
                attempt.launches, attempt.source_hash = inspection.launches, inspection.source_hash
                self._predict(attempt)
            else:
                self._finish(attempt, inspection.error.status, str(inspection.error))

    def _checked(self, attempt: Attempt, outcome: Outcome) -> None:
        attempt.times_ms["measure_ms" if self._session.measured else "verify_ms"] = 1000 * outcome.seconds
        if outcome.status != "ok":
            lost = "illegal_access" if "illegal" in outcome.message else "launch_error"
            self._finish(attempt, lost if outcome.status == "error" else outcome.status, outcome.message)
        else:
            checks, timing = outcome.value if self._session.measured else (outcome.value, None)
            wrong = "; ".join(failures(checks))
            measurement = measurement_row(timing) if timing else None
            self._finish(attempt, "wrong_result" if wrong else "ok", wrong, accuracy_rows(checks), measurement)

    def _predict(self, attempt: Attempt) -> None:
        began = time.perf_counter()
        measured = self._session.measured
        choices = [attempt.asked] if measured else siblings(self._problem, self._session.gpu, attempt.asked)
        try:
            attempt.predict(choices)
        except CompileError as error:
            self._finish(attempt, error.status, str(error))
            return
        attempt.times_ms["predict_ms"] = 1000 * (time.perf_counter() - began)
        mode = self._modes[attempt.mode]
        if measured:
            self._session.pool.submit("measure", attempt, measure, self._problem, attempt.variant)
        elif attempt.spills:
            self._finish(attempt, "resource", f"spills {attempt.spills} bytes; what that costs the model cannot tell")
        elif attempt.predicted_us < (1.0 + RESOLUTION) * mode.best_us:
            self._check(mode, attempt)
        else:
            mode.unchecked.append(attempt)
            self._finish(attempt, "ok")

    def _check_next(self, mode: Mode) -> None:
        """Checks the best variant that was passed over while a leader stood that has fallen since."""
        best = min(mode.unchecked, key=lambda attempt: attempt.predicted_us)
        mode.unchecked.remove(best)
        self._check(mode, best)

    def _check(self, mode: Mode, attempt: Attempt) -> None:
        if attempt.predicted_us < mode.best_us:
            mode.best_us, mode.leader = attempt.predicted_us, attempt
        known = self._session.store.checked(self._problem, attempt.variant)
        if known:
            self._finish(attempt, "ok", accuracy=known)
        else:
            self._session.pool.submit("check", attempt, interpret, self._problem, attempt.variant)

    def _finish(
        self,
        attempt: Attempt,
        status: str,
        message: str = "",
        accuracy: Sequence[Accuracy] = (),
        measurement: Measurement | None = None,
    ) -> None:
        """Records a trial, and tells the study and the listener of it."""
        session, mode = self._session, self._modes[attempt.mode]
        us = measurement.median_us if measurement else attempt.predicted_us
        fallen = False
        if status == "ok" and accuracy:
            mode.best_us = min(mode.best_us, us)
        elif fallen := mode.leader is attempt:
            mode.best_us, mode.leader = math.inf, None
        template = template_hash(self._problem.family)
        trial = Trial(self._problem, session.gpu.slug, attempt.variant, status, template, message, session.seed)
        session.store.record(
            replace(trial, **attempt.times_ms),
            environment=session.environment,
            compiled=attempt.compiled_row(),
            prediction=attempt.prediction_row(),
            measurement=measurement,
            accuracy=accuracy,
        )
        self.added += 1
        mode.tell(attempt.asked, us if status == "ok" else None)
        progress = session.progress
        progress.trials += 1
        progress.done += 1
        if status == "ok" and us < progress.best_us:
            progress.best_us, progress.best = us, attempt.variant.text
        session.listener(replace(progress))
        if fallen and mode.unchecked:
            self._check_next(mode)
