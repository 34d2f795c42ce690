"""flash-sinkhorn's own kernels in all their configurations, compiled for a GPU that need not be here, and counted as ours are.

Its launchers are called on CPU tensors that say they are on a GPU, with stand-ins for the kernels, which write down what they are
launched with. That is then compiled: what is counted is what would run, specialised as it would be. Nothing is copied from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from flash_sinkhorn import SamplesLoss
from flash_sinkhorn.kernels import sinkhorn_flashstyle_sqeuclid as kernels
from slots import Count, of_kernel
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.driver import driver

from otgen.compile import read_kernels
from otgen.gpus import gpu
from otgen.offline import Launch, OfflineDriver

POINTS = 4096
"""In each cloud: divisible by every tile, as theirs take no masks then."""

SHAPE_KEYS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


@dataclass(frozen=True)
class Step:
    """A step of its solvers: what is launched, how many vectors of potentials and weights that takes, and how many launches."""

    launcher: str
    vectors: int
    launches: int = 1

    @property
    def label(self) -> str:
        name = self.launcher.removeprefix("flashsinkhorn_")
        return name if self.launches == 1 else f"{self.launches} × {name}"


SYMMETRIC = Step("flashsinkhorn_symmetric_step", 4)
"""Of its symmetric solver below 30 000 points: one launch, two sweeps."""

SYMMETRIC_LARGE = Step("flashsinkhorn_lse", 1, launches=2)
"""From 30 000 points on: a launch for each side (``fused`` in its sinkhorn_flashstyle_symmetric)."""

HALF_STEP = Step("flashsinkhorn_lse_fused", 2)
"""Of its alternating solver."""


class Call(NamedTuple):
    """A launch that was written down."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Placed(torch.Tensor):
    """A CPU tensor that says it is on a GPU, with all that is computed from it."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def _placed(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape).as_subclass(_Placed)


class _Recorder:
    """Takes a kernel's place in their module."""

    def __init__(self, kernel: Any, log: list[Call]) -> None:
        self._kernel, self._log = kernel, log

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self._log.append(Call(self._kernel, args, kwargs))


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """What their module launches inside is written down instead."""
    log: list[Call] = []
    theirs = {name: value for name, value in vars(kernels).items() if isinstance(value, (Autotuner, Heuristics))}
    vars(kernels).update({name: _Recorder(kernel, log) for name, kernel in theirs.items()})
    try:
        yield log
    finally:
        vars(kernels).update(theirs)


def call(step: Step, d: int, *, tf32: bool, autotune: bool) -> Call:
    """What `step` launches: an autotuner, or the kernel in the configuration it takes otherwise."""
    vectors = [_placed(POINTS) for _ in range(step.vectors)]
    with recorded() as log:
        getattr(kernels, step.launcher)(_placed(POINTS, d), _placed(POINTS, d), *vectors, 0.1, allow_tf32=tf32, autotune=autotune)
    (found,) = log
    return found


def configurations(step: Step, d: int, *, tf32: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Those its autotuner tries, largest tiles first, and the one taken without it."""
    tried = [config.all_kwargs() for config in call(step, d, tf32=tf32, autotune=True).kernel.configs]
    tried.sort(key=lambda config: -config["BLOCK_M"] * config["BLOCK_N"])
    plain = call(step, d, tf32=tf32, autotune=False).kwargs
    return [_shape(config) for config in tried], _shape(plain)


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in SHAPE_KEYS}


def counts(step: Step, d: int, tf32: bool, configs: Sequence[Mapping[str, Any]], slug: str) -> list[Count]:
    """`step` in each configuration, compiled for the GPU called `slug`; those that exceed its shared memory are left out.

    Runs in a process whose TRITON_INTERPRET is unset.
    """
    found = compiled(call(step, d, tf32=tf32, autotune=True), d, configs, slug)
    return [
        replace(
            count,
            sweeps=step.launches * count.sweeps,
            units={unit: step.launches * number for unit, number in count.units.items()},
            spills=step.launches * count.spills,
        )
        for count in found
    ]


def compiled(launch: Call, d: int, configs: Sequence[Mapping[str, Any]], slug: str) -> list[Count]:
    """One launch of an autotuner, in each configuration."""
    target = gpu(slug)
    driver.set_active(OfflineDriver(target))
    plain = launch.kernel.fn
    builds = [plain.warmup(*launch.args, grid=(1,), **launch.kwargs, **config) for config in configs]
    fitting = [(config, build) for config, build in zip(configs, builds) if build.metadata.shared <= target.shared_per_block]
    read = read_kernels([Launch("", (1,), build) for _, build in fitting], target)
    return [of_kernel(kernel, config, d) for (config, _), kernel in zip(fitting, read)]


def debiased_sweeps(slug: str) -> float:
    """How often one more regularisation in the schedule of its debiased loss makes it visit all pairs.

    Its SamplesLoss is run with two regularisations and with three; the sweeps of a kernel are the pair loops found in it.
    """
    runs = [_launched_by_loss(length) for length in (2, 3)]
    kinds = {id(launch.kernel): launch for run in runs for launch in run}
    known = {
        kind: compiled(launch, 64, [_shape(launch.kernel.configs[0].all_kwargs())], slug)[0].sweeps
        for kind, launch in kinds.items()
    }
    fewer, more = (sum(known[id(launch.kernel)] for launch in run) for run in runs)
    return more - fewer


def _launched_by_loss(length: int) -> list[Call]:
    with recorded() as log:
        SamplesLoss(debias=True, eps_list=[1.0] * length)(_placed(128, 64), _placed(128, 64))
    return log
