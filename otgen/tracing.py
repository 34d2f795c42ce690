"""Whether a program is being traced or transformed rather than run; what a launch is then, and what a module was told."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch

P = ParamSpec("P")
T = TypeVar("T")

REFUSED = "refused: "


def is_traced() -> bool:
    """Whether torch.compile or torch.export makes a graph of what runs, or a transform of torch.func is at work."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def opaque(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, but in a graph the operator of its name in `otgen.library`."""

    @wraps(function)
    def launched(*tensors: P.args, **options: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*tensors, **options)
        from otgen import library

        return cast(T, library.traced(function.__name__, *tensors, **cast(Any, options)))

    return launched


class Options(torch.nn.Module):
    """A module with the arguments of SamplesLoss as attributes, which keeps them in a form that graphs can hold.

    _frozen  (those that are no tensors, in JSON, or REFUSED and why they have none; what eps_list held)
    """

    _frozen: tuple[str, tuple[float, ...] | None]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "_frozen" in self.__dict__ and name in _names():
            self._freeze()

    def _freeze(self) -> None:
        self._frozen = frozen({name: getattr(self, name) for name in _names()})


@cache
def _names() -> tuple[str, ...]:
    """The arguments of SamplesLoss that are no tensors."""
    from otgen.losses import SamplesLoss

    return tuple(name for name in inspect.signature(SamplesLoss).parameters if name != "label_cost_matrix")


def frozen(options: Mapping[str, Any]) -> tuple[str, tuple[float, ...] | None]:
    """(the options in JSON, or why they have none after REFUSED; what eps_list holds)."""
    eps_list = options.get("eps_list")
    try:
        return json.dumps(options, default=_number), None if eps_list is None else tuple(eps_list)
    except TypeError:
        name = next(name for name, value in options.items() if not _plain(value))
    came, cure = type(options[name]).__name__, "[float(eps) for eps in eps_list]" if name == "eps_list" else f"float({name})"
    return f"{REFUSED}expected plain Python values in a traced SamplesLoss; got {came} for {name}; type {cure}", None


def _plain(value: Any) -> bool:
    try:
        return bool(json.dumps(value, default=_number))
    except TypeError:
        return False


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError
