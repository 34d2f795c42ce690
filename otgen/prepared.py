"""Launches of a rendered module without most of what Triton does anew each time: binding, specialising, looking up a binary.

Triton compiles a kernel for the types of its arguments, for whether addresses are multiples of 16, for whether integers are 1 or
multiples of 16, and for its options. A module's launch starts its kernels with what it was given and with memory that it allocates,
which is aligned. So where all given addresses are aligned, the types of the given tensors and the integers that a kernel is started
with say which of its binaries it is. Other launches take Triton's own way. Hooks that listen to launches are called as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import attrgetter, or_
from types import ModuleType
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from otgen.render import with_kernels

ALIGNMENT = 16
"""Bytes; Triton compiles for addresses that are multiples of it."""

MOST = 1024
"""Binaries that a kernel is remembered with, one for each list of sizes: ragged calls forget them all now and then."""

_dtype = attrgetter("dtype")


def prepared(module: ModuleType) -> Callable[..., None]:
    """What to call in place of a rendered module's ``launch``; that itself where kernels are interpreted."""
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return _Launch(module, kernels) if kernels else module.launch


class _Launch:
    """A module's ``launch``, a copy of it for each device and for each list of types of tensors."""

    def __init__(self, module: ModuleType, kernels: dict[str, JITFunction[Any]]) -> None:
        self._module, self._kernels = module, kernels
        self._copies: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, **arguments: Any) -> None:
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        launch = self._module.launch
        if not reduce(or_, map(Tensor.data_ptr, tensors), 0) % ALIGNMENT:
            key = driver.active.get_current_device(), *arguments, *map(_dtype, tensors)
            launch = self._copies.get(key) or self._copies.setdefault(key, self._copy())
        launch(**arguments)

    def _copy(self) -> Callable[..., None]:
        return with_kernels(self._module, {name: _Remembered(kernel) for name, kernel in self._kernels.items()})


class _Remembered:
    """A kernel and its binaries, by the integers and options that it was started with."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self._kernel = kernel
        self._binaries: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._start, grid)

    def _start(self, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
        key = *[value for value in given if type(value) is int], *options.values()
        known = self._binaries.get(key)
        if known is None:
            self._remember(key, self._kernel[grid](*given, **options), options)
        else:
            binary, constants = known
            binary[(*grid, 1, 1)](*given, *constants)

    def _remember(self, key: tuple[Any, ...], binary: Any, options: dict[str, Any]) -> None:
        """Keeps what Triton has just started; a binary is started with all arguments in their order, constants among them."""
        if isinstance(binary, CompiledKernel):
            if len(self._binaries) >= MOST:
                self._binaries.clear()
            self._binaries[key] = binary, tuple(options[name] for name in self._kernel.arg_names if name in options)
