"""Fair timing of a rendered kernel on a real GPU: warm, cold L2, interleaved with the family's default, medians.

Every repetition first overwrites a buffer larger than L2, outside the timed interval, then times one `launch()` between two events.
Candidate and default take turns, so that a drift of the clocks moves both. Clocks are recorded, never set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from otgen.families import family
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.verify import Accuracy, call_arguments, small, verify

PROTOCOL = "events, cold L2, interleaved with the default"
WARM_UP = 3
BUDGET_MS = 60.0
FEWEST, MOST = 10, 100
"""Repetitions per candidate: as many as fit the budget, between these."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Samples in microseconds of a candidate and of the default variant timed in turn with it, and the GPU's state after them."""

    samples_us: tuple[float, ...]
    default_us: tuple[float, ...]
    sm_clock_mhz: float | None
    temperature_c: float | None
    power_w: float | None


def quantile(samples: Sequence[float], q: float) -> float:
    """The sample at rank q of the sorted ones, linearly interpolated; q in [0, 1]."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(problem: Problem, variant: Variant) -> tuple[list[Accuracy], Timing | None]:
    """Accuracy of `variant` on the awkward small and on the real problem, and its timing if both are inside their budgets.

    Runs on the current CUDA device, in a worker process that may be lost to an illegal access.
    """
    launch = load(problem, variant).launch
    checks = verify(small(problem, variant), variant, launch, "cuda") + verify(problem, variant, launch, "cuda")
    if not all(check.ok for check in checks):
        return checks, None
    default = load(problem, family(problem.family).default(problem)).launch
    arguments = call_arguments(problem, family(problem.family).inputs(problem, 0), "cuda")
    samples, defaults = interleave([lambda: launch(**arguments), lambda: default(**arguments)], cuda_timer())
    return checks, Timing(tuple(samples), tuple(defaults), *_state())


def interleave(calls: Sequence[Callable[[], Any]], time_us: Callable[[Callable[[], Any]], float]) -> list[list[float]]:
    """Samples of each call, taken in turn; the number of rounds fits the slowest call's own time into the budget."""
    slowest = max(max(time_us(call) for _ in range(WARM_UP)) for call in calls)
    rounds = int(min(MOST, max(FEWEST, BUDGET_MS * 1000 / max(slowest, 1.0))))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for offset in range(len(calls)):
            index = (turn + offset) % len(calls)
            samples[index].append(time_us(calls[index]))
    return samples


def cuda_timer() -> Callable[[Callable[[], Any]], float]:
    """A function that runs a call with a cold L2 on the current CUDA device and returns microseconds between two events."""
    import torch

    l2_bytes: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device="cuda")

    def time_us(call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000.0

    return time_us


def _state() -> tuple[float | None, float | None, float | None]:
    """SM clock (MHz), temperature (°C) and power (W) of the current device as NVML reports them; None where it does not."""
    import torch

    readings: list[float | None] = []
    for read, unit in ((torch.cuda.clock_rate, 1.0), (torch.cuda.temperature, 1.0), (torch.cuda.power_draw, 1e-3)):
        try:
            readings.append(float(read()) * unit)
        except (RuntimeError, ModuleNotFoundError):
            readings.append(None)
    return readings[0], readings[1], readings[2]
