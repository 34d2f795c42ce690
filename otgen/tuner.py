"""A tuning run over many problems: workers, budget, and what is known of each problem at the end.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

from otgen import __version__
from otgen.carry import carry
from otgen.errors import UsageError
from otgen.gpus import Gpu
from otgen.measure import driver_version
from otgen.pool import Pool, Role
from otgen.problem import Problem, Value
from otgen.run import Progress, Run, Session
from otgen.standard import combinations
from otgen.store import Store, StoredTrial, Winner
from otgen.toolchain import ptxas_version

STANDARD_SIZES = (4096, 1024, 16384, 65536)
STANDARD_DIMENSIONS = (3, 16, 64, 128, 512)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run searches.

    max_trials     variants per problem, all precision modes together, those of earlier runs counted in
    budget         seconds for the whole run, None for no limit
    measured       whether the target GPU is here and times are taken on it
    compile_limit  seconds a compilation or a check may take
    """

    max_trials: int = 30
    budget: float | None = None
    sampler: str = "tpe"
    seed: int = 0
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    measured: bool = False
    compile_limit: float = 60.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of a problem after its search: winners, and all its trials.

    added  trials of this run;  carried  trials of an earlier template that count on the present one (`otgen.carry`)
    """

    problem: Problem
    winners: Sequence[Winner]
    trials: Sequence[StoredTrial]
    added: int
    carried: int = 0

    @property
    def failures(self) -> Counter[str]:
        """Status → how many trials ended in it, of those that are not ok."""
        return Counter(trial.status for trial in self.trials if trial.status != "ok")


def standard_problems(
    families: Sequence[str],
    shapes: Sequence[tuple[int, int, int]] | None,
    dtypes: Sequence[str],
    flags: Mapping[str, Value] | None = None,
) -> list[Problem]:
    """The problems of `families` at `shapes` (None: the standard set), every standard combination of flags.

    flags  set besides, see `otgen.standard.combinations`. Raises UsageError for one that a family does not have.
    """
    every = shapes or [(n, n, d) for d in STANDARD_DIMENSIONS for n in STANDARD_SIZES]
    return [
        replace(problem, dtype=dtype)
        for n, m, d in every
        for name in families
        for problem in combinations(name, n, m, d, dtypes[0], flags or {})
        for dtype in dtypes
    ]


def tune(
    problems: Sequence[Problem], gpu: Gpu, store: Store, settings: Settings, listener: Callable[[Progress], None]
) -> Iterator[Summary]:
    """Tunes `problems` one after the other, yielding a summary of each; stops early when the budget is spent.

    What an earlier template taught is carried over first, wherever the present one renders to the same kernels.

    A KeyboardInterrupt passes through, after the winners of the present problem are decided.
    """
    deadline = math.inf if settings.budget is None else time.monotonic() + settings.budget
    environment = store.environment(_environment(gpu, settings.measured))
    carried = carry(problems, gpu, store)
    with tempfile.TemporaryDirectory(prefix="otgen-triton-") as cache, Pool(**_roles(settings, cache)) as pool:
        progress = Progress(problems[0], total=settings.max_trials * len(problems))
        chosen = (settings.measured, settings.jobs, settings.sampler, settings.seed)
        session = Session(gpu, store, pool, environment, *chosen, progress, listener)
        for number, problem in enumerate(problems):
            progress.problem, progress.best_us, progress.best = problem, math.inf, ""
            progress.done = number * settings.max_trials
            run = Run(problem, settings.max_trials, session)
            try:
                run.search(deadline)
            finally:
                winners = store.decide(problem, gpu.slug)
            yield Summary(problem, winners, store.trials(problem, gpu.slug), run.added, carried[problem])
            if time.monotonic() >= deadline:
                return


def _roles(settings: Settings, cache: str) -> dict[str, Role]:
    compiling = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": cache}
    roles = {"compile": Role(settings.jobs, settings.compile_limit, compiling)}
    if settings.measured:
        return roles | {"measure": Role(1, 2 * settings.compile_limit, compiling, fresh_after_error=True)}
    return roles | {"check": Role(1, settings.compile_limit, {"TRITON_INTERPRET": "1"})}


def _environment(gpu: Gpu, measured: bool) -> dict[str, str]:
    facts = {"gpu": gpu.name if measured else "", "otgen": __version__, "ptxas": ptxas_version()}
    if measured:
        facts["driver"] = driver_version()
    for package in ("torch", "triton"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError as error:
            raise UsageError(f"expected {package} to be installed; it is not; run pip install {package}") from error
    return facts
