"""otgen beside flash-sinkhorn, GeomLoss and dense PyTorch: time and accuracy of equal numbers of equal steps.

    python benchmarks/peers.py [--sizes 1024 4096 …] [--dims 3 64 512] [--budget SECONDS] [--out DIR]
    python benchmarks/peers.py --device cpu --sizes 256 --dims 3

Every contender (`contenders.py`) takes the same steps on the same clouds. Each runs once to compile, autotune and warm up
(`first_s`), once more to be sized up, then all take turns, in an order that rotates. A time is the median of whole solves divided
by their steps, between two CUDA events: host work and launches are in it, no CUDA graphs are used, and caches are as the solve
before left them. Up to EXACT points the potentials are compared with the same steps in float64 dense PyTorch, up to the constant
that potentials are free to carry, in units of eps; and the L1 error of their marginals is set beside the reference's own.

Writes peers.json after every problem, and peers.png at the end where matplotlib is installed. A solve slower than SLOW_S is timed
once. `--prepare` compiles what flash-sinkhorn's autotuner will try, in parallel, into Triton's cache, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, SCHEDULES, Contender, Task, Unfit, dense, flash

from otgen.store import TuningWarning

SIZES = (1024, 4096, 16384, 65536)
DIMS = (64, 3, 512)
"""In order of importance: what the budget does not reach comes last."""

ITERATIONS = 10
EXACT = 4096
SLOW_S, LONGEST_S = 2.0, 15.0
"""A solve above the first is timed once; one expected above the second, from a smaller size, is left out."""

ROUNDS_S = 1.5
FEWEST, MOST = 3, 25
"""Seconds of rounds per problem, and how many rounds there are at least and at most."""

Row = dict[str, Any]
Potentials = tuple[torch.Tensor, torch.Tensor]


def failure(error: Exception) -> str:
    """A row's status: the kind of error and its first line."""
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds from the start to the end of the call's work on the device."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def turns(runs: dict[str, Callable[[], Any]], once: float, device: str) -> dict[str, list[float]]:
    """Seconds of each of `runs`, which take turns in an order that rotates; all of them together need about `once` seconds."""
    names, samples = list(runs), {name: [] for name in runs}
    for turn in range(int(min(MOST, max(FEWEST, ROUNDS_S / max(once, 1e-9))))):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            samples[name].append(timed(runs[name], device))
    return samples


def marginal_error(task: Task, f: torch.Tensor, g: torch.Tensor) -> float:
    """Σ|P·1 − a| + Σ|Pᵀ·1 − b| of the plan of (f, g), dense in float64."""
    double = task.double()
    a, b = double.a, double.b
    plan = ((f.double()[:, None] + g.double() - torch.cdist(double.x, double.y).square()) / task.eps).exp_() * a[:, None] * b
    return float((plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum())


def potential_error(task: Task, found: Potentials, exact: Potentials) -> float:
    """Largest difference of the potentials, in units of eps, when f and g may trade a constant."""
    df, dg = (one.double() - other for one, other in zip(found, exact))
    shift = df.mean()
    return float(max((df - shift).abs().max(), (dg + shift).abs().max())) / task.eps


class Comparison:
    """The rows so far, and how long each contender took at the sizes before."""

    def __init__(self, device: str, deadline: float) -> None:
        self.device, self.deadline = device, deadline
        self.rows: list[Row] = []
        self._known: dict[tuple[str, str, int], tuple[int, float]] = {}

    def add(self, n: int, d: int, schedule: str, iterations: int) -> None:
        """A row for every contender at one problem, with times, or with the reason why there are none."""
        task = Task.uniform(n, d, schedule, iterations, self.device)
        exact = dense(task.double()).run() if n <= EXACT else None
        rows: dict[str, Row] = {}
        ready: dict[str, Contender] = {}
        for name, make in CONTENDERS[self.device].items():
            rows[name] = {"schedule": schedule, "n": n, "d": d, "contender": name, "steps": task.steps, "status": "ok"}
            try:
                ready[name] = self._warm(rows[name], make, task, exact)
            except Unfit as reason:
                rows[name]["status"] = f"left out: {reason}"
            except Exception as error:  # a contender's failure is a result
                rows[name]["status"] = failure(error)
        quick = {name: contender.run for name, contender in ready.items() if rows[name]["warm_s"] <= SLOW_S}
        samples = turns(quick, sum(rows[name]["warm_s"] for name in quick), self.device)
        for name in ready:
            seconds = samples.get(name) or [rows[name]["warm_s"]]
            rows[name] |= {"ms_per_step": 1e3 * statistics.median(seconds) / task.steps, "solves_s": seconds}
        self.rows += rows.values()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _warm(self, row: Row, make: Callable[[Task], Contender], task: Task, exact: Potentials | None) -> Contender:
        n, key = row["n"], (row["contender"], row["schedule"], row["d"])
        if key in self._known:
            before, took = self._known[key]
            expected = took * (n / before) ** 2
            if expected > LONGEST_S:
                raise Unfit(f"a solve would take {expected:.0f} s, to judge by n = {before}")
        if time.monotonic() > self.deadline:
            raise Unfit("the time was up")
        contender = make(task)
        started = time.perf_counter()
        timed(contender.run, self.device)
        row["first_s"] = time.perf_counter() - started
        row["warm_s"] = timed(contender.run, self.device)
        self._known[key] = n, row["warm_s"]
        row |= {"precision": contender.precision, "source": contender.source}
        if exact is not None:
            found = contender.run()
            row["potential_error_eps"] = potential_error(task, found, exact)
            row |= {"marginal_error": marginal_error(task, *found), "marginal_error_float64": marginal_error(task, *exact)}
        return contender


def environment(device: str, iterations: int) -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = {name: installed(name) for name in ("otgen", "torch", "triton", "flash-sinkhorn", "geomloss", "pykeops")}
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, "iterations": iterations, "protocol": (__doc__ or "").split("\n\n")[2], **packages}


def table(rows: Sequence[Row]) -> str:
    """Milliseconds per step, a line per problem and a column per contender."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [f"{'ms per step':26}" + "".join(f"{name:>20}" for name in names)]
    for schedule, d, n in dict.fromkeys((row["schedule"], row["d"], row["n"]) for row in rows):
        found = {row["contender"]: row for row in rows if (row["schedule"], row["d"], row["n"]) == (schedule, d, n)}
        cells = (
            f"{found[name]['ms_per_step']:.4f}" if "ms_per_step" in found[name] else found[name]["status"].split(":")[0]
            for name in names
        )
        lines.append(f"{schedule:11} d={d:<4} n={n:<6} " + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Draws milliseconds per step over n, a panel per schedule and d; False when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dims = sorted({row["d"] for row in rows})
    figure, axes = pyplot.subplots(len(SCHEDULES), len(dims), figsize=(4.5 * len(dims), 7), squeeze=False, sharex=True)
    for line, schedule in zip(axes, SCHEDULES):
        for panel, d in zip(line, dims):
            for name in dict.fromkeys(row["contender"] for row in rows):
                points = [
                    (row["n"], row["ms_per_step"])
                    for row in rows
                    if (row["contender"], row["schedule"], row["d"]) == (name, schedule, d) and "ms_per_step" in row
                ]
                if points:
                    panel.loglog(*zip(*sorted(points)), marker="o", label=name)
            panel.set(title=f"{schedule}, d = {d}", xlabel="n = m", ylabel="ms per step")
            panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def compile_flash(schedule: str, fused: bool | None, d: int) -> None:
    """Makes flash-sinkhorn's autotuner compile all it tries for d. From 30 000 points on its symmetric solver is not fused."""
    flash(Task.uniform(1024, d, schedule, 1, "cuda"), autotune=True, fused=fused).run()


def prepare(dims: Sequence[int]) -> int:
    jobs = [
        (schedule, fused, d) for d in dims for schedule, fused in (("symmetric", True), ("alternating", None), ("symmetric", False))
    ]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        failed = [error for error in (job.exception() for job in [pool.submit(compile_flash, *job) for job in jobs]) if error]
    for error in failed:
        print(f"flash-sinkhorn was not prepared: {error}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare otgen with its peers.")
    parser.add_argument("--device", choices=list(CONTENDERS), default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="points in each cloud")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no problem is begun")
    parser.add_argument("--out", type=Path, help="folder to write to; benchmarks/results/<device> by default")
    parser.add_argument("--prepare", action="store_true", help="only fill Triton's cache for flash-sinkhorn")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected a CUDA device; torch sees none; run this on a machine with a GPU, or with --device cpu", file=sys.stderr)
        return 2
    if options.prepare:
        return prepare(options.dims)
    warnings.simplefilter("ignore", TuningWarning)
    about = environment(options.device, options.iterations)
    out = options.out or results(options.device)
    out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(options.device, time.monotonic() + options.budget)
    problems = [(n, d, schedule) for d in options.dims for n in sorted(options.sizes) for schedule in SCHEDULES]
    for done, (n, d, schedule) in enumerate(problems):
        if time.monotonic() > comparison.deadline:
            print(f"The {options.budget:g} s were up before {len(problems) - done} of {len(problems)} problems.")
            about["not_reached"] = [f"{schedule} d={d} n={n}" for n, d, schedule in problems[done:]]
            break
        began = time.monotonic()
        try:
            comparison.add(n, d, schedule, options.iterations)
        except KeyboardInterrupt:
            print(f"Interrupted in {schedule} d={d} n={n}.")
            about["not_reached"] = [f"{schedule} d={d} n={n}" for n, d, schedule in problems[done:]]
            break
        print(f"{schedule} d={d} n={n}: {time.monotonic() - began:.1f} s", flush=True)
        write(out / "peers.json", about, comparison.rows)
    write(out / "peers.json", about, comparison.rows)
    if not plot(comparison.rows, out / "peers.png", about["device"]):
        print("No plot: matplotlib is not installed; pip install 'otgen[bench]' brings it.")
    for row in comparison.rows:
        if row["status"] != "ok":
            print(f"{row['schedule']} d={row['d']} n={row['n']} {row['contender']}: {row['status']}")
    print(table(comparison.rows))
    return 0 if any(row["status"] == "ok" for row in comparison.rows) else 1


def results(device: str) -> Path:
    """The folder of a device's results."""
    if device == "cuda":
        from otgen.gpus import detect

        device = detect().slug
    return Path(__file__).parent / "results" / device


def write(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
