"""Which variant to try next: an Optuna study asked and told over enumerated legal variants. The only importer of optuna.

A study starts from the variants it is given, and goes on with hints. Then a neighbour of the best so far and a proposal of the
sampler take turns: the one polishes what was found, the other looks elsewhere. A sampler proposes a point of the product of all
axes, most of it illegal or seen before; the study takes the nearest legal unseen variant instead, so no trial is wasted. Failures
are told as pruned, which samplers avoid.

Refinements, axes whose product with the others would be too long a list, are steps away from the best like any other, and the best
takes those it has along; samplers do not see them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import optuna

from otgen.errors import unknown
from otgen.problem import Value, Variant

if TYPE_CHECKING:
    from otgen.candidates import Refinements

optuna.logging.set_verbosity(optuna.logging.WARNING)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8)


SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": _tpe,
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Samplers by name: seed → Optuna sampler."""


class Study:
    """The search over `variants`, which all have the same axes: `ask` for one, `tell` its time.

    first  variants asked for before any other: the default, neighbours' winners, the model's favourites
    score  orders the neighbours of the best variant, the lowest first; where it is infinite only the sampler may go
    refinements  what may be tried on top of one of `variants`; None: nothing
    Raises UsageError for an unknown sampler.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        first: Sequence[Variant],
        sampler: str = "tpe",
        seed: int = 0,
        score: Callable[[Variant], float] = lambda variant: 0.0,
        refinements: Refinements | None = None,
    ) -> None:
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        self._variants = list(variants)
        self._first = list(first)
        self._score = score
        self._refinements = refinements
        self._refined: set[Variant] = set()
        self._best: tuple[float, Variant] | None = None
        self._polish = False
        self._index = {variant: number for number, variant in enumerate(self._variants)}
        self._axes: dict[str, list[Value]] = {
            axis: sorted({variant[axis] for variant in self._variants}, key=lambda value: (str(type(value)), value))
            for axis in (self._variants[0] if self._variants else ())
        }
        codes = [[self._axes[axis].index(variant[axis]) for axis in self._axes] for variant in self._variants]
        self._codes = np.array(codes, dtype=np.int32).reshape(len(self._variants), len(self._axes))
        self._longest = np.array([len(v) if isinstance(v[0], int) else 1 for v in self._axes.values()], dtype=np.int32)
        self._unseen = np.ones(len(self._variants), dtype=bool)
        self._distributions = {a: optuna.distributions.CategoricalDistribution(values) for a, values in self._axes.items()}
        self._study = optuna.create_study(sampler=SAMPLERS[sampler](seed))
        self._pending: dict[Variant, optuna.trial.Trial] = {}

    def ask(self, hints: Iterable[Variant] = ()) -> Variant | None:
        """A variant that was neither asked for nor told before; None when there is none left.

        hints  what did well elsewhere: tried as soon as the first variants have been
        """
        while self._first:
            variant = self._first.pop(0)
            if self._take(variant):
                return variant
        for variant in hints:
            if self._fresh(variant) and self._score(variant) < inf and self._take(variant):
                return variant
        if not self._unseen.any():
            return None
        self._polish = not self._polish
        neighbour = self._neighbour() if self._polish else None
        if neighbour is not None:
            self._take(neighbour)
            return neighbour
        trial = self._study.ask(self._distributions)
        variant = self._nearest(trial.params)
        self._take(variant)
        if trial.params == dict(variant):
            self._pending[variant] = trial
        else:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return variant

    def tell(self, variant: Variant, us: float | None) -> None:
        """The time of `variant` in microseconds, or None when it failed. A variant that was never asked for is learnt from too."""
        self._take(variant)
        if us is not None and self._plain(variant) in self._index and (self._best is None or us < self._best[0]):
            self._best = us, variant
        state = optuna.trial.TrialState.PRUNED if us is None else optuna.trial.TrialState.COMPLETE
        value = None if us is None else float(np.log(us))
        asked = self._pending.pop(variant, None)
        if asked is not None:
            self._study.tell(asked, value, state=state)
        elif all(variant.get(axis) in values for axis, values in self._axes.items()):
            self._study.add_trial(
                optuna.trial.create_trial(state=state, params=dict(variant), distributions=self._distributions, value=value)
            )

    @property
    def best(self) -> tuple[float, Variant] | None:
        """The shortest time told so far, in microseconds, and its variant."""
        return self._best

    def _plain(self, variant: Variant) -> Variant:
        return variant if variant in self._index or self._refinements is None else self._refinements.plain(variant)

    def _fresh(self, variant: Variant) -> bool:
        """Whether `variant` is legal, and neither asked for nor told before."""
        if variant in self._index:
            return bool(self._unseen[self._index[variant]])
        refined = self._refinements is not None and self._plain(variant) in self._index and self._refinements.allow(variant)
        return refined and variant not in self._refined

    def _take(self, variant: Variant) -> bool:
        fresh = self._fresh(variant)
        if variant in self._index:
            self._unseen[self._index[variant]] = False
        elif fresh:
            self._refined.add(variant)
        return fresh

    def _neighbour(self) -> Variant | None:
        """Of the unseen variants one step from the best, else two, the one of the lowest score."""
        if self._best is None:
            return None
        for steps in (1, 2):
            fresh = (variant for variant in self._near(self._best[1], steps) if self._fresh(variant))
            near = {variant: score for variant in fresh if (score := self._score(variant)) < inf}
            if near:
                return min(near, key=lambda variant: near[variant])
        return None

    def _near(self, best: Variant, steps: int) -> Iterator[Variant]:
        """What lies so many steps from `best` along listed axes, with its refinements; and one refinement away."""
        plain = self._plain(best)
        own = {axis: value for axis, value in best.items() if plain[axis] != value}
        for number in np.flatnonzero(self._distance(self._codes[self._index[plain]]) == steps):
            yield self._variants[number].with_(**own) if own else self._variants[number]
        if self._refinements is not None and steps == 1:
            yield from self._refinements.near(best)

    def _nearest(self, proposal: Mapping[str, Any]) -> Variant:
        wanted = np.array([values.index(proposal[axis]) for axis, values in self._axes.items()], dtype=np.int32)
        distance = self._distance(wanted)
        distance[~self._unseen] = np.iinfo(distance.dtype).max
        return self._variants[int(distance.argmin())]

    def _distance(self, codes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Steps from `codes` to every variant: one per value along an axis of numbers, one for another name."""
        steps: npt.NDArray[np.int32] = np.minimum(np.abs(self._codes - codes), self._longest).sum(axis=1, dtype=np.int32)
        return steps
