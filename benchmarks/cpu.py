"""One Sinkhorn iteration on the CPU: otgen's streamed path beside dense PyTorch and GeomLoss, timed in turns.

    python benchmarks/cpu.py [--n 2000] [--repeats 9] [--threads 2]

Both potentials are updated once by every contestant, in float32 or float64, from the same start: alternately (otgen, dense PyTorch
with the cost matrix computed beforehand) or symmetrically (otgen, GeomLoss's `softmin_tensorized` on such a matrix: two softmins).
Times are medians over rounds in which the contestants take turns. `error` is the largest difference of the row potential from the
same update in float64, in units of eps. Writes benchmarks/results/cpu/iteration.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from geomloss._legacy.sinkhorn_samples import softmin_tensorized

from otgen import ops

RESULTS = Path(__file__).parent / "results" / "cpu" / "iteration.json"

EPS = {2: 0.02, 64: 1.0}
"""About a twentieth of the mean cost of the uniform clouds below."""

LOG2_E = 1.4426950408889634

Contestant = Callable[[], torch.Tensor]
"""Runs one iteration, returns the new row potential in units of the cost."""


def contestants(n: int, d: int, dtype: torch.dtype) -> dict[str, Contestant]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, d, generator=generator, dtype=torch.float64).to(dtype) - 0.5
    y = torch.rand(n, d, generator=generator, dtype=torch.float64).to(dtype) - 0.4
    eps, weights = EPS[d], torch.full((n,), 1.0 / n, dtype=dtype)
    x_sq, y_sq = x.square().sum(1), y.square().sum(1)
    scale, kappa = 2.0 * LOG2_E / eps, LOG2_E / eps
    cost = torch.cdist(x, y).square()
    log_weights = weights.log()
    f, g = cost.mean(1), torch.zeros_like(weights)
    u, v = kappa * f - scale / 2 * x_sq, kappa * g - scale / 2 * y_sq

    def natural(u: torch.Tensor) -> torch.Tensor:
        return (u + scale / 2 * x_sq) / kappa

    def otgen_alternating() -> torch.Tensor:
        new, _ = ops.sinkhorn_half_step(x, y, u, v, weights, x_sq, scale=scale)
        ops.sinkhorn_half_step(y, x, v, new, weights, y_sq, scale=scale)
        return natural(new)

    def dense_alternating() -> torch.Tensor:
        new = -eps * torch.logsumexp((g - cost) / eps + log_weights, 1)
        -eps * torch.logsumexp((new[:, None] - cost) / eps + log_weights[:, None], 0)
        return new

    def otgen_symmetric() -> torch.Tensor:
        return natural(ops.sinkhorn_symmetric_step(x, y, u, v, weights, weights, x_sq, y_sq, scale=scale)[0])

    def geomloss_symmetric() -> torch.Tensor:
        row = softmin_tensorized(eps, cost[None], (log_weights + g / eps)[None])
        softmin_tensorized(eps, cost.T[None], (log_weights + f / eps)[None])
        return 0.5 * (f + row[0])

    return {
        "otgen alternating": otgen_alternating,
        "dense alternating": dense_alternating,
        "otgen symmetric": otgen_symmetric,
        "geomloss symmetric": geomloss_symmetric,
    }


def timed(run: Contestant) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def measure(n: int, d: int, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """A row per contestant, timed in turns after one round of warming up."""
    field = contestants(n, d, dtype)
    double = contestants(n, d, torch.float64)
    exact = {"alternating": double["dense alternating"](), "symmetric": double["geomloss symmetric"]()}
    errors = {name: float((run().double() - exact[name.split()[1]]).abs().max()) for name, run in field.items()}
    times: dict[str, list[float]] = {name: [] for name in field}
    for _ in range(repeats):
        for name, run in field.items():
            times[name].append(timed(run))
    return [
        {
            "contestant": name,
            "n": n,
            "d": d,
            "dtype": str(dtype).removeprefix("torch."),
            "milliseconds": round(statistics.median(taken), 3),
            "fastest": round(min(taken), 3),
            "error": errors[name] / EPS[d],
        }
        for name, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one Sinkhorn iteration on the CPU.")
    parser.add_argument("--n", type=int, default=2000, help="points in each cloud")
    parser.add_argument("--repeats", type=int, default=9, help="rounds timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for dtype in (torch.float32, torch.float64) for d in EPS for row in measure(options.n, d, dtype, options.repeats)]
    for row in rows:
        print(f"{row['dtype']:8} d={row['d']:<3} {row['contestant']:20} {row['milliseconds']:9} ms   error {row['error']:.1e} eps")
    packages = {name: version(name) for name in ("torch", "geomloss")}
    environment = {"machine": platform.machine(), "threads": options.threads, **packages}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
