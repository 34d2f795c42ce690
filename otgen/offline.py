"""A module's launches, compiled instead of run: for any GPU of the table, with no GPU and no driver.

`launch()` itself is called on stand-ins for tensors, with every kernel's launch turned into a compilation: what is compiled is
exactly what would run, specialised as it would be, and the launches and grids are known too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from otgen.families import family
from otgen.gpus import Gpu, triton_target
from otgen.problem import BYTES, Problem, Spec
from otgen.render import with_kernels

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int32": "int32"}


class Launch(NamedTuple):
    """One launch as Triton compiled it, its machine code unread."""

    name: str
    grid: tuple[int, ...]
    compiled: Any


def launches_of(module: ModuleType, problem: Problem, target: Gpu) -> list[Launch]:
    """The launches that ``module.launch()`` makes for `problem`, in order, compiled for `target`."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    log: list[Launch] = []
    recorders = {name: _Recorder(value, log) for name, value in vars(module).items() if isinstance(value, JITFunction)}
    stubs = {name: _Stub(a) if isinstance(a, Spec) else a for name, a in family(problem.family).arguments(problem).items()}
    driver.set_active(OfflineDriver(target))
    with_kernels(module, recorders)(**stubs)
    return log


class _Stub:
    """Stands in for a contiguous tensor at an aligned address: what `launch()` and Triton's specialisation look at."""

    is_cuda = True

    def __init__(self, spec: Spec) -> None:
        self.shape = spec.shape
        self.dtype = DTYPE_NAMES[spec.dtype]
        self.bytes = BYTES[spec.dtype]

    def new_empty(self, shape: tuple[int, ...], dtype: Any = None) -> _Stub:
        """A stand-in of that shape; of this one's type, or of the given torch type."""
        named = self.dtype if dtype is None else str(dtype).removeprefix("torch.")
        return _Stub(Spec(shape, next(own for own, name in DTYPE_NAMES.items() if name == named)))

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.bytes

    def zero_(self) -> _Stub:
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
        """Nothing is computed: `launch()` clears sums at once, and no result of a torch function is looked at."""


class OfflineDriver:
    """As much of a Triton driver as compiling asks for. The device number keeps targets apart in Triton's caches."""

    def __init__(self, target: Gpu) -> None:
        self._target = triton_target(target)
        self._device = int(re.sub(r"\D", "", str(target.arch)))

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


class IdleDriver(OfflineDriver):
    """One that starts kernels too: nothing happens. Its `utils` and `launcher_cls` are what Triton asks of a driver."""

    def __init__(self, target: Gpu) -> None:
        super().__init__(target)
        self.utils = _Utilities(target.shared_per_block)

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *given: None


class _Utilities:
    def __init__(self, shared: int) -> None:
        self._shared = shared

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """module, function, registers, spilled bytes, threads of a block at most"""
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared}


class _Recorder:
    """Takes a kernel's place in its module: ``kernel[grid](…)`` compiles and is written down."""

    def __init__(self, kernel: Any, log: list[Launch]) -> None:
        self._kernel, self._log = kernel, log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            self._log.append(Launch(self._kernel.__name__, tuple(grid), self._kernel.warmup(*args, grid=grid, **kwargs)))

        return compile_it
