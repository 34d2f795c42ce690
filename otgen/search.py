"""Which variant to try next: an Optuna study asked and told over enumerated legal variants. The only importer of optuna.

A sampler proposes a point of the product of all axes, most of it illegal or seen before; the study takes the nearest legal unseen
variant instead, so no trial is wasted. It starts from the variants it is given. Failures are told as pruned, which samplers avoid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna

from otgen.errors import unknown
from otgen.problem import Value, Variant

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

    first  variants asked for before the sampler is: the default, neighbours' winners, the model's favourites
    Raises UsageError for an unknown sampler.
    """

    def __init__(self, variants: Sequence[Variant], first: Sequence[Variant], sampler: str = "tpe", seed: int = 0) -> None:
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        self._variants = list(variants)
        self._first = list(first)
        self._index = {variant: number for number, variant in enumerate(self._variants)}
        self._axes: dict[str, list[Value]] = {
            axis: sorted({variant[axis] for variant in self._variants}, key=lambda value: (str(type(value)), value))
            for axis in (self._variants[0] if self._variants else ())
        }
        codes = [[self._axes[axis].index(variant[axis]) for axis in self._axes] for variant in self._variants]
        self._codes = np.array(codes, dtype=np.int32).reshape(len(self._variants), len(self._axes))
        self._unseen = np.ones(len(self._variants), dtype=bool)
        self._distributions = {a: optuna.distributions.CategoricalDistribution(values) for a, values in self._axes.items()}
        self._study = optuna.create_study(sampler=SAMPLERS[sampler](seed))
        self._pending: dict[Variant, optuna.trial.Trial] = {}

    def ask(self) -> Variant | None:
        """A variant that was neither asked for nor told before; None when there is none left."""
        while self._first:
            variant = self._first.pop(0)
            if self._take(variant):
                return variant
        if not self._unseen.any():
            return None
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
        state = optuna.trial.TrialState.PRUNED if us is None else optuna.trial.TrialState.COMPLETE
        value = None if us is None else float(np.log(us))
        asked = self._pending.pop(variant, None)
        if asked is not None:
            self._study.tell(asked, value, state=state)
        elif all(variant.get(axis) in values for axis, values in self._axes.items()):
            self._study.add_trial(
                optuna.trial.create_trial(state=state, params=dict(variant), distributions=self._distributions, value=value)
            )

    def _take(self, variant: Variant) -> bool:
        number = self._index.get(variant)
        if number is None or not self._unseen[number]:
            return False
        self._unseen[number] = False
        return True

    def _nearest(self, proposal: Mapping[str, Any]) -> Variant:
        wanted = np.array([values.index(proposal[axis]) for axis, values in self._axes.items()], dtype=np.int32)
        distance = np.abs(self._codes - wanted).sum(axis=1)
        distance[~self._unseen] = np.iinfo(distance.dtype).max
        return self._variants[int(distance.argmin())]
