"""One precision mode of a problem's search: its share of the trials, its study, its leader."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from otgen.attempt import Attempt
from otgen.candidates import Refinements, by_mode, first_variants, in_best_grid, legal_modes, legal_variants, score
from otgen.families import family
from otgen.gpus import GPUS
from otgen.precision import MODES
from otgen.problem import Problem, Variant
from otgen.search import Study

if TYPE_CHECKING:
    from otgen.run import Session


@dataclass
class Mode:
    """The search in one precision mode.

    begin      makes its study, which takes a tenth of a second: put off until something is asked of it
    left       trials of its share yet to start
    known      variants and their times (None: failed), for the study to start from
    best_us    of the leader: a variant that was checked, or is being checked
    unchecked  variants that compiled and were slower than the leader of their moment
    """

    begin: Callable[[], Study]
    left: int
    known: list[tuple[Variant, float | None]] = field(default_factory=list)
    best_us: float = math.inf
    leader: Attempt | None = None
    unchecked: list[Attempt] = field(default_factory=list)
    rescued: bool = False

    @cached_property
    def study(self) -> Study:
        study = self.begin()
        for variant, us in self.known:
            study.tell(variant, us)
        return study

    def tell(self, variant: Variant, us: float | None) -> None:
        """The time of `variant` in microseconds, None when it failed."""
        if "study" in vars(self):
            self.study.tell(variant, us)
        else:
            self.known.append((variant, us))


def modes_of(problem: Problem, max_trials: int, session: Session) -> dict[str, Mode]:
    """Precision mode → its search, for each mode legal for `problem` on the session's GPU; `max_trials` shared evenly."""
    names = legal_modes(problem, session.gpu)
    share = -(-max_trials // max(1, len(names)))
    start = _Start(problem, session, names, share)
    return {name: Mode(partial(start.study, name), share) for name in names}


class _Start:
    """What the studies of a problem begin with, worked out when the first one does."""

    def __init__(self, problem: Problem, session: Session, names: list[str], share: int) -> None:
        self._problem, self._session, self._names, self._share = problem, session, names, share

    @cached_property
    def _legal(self) -> dict[str, list[Variant]]:
        return by_mode(legal_variants(self._problem, self._session.gpu))

    @cached_property
    def _relatives(self) -> dict[str, list[Variant]]:
        gpu = self._session.gpu
        kin = [entry.slug for entry in GPUS.values() if entry.arch == gpu.arch] or [gpu.slug]
        return by_mode(self._session.store.relatives(self._problem, kin))

    def study(self, name: str) -> Study:
        problem, session, variants = self._problem, self._session, self._legal[name]
        alike = [other for other in self._names if MODES[other].pace == MODES[name].pace]
        turn = alike.index(name), len(alike)
        first = first_variants(problem, session.gpu, variants, self._relatives.get(name, []), self._share, turn)
        if session.measured:
            first = [in_best_grid(problem, session.gpu, variant) for variant in first]
        else:
            same_kernels = family(problem.family).same_kernels
            variants = [variant for variant in variants if same_kernels(variant) == variant]
        refinements = Refinements(problem, session.gpu)
        return Study(variants, first, session.sampler, session.seed, score(problem, session.gpu), refinements)
