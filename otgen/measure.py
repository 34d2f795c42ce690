"""Fair timing of a rendered kernel on a real GPU: warm, cold L2, interleaved with the family's default, medians.

Every repetition first overwrites a buffer far larger than L2, outside the timed interval, then times one `launch()` between two
events. The overwriting also keeps the GPU busy while the host queues the launch, so that a slow host is not timed. Candidate and
default take turns, so that a drift of the clocks moves both. Clocks are recorded, never set.

Points come in turn from a small test input, without the one that makes a shifted sweep redo its block: what is timed is the usual
case. The dense float64 reference of the real size is never formed; outputs are compared with it at a sample of points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from otgen.families import batches, family, lists
from otgen.problem import Problem, Spec, Variant
from otgen.render import load
from otgen.verify import Accuracy, call_arguments, small, verify

if TYPE_CHECKING:
    import torch

PROTOCOL = "events, cold L2, interleaved with the default"
WARM_UP = 2
BUDGET_MS = 60.0
FEWEST, MOST = 5, 100
"""Repetitions per candidate: as many as fit the budget, between these."""

FLUSH_BYTES = 1 << 30
"""Overwritten before each repetition: several times any L2, and a tenth of a millisecond's cover at 8 TB/s."""

ROWS, COLUMNS = 1021, 1024
"""Points of the small input that a problem's points are taken from. They differ: a tensor's length tells its side."""

SECOND = ("y", "v", "b")
"""The tensors that are columns in a measure's transport to itself, where lengths do not tell."""

AGAIN = "_again"
"""How names of tensors end that are the columns of their own side: all of them count for each of a sample of its rows."""

SAMPLE = 64
"""Points of each side at which outputs of the real size are compared with float64."""


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

    Runs on the current CUDA device, in a worker process that is replaced when this raises (`otgen.pool.Role.fresh_after_error`).
    """
    launch = load(problem, variant).launch
    checks = verify(small(problem, variant), variant, launch, "cuda")
    points = Points.of(problem)
    arguments = call_arguments(problem, points.given(), "cuda")
    launch(**arguments)
    checks += points.compare(variant, arguments)
    if not all(check.ok for check in checks):
        return checks, None
    default = load(problem, family(problem.family).default(problem)).launch
    samples, defaults = interleave([lambda: launch(**arguments), lambda: default(**arguments)], cuda_timer())
    return checks, Timing(tuple(samples), tuple(defaults), *_state())


@dataclass(frozen=True, slots=True)
class Points:
    """Input of any size at the price of a small one: index vectors (n,), (m,) into the points of a ROWS × COLUMNS test input.

    The first row is left out: where a family's test input makes a shifted sweep redo a block, it does so there. In a measure's
    transport to itself the columns, those of the tensors in SECOND, are its rows. The problems of a batch are all the same; its
    first and its last are compared.
    """

    problem: Problem
    base: Mapping[str, Any]
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, problem: Problem, seed: int = 0) -> Points:
        own = problem.own
        base = family(problem.family).inputs(replace(batches.one_of(problem), n=ROWS, m=ROWS if own else COLUMNS), seed)
        rows, columns = _points(problem)
        return cls(problem, base, rows, rows if own else columns)

    def given(self) -> dict[str, Any]:
        """What `Family.inputs` returns, at the problem's sizes."""
        own = self.problem.own
        rows, columns = _points(self.problem)

        def picked(name: str, value: Any) -> Any:
            if len(value) not in (ROWS, COLUMNS):
                return value
            if name.endswith(AGAIN):
                return value[columns if len(value) == COLUMNS else rows]
            return value[self.columns if len(value) == COLUMNS or (own and name in SECOND) else self.rows]

        given = {name: picked(name, value) if hasattr(value, "shape") else value for name, value in self.base.items()}
        if self.problem.listed > 1:
            return given | lists.bands(self.problem)
        return given if self.problem.batch == 1 else batches.repeated(self.problem, given)

    def compare(self, variant: Variant, call: Mapping[str, Any]) -> list[Accuracy]:
        """The outputs in `call` of a launch on `given()` against float64, at evenly spread points of the side they belong to.

        A row's output depends on no other row, and a column's on no other column, unless the family says so (`coupled`). An element
        that is not finite, be it in the sample or not, is an infinite error: outputs are NaN before the launch.
        """
        import torch

        kind = family(self.problem.family)
        if self.problem.batch > 1:
            one = replace(self, problem=batches.one_of(self.problem))
            ends = ({name: value[i] if hasattr(value, "shape") else value for name, value in call.items()} for i in (0, -1))
            return [check for end in ends for check in one.compare(variant, end)]
        if kind.coupled:
            return self._compare_all(variant, call)
        probe = kind.arguments(replace(self.problem, n=ROWS, m=ROWS if self.problem.own else COLUMNS)).items()
        sides = {name: spec.shape[0] for name, spec in probe if isinstance(spec, Spec) and spec.role == "out"}
        results = []
        for side in dict.fromkeys(sides.values()):
            index = self.rows if side == ROWS else self.columns
            chosen = torch.linspace(0, len(index) - 1, min(SAMPLE, len(index))).round().long()
            part = replace(self, rows=index[chosen]) if side == ROWS else replace(self, columns=index[chosen])
            problem, given = replace(self.problem, n=len(part.rows), m=len(part.columns)), {**part.given(), "places": chosen}
            expected = {name: value for name, value in kind.reference(problem, given).items() if sides[name] == side}
            allowed = kind.budget(problem, variant, given, expected)
            for name, value in expected.items():
                error = float((call[name][chosen.to(call[name].device)].cpu().double() - value).abs().max())
                results.append(Accuracy(name, error if bool(call[name].isfinite().all()) else torch.inf, allowed[name]))
        return results

    def _compare_all(self, variant: Variant, call: Mapping[str, Any]) -> list[Accuracy]:
        """`compare` at every point, where all depend on all: copies of a point are one of as many times its weight."""
        import torch

        kind = family(self.problem.family)
        rows, of_rows, row_copies = torch.unique(self.rows, return_inverse=True, return_counts=True)
        columns, of_columns, column_copies = torch.unique(self.columns, return_inverse=True, return_counts=True)
        part = replace(self, rows=rows, columns=columns)
        given = part.given()
        given |= {"a": given["a"] * row_copies, "b": given["b"] * column_copies}
        problem = replace(self.problem, n=len(rows), m=len(columns))
        expected = kind.reference(problem, given)
        allowed = kind.budget(problem, variant, given, expected)
        results = []
        for name, value in expected.items():
            copied = value[of_columns] if name in batches.SECOND else value if name in batches.OF_NO_POINT else value[of_rows]
            error = float((call[name].cpu().double() - copied).abs().max())
            results.append(Accuracy(name, error if bool(call[name].isfinite().all()) else torch.inf, allowed[name]))
        return results


def _points(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Which points of the small input the problem's rows and columns are."""
    import torch

    return 1 + torch.arange(problem.n) % (ROWS - 1), torch.arange(problem.m) % COLUMNS


def interleave(calls: Sequence[Callable[[], Any]], time_us: Callable[[Callable[[], Any]], float]) -> list[list[float]]:
    """Samples of each call, taken in turn; the number of rounds fits the slowest call's own time into the budget.

    A call's first run, which may compile, is not looked at.
    """
    for call in calls:
        time_us(call)
    slowest = max(min(time_us(call) for _ in range(WARM_UP)) for call in calls)
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

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def time_us(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000.0

    return time_us


def driver_version() -> str:
    """The NVIDIA driver's version as NVML reports it; empty where it does not."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # as below: no sensor is worth a lost run
        return ""


def _state() -> tuple[float | None, float | None, float | None]:
    """SM clock (MHz), temperature (°C) and power (W) of the current device as NVML reports them; None where it does not."""
    import torch

    readings: list[float | None] = []
    for read, unit in ((torch.cuda.clock_rate, 1.0), (torch.cuda.temperature, 1.0), (torch.cuda.power_draw, 1e-3)):
        try:
            readings.append(float(read()) * unit)
        except Exception:  # NVML's errors share no base but Exception, and no sensor is worth a lost timing
            readings.append(None)
    return readings[0], readings[1], readings[2]
