"""Launches and waits of a solve on a GPU, counted without one, and the Python time of its iterations.

    python benchmarks/launches.py

*Counted*: every launch takes the variant that dispatch chooses for an H100 and is computed by streamed PyTorch in its place; a
variant counts as many kernels as its launch starts. A wait is a number that the host reads off a tensor (`item`, `bool`, `nonzero`,
a copy to the CPU). Exact, whatever the machine.

*Timed*: steps, and the schedule of SamplesLoss, through the real launches, compiled for an H100, over a driver that does nothing:
what Python and PyTorch do between two kernels, in this machine's processor time. The fastest of several repeats.

Writes benchmarks/results/launches.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import otgen
from otgen import dispatch, families, iterations, ops
from otgen.problem import Problem
from otgen.solvers import sinkhorn

RESULT = Path(__file__).parent / "results" / "launches.json"
GPU = "h100"
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
REPEATS = 7
CALLS = 200
SHAPES = (1000,), (64, 128), (6000,)
"""Points of both clouds, or problems and points of a batch: of loops, of a batch of loops, and too large for them."""


@dataclass(frozen=True)
class Count:
    """Of one call: kernels started, loops among them, waits of the host, and iterations of the problem between the clouds."""

    what: str
    kernels: int
    loops: int
    waits: int
    iterations: int


class Waits(TorchDispatchMode):
    """Counts the operators that wait for a GPU, outside of what stands for kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inside = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and func.overloadpacket.__name__ in WAITS:
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def as_if_on_a_gpu(launched: Callable[[str, Any], Callable[..., None]] | None) -> Iterator[None]:
    """CPU tensors take the kernels of GPU, and errors are looked at as often as there.

    launched  (family, (choice, problem)) → what runs instead of a kernel; None: the kernel
    """
    kept = ops.streamed, ops.NOMINAL_GPU, sinkhorn.interval, dispatch.kernel
    ops.streamed, ops.NOMINAL_GPU, sinkhorn.interval = (lambda x: False), GPU, (lambda x: sinkhorn.GPU_INTERVAL)
    if launched is not None:

        def kernel(family: str, gpu: str, *question: Any) -> dispatch.Kernel:
            choice = dispatch.choose(family, gpu, *question)
            return dispatch.Kernel(choice, launched(family, (choice, Problem(family, *question[:-1]))))

        dispatch.kernel = kernel
    try:
        yield
    finally:
        ops.streamed, ops.NOMINAL_GPU, sinkhorn.interval, dispatch.kernel = kept


def counted(what: str, call: Callable[[], Any], iterations_of: Callable[[Any], int]) -> Count:
    """One call, its kernels computed by streamed PyTorch."""
    waits, kernels = Waits(), {"all": 0, "loop": 0}
    streamed = ops.streamed

    def launched(family: str, chosen: Any) -> Callable[..., None]:
        choice, problem = chosen
        number = len(families.family(family).work(problem, choice.variant).launches)

        def run(**arguments: Any) -> None:
            kernels["all"] += number
            kernels["loop"] += number * (family == "loop")
            waits.inside += 1
            ops.streamed, here = streamed, ops.streamed
            try:
                compute(family, problem, arguments)
            finally:
                ops.streamed = here
                waits.inside -= 1

        return run

    cpu = torch.Tensor.cpu
    with as_if_on_a_gpu(launched), waits:
        torch.Tensor.cpu = lambda self: (setattr(waits, "count", waits.count + (not waits.inside)), cpu(self))[1]
        try:
            found = call()
        finally:
            torch.Tensor.cpu = cpu
    return Count(what, kernels["all"], kernels["loop"], waits.count, iterations_of(found))


def compute(family: str, problem: Problem, arguments: dict[str, Any]) -> None:
    """What a launch of `family` does, by streamed PyTorch."""
    if family != "loop":
        batched = problem.batch > 1
        flags = tuple(flag for flag in problem.flags if flag[0] != "batch")
        every, matrix = (ops.STREAMED_BATCH, ops.STREAMED_BATCH_MATRIX) if batched else (ops.STREAMED, ops.STREAMED_MATRIX)
        every.get(flags, matrix).launch(**arguments)
        return
    given = dict(arguments)
    own = "v" not in given
    if own:
        given |= {"v": given["u"], "b": given["a"], "y_sq": given["x_sq"]}
    extents = (given["rows"], given["columns"]) if "rows" in given else None
    schedule = str(dict(problem.flags)["schedule"])
    tensors = [given[name] for name in ("x", "y", "u", "v", "a", "b", "x_sq", "y_sq")]
    tol = given["tol"]
    found = iterations.sinkhorn_iterations(
        *tensors, course=given["course"], schedule=schedule, step=given["step"], tol=tol, extents=extents
    )
    for name, value in zip(("u_out", "v_out", "rho", "gamma", "missed"), found):
        if name in given:
            given[name].copy_(value)


def clouds(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, 3, generator=generator), torch.rand(*shape, 3, generator=generator)


def counts() -> Iterator[Count]:
    """The table."""
    for shape in SHAPES:
        yield counted(f"SamplesLoss, {text(shape)}", partial(loss_of, shape, 0.05, 0.5), lambda found: len(schedule_of(0.05, 0.5)))
    for method in ("alternating", "symmetric", "anderson"):
        for shape in SHAPES[:2]:
            yield counted(f"method={method!r}, {text(shape)}", partial(solved, shape, method), most_iterations)


def loss_of(shape: tuple[int, ...], blur: float, scaling: float) -> torch.Tensor:
    """A debiased SamplesLoss between two clouds of the unit cube."""
    found: torch.Tensor = otgen.SamplesLoss(blur=blur, scaling=scaling, diameter=3**0.5)(*clouds(*shape))
    return found


def solved(shape: tuple[int, ...], method: str) -> Any:
    solve: Any = otgen.solve_sample if len(shape) == 1 else otgen.solve_sample_batch
    return solve(*clouds(*shape), reg=0.02, method=method, tol=1e-3)


def most_iterations(found: Any) -> int:
    return int(torch.as_tensor(found.n_iters).max())


def schedule_of(blur: float, scaling: float) -> tuple[float, ...]:
    from otgen.solvers.schedule import geometric

    return geometric(3**0.5, blur, scaling)


def text(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} points" if len(shape) == 1 else f"{shape[0]} problems of {shape[1]} points"


def timed() -> dict[str, dict[str, float]]:
    """Microseconds of Python for steps, and for iterations of a debiased SamplesLoss; in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--timed"]
    found: dict[str, dict[str, float]] = json.loads(
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    )
    return found


def time_here() -> dict[str, dict[str, float]]:
    from triton.runtime.driver import driver

    from otgen.gpus import gpu
    from otgen.offline import IdleDriver

    driver.set_active(IdleDriver(gpu(GPU)))
    torch.Tensor.is_cuda = property(lambda self: True)  # a loop of one program each would be no GPU's
    torch.cuda.current_device = lambda: None
    torch.set_num_threads(1)
    with as_if_on_a_gpu(None):
        steps = {name: min(_repeated(step) for _ in range(REPEATS)) for name, step in single_steps().items()}
        losses = {}
        for shape in SHAPES:
            call = partial(loss_of, shape, 0.001, 0.9)
            call()
            losses[text(shape)] = min(_seconds(call) for _ in range(REPEATS)) / len(schedule_of(0.001, 0.9))
    return {
        "a step": {name: 1e6 * seconds for name, seconds in steps.items()},
        "an iteration of SamplesLoss": {name: 1e6 * seconds for name, seconds in losses.items()},
    }


def single_steps() -> dict[str, Callable[[], Any]]:
    """Steps of SHAPES' largest clouds, each a launch of `otgen.ops`."""
    x, y = clouds(*SHAPES[-1])
    u, v, a, b, x_sq, y_sq = (torch.ones(len(x)) for _ in range(6))
    return {
        "half": partial(ops.sinkhorn_half_step, x, y, u, v, b, x_sq, scale=1.0),
        "symmetric": partial(ops.sinkhorn_symmetric_step, x, y, u, v, a, b, x_sq, y_sq, scale=1.0),
        "own": partial(ops.sinkhorn_own_step, x, x, u, a, x_sq, scale=1.0),
        "debiased": partial(ops.sinkhorn_debiased_step, x, y, u, v, u, v, a, b, x_sq, y_sq, scale=1.0),
        "P·V": partial(ops.apply_plan, x, y, u, v, a, b, y, scale=1.0),
    }


def _repeated(call: Callable[[], Any]) -> float:
    """Seconds of one of many calls."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    call()
    return _seconds(calls) / CALLS


def _seconds(call: Callable[[], Any]) -> float:
    """Of this thread on a processor: what else the machine does meanwhile does not count."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    if parser.parse_args().timed:
        print(json.dumps(time_here()))
        return
    report = {"gpu": GPU, "counted": [asdict(count) for count in counts()], "python_us": timed()}
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{'':44}{'iterations':>11}{'kernels':>9}{'loops':>7}{'waits':>7}")
    for row in report["counted"]:
        print(f"{row['what']:44}{row['iterations']:11}{row['kernels']:9}{row['loops']:7}{row['waits']:7}")
    for what, times in report["python_us"].items():
        for name, microseconds in times.items():
            print(f"{what}, {name}: {microseconds:.1f} µs of Python")


if __name__ == "__main__":
    main()
