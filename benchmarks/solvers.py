"""Time to a true marginal error of 1e-3 on the CPU: otgen beside GeomLoss, POT and OTT-JAX.

    python benchmarks/solvers.py [--quick] [--sizes 2000,5000] [--limit 60]

For every n, d and eps (a share of the mean cost), each contender is run at rising effort until the plan of its potentials,
recomputed in float64, misses its marginals by at most 1e-3 of the mass in all: Σ|P·1 − a| + Σ|Pᵀ·1 − b|. Its time is the median of
three runs at the first effort that does; one that takes longer than the limit counts as having taken the limit, which flatters it.
All get the same float32 clouds, uniform weights, and two threads; the dense cost matrix of those that want one is part of their
time, their imports and first compilations are not. A contender that is not installed is left out and named.

Writes benchmarks/results/cpu/solvers.json and solvers.png (time against marginal error at one setting).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otgen.pool import Pool, Role

RESULTS = Path(__file__).parent / "results" / "cpu"
SIZES, DIMENSIONS, SHARES = (2000, 5000), (2, 3, 64), (0.05, 0.01, 0.002)
TARGET = 1e-3
PLOTTED = (2000, 3, 0.01)
CURVES = {"otgen": (1e-1, 1e-2, 1e-3, 1e-4), "OTT-JAX": (1e-1, 1e-2, 1e-4)}
"""Efforts besides those that reach TARGET, for the plot."""

Pair = tuple[Tensor, Tensor]
"""Potentials (f, g) of C = |x − y|², weights outside: P = a b exp((f + g − C)/eps)."""


@dataclass(frozen=True)
class Row:
    """One contender at one setting and effort. `seconds` is the median of `runs`; `error` is recomputed in float64."""

    n: int
    d: int
    share: float
    contender: str
    effort: float
    seconds: float
    runs: int
    error: float
    status: str = "ok"


def clouds(n: int, d: int, share: float) -> tuple[Tensor, Tensor, float]:
    """Two cubes a tenth of a side apart, or two Gaussians in 64-D; eps."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn if d >= 16 else torch.rand
    x, y = draw(n, d, generator=generator), draw(n, d, generator=generator) + 0.1
    mean_cost = float(x.square().sum(1).mean() + y.square().sum(1).mean() - 2.0 * x.mean(0) @ y.mean(0))
    return x, y, share * mean_cost


def otgen(x: Tensor, y: Tensor, eps: float, tol: float) -> Pair:
    import otgen

    potentials: Pair = otgen.solve_sample(x, y, reg=eps, tol=tol, max_iter=100_000).potentials
    return potentials


def geomloss(x: Tensor, y: Tensor, eps: float, scaling: float) -> Pair:
    from geomloss import SamplesLoss

    loss = SamplesLoss(
        "sinkhorn", p=2, blur=math.sqrt(eps / 2), scaling=scaling, debias=False, potentials=True, backend="tensorized"
    )
    with torch.no_grad():
        f, g = loss(x, y)
    return 2.0 * f.view(-1), 2.0 * g.view(-1)


def pot(x: Tensor, y: Tensor, eps: float, threshold: float) -> Pair:
    import ot

    a, b = torch.full((len(x),), 1.0 / len(x)), torch.full((len(y),), 1.0 / len(y))
    _, log = ot.bregman.sinkhorn_log(a, b, ot.dist(x, y), eps, numItermax=1_000_000, stopThr=threshold, log=True)
    return eps * (log["log_u"] - a.log()), eps * (log["log_v"] - b.log())


def pot_lazy(x: Tensor, y: Tensor, eps: float, threshold: float) -> Pair:
    import ot

    f, g = ot.bregman.empirical_sinkhorn(x, y, eps, numIterMax=1_000_000, stopThr=threshold, isLazy=True, batchSize=1000)
    return eps * (f + math.log(len(x))), eps * (g + math.log(len(y)))


def ott(x: Tensor, y: Tensor, eps: float, threshold: float) -> Pair:
    import jax.numpy as jnp
    from ott.geometry import pointcloud
    from ott.solvers import linear

    geometry = pointcloud.PointCloud(jnp.asarray(x.numpy()), jnp.asarray(y.numpy()), epsilon=eps)
    out = linear.solve(geometry, threshold=threshold, max_iterations=1_000_000)
    f, g = (torch.from_numpy(np.array(potential)) for potential in (out.f, out.g))
    return f + eps * math.log(len(x)), g + eps * math.log(len(y))


def _l2(n: int) -> tuple[float, ...]:
    """POT stops on the L2 norm of the column error, which is at least the L1 norm over √n."""
    return tuple(TARGET / math.sqrt(n) * factor for factor in (8.0, 4.0, 2.0, 1.0, 0.5, 0.25))


CONTENDERS: dict[str, tuple[str, Callable[[Tensor, Tensor, float, float], Pair], Callable[[int], Sequence[float]]]] = {
    "otgen": ("otgen", otgen, lambda n: (TARGET, TARGET / 2)),
    "GeomLoss tensorized": ("geomloss", geomloss, lambda n: (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)),
    "POT sinkhorn_log": ("ot", pot, _l2),
    "POT lazy": ("ot", pot_lazy, _l2),
    "OTT-JAX": ("ott", ott, lambda n: (TARGET, TARGET / 2, TARGET / 4)),
}
"""Name → module, function of (x, y, eps, effort), and its efforts, rising."""


def true_error(x: Tensor, y: Tensor, eps: float, f: Tensor, g: Tensor) -> float:
    """The L1 marginal error of the potentials' plan, in float64."""
    x, y, f, g = (tensor.double() for tensor in (x, y, f, g))
    columns, missed = torch.zeros(len(y), dtype=torch.float64), 0.0
    for start in range(0, len(x), 500):
        rows = slice(start, start + 500)
        plan = ((f[rows, None] + g - torch.cdist(x[rows], y).square()) / eps).exp_().div_(len(x) * len(y))
        missed += float((plan.sum(1) - 1.0 / len(x)).abs().sum())
        columns += plan.sum(0)
    return missed + float((columns - 1.0 / len(y)).abs().sum())


def attempt(name: str, n: int, d: int, share: float, effort: float) -> tuple[float, int, float]:
    """(median seconds, runs, error) of one contender, in a process of its own that may be killed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    x, y, eps = clouds(n, d, share)
    run = CONTENDERS[name][1]
    small = clouds(64, d, 1.0)
    run(*small, CONTENDERS[name][2](64)[0])
    if name == "OTT-JAX":
        run(x, y, eps, 1e9)  # compiles for these shapes
    seconds: list[float] = []
    while len(seconds) < (1 if seconds and seconds[0] > 2.0 else 3):
        began = time.perf_counter()
        f, g = run(x, y, eps, effort)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), len(seconds), true_error(x, y, eps, f, g)


def rows_of(pool: Pool, name: str, n: int, d: int, share: float, limit: float, efforts: Sequence[float] | None = None) -> list[Row]:
    """A contender at rising effort (its own, as a rule), up to the first that reaches TARGET or exceeds the limit."""
    found: list[Row] = []
    for effort in efforts or CONTENDERS[name][2](n):
        pool.submit("solve", None, attempt, name, n, d, share, effort)
        outcome = pool.next()
        if outcome.status != "ok":
            status = "over the limit" if outcome.status == "timeout" else outcome.message
            return [*found, Row(n, d, share, name, effort, limit, 0, math.nan, status)]
        seconds, runs, error = outcome.value
        found.append(Row(n, d, share, name, effort, seconds, runs, error))
        if error <= TARGET:
            break
    return found


def best_ratios(rows: Sequence[Row]) -> list[float]:
    """Of every setting, the time of the best peer over otgen's."""
    ratios = []
    for setting in sorted({(row.n, row.d, row.share) for row in rows}):
        last = {row.contender: row for row in rows if (row.n, row.d, row.share) == setting}
        peers = [row.seconds for name, row in last.items() if name != "otgen" and (row.error <= TARGET or row.runs == 0)]
        if peers and last["otgen"].error <= TARGET:
            ratios.append(min(peers) / last["otgen"].seconds)
    return ratios


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name in dict.fromkeys(row.contender for row in rows):
        points = sorted((row.seconds, row.error) for row in rows if row.contender == name and row.runs)
        axis.loglog(*zip(*points), marker="o", label=name)
    n, d, share = PLOTTED
    axis.set(
        xlabel="seconds, 2 CPU threads", ylabel="L1 marginal error", title=f"n = m = {n}, d = {d}, eps = {share} of the mean cost"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="n = 500 only, nothing written")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="n = m, comma-separated")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds an attempt may take, its three runs together")
    options = parser.parse_args()
    sizes = [500] if options.quick else [int(size) for size in options.sizes.split(",")]
    present = [name for name, (module, _, _) in CONTENDERS.items() if importlib.util.find_spec(module)]
    rows: list[Row] = []
    environment = {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": None}
    with Pool(solve=Role(1, options.limit, environment)) as pool:
        for n in sizes:
            for d in DIMENSIONS:
                for share in SHARES:
                    for name in present:
                        rows += rows_of(pool, name, n, d, share, options.limit)
                        row = rows[-1]
                        print(f"{n} {d} {share} {name:20} {row.seconds:8.3f} s  error {row.error:.1e}  {row.status}", flush=True)
        curve = []
        if not options.quick:
            curve = [
                row for name in present for e in CURVES.get(name, ()) for row in rows_of(pool, name, *PLOTTED, options.limit, (e,))
            ]
    ratios = best_ratios(rows)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    missing = sorted(set(CONTENDERS) - set(present))
    print(
        f"best peer over otgen: geometric mean {mean:.2f}, least {min(ratios):.2f}; not installed: {', '.join(missing) or 'none'}"
    )
    if not options.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        summary = {
            "geometric_mean": round(mean, 2),
            "least": round(min(ratios), 2),
            "not_installed": missing,
            "limit_s": options.limit,
        }
        found = {**summary, "rows": [asdict(row) for row in rows], "curve": [asdict(row) for row in curve]}
        (RESULTS / "solvers.json").write_text(json.dumps(found, indent=1) + "\n")
        again = {row.contender for row in curve if row.effort == TARGET}
        shown = [row for row in rows if (row.n, row.d, row.share) == PLOTTED and row.contender not in again]
        plot([*shown, *curve], RESULTS / "solvers.png")


if __name__ == "__main__":
    main()
