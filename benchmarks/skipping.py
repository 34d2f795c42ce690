"""Leaving out tiles that hold nothing, on a CPU: the share of the pairs visited, and seconds to the tolerance with and without.

    python benchmarks/skipping.py [--n 50000] [--blur 0.02] [--tol 1e-3] [--threads 1] [--without cube sphere shifted]

Three pairs of clouds in three dimensions, n points each: cube → cube, sphere → box and cube → shifted cube. Of each, `solve_sample`
solves the problem with lists, and those named by --without (none: no name) also with all tiles. `visited` is the share of the pairs
in the last sweep at the final eps, `omitted_mass` what it left out at most, `wrong` the marginal error of the plan found, estimated
from its potentials on a sample of rows in float64. `widths` are shares, and seconds to make lists and to sweep, for other blocks at
the same potentials. `seconds` are those of the processor, which other work on the machine disturbs less than those of the `clock`.
Writes benchmarks/results/skipping/cpu.json after every solve.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import otgen
from otgen.errors import ConvergenceWarning
from otgen.halving import Blocks, halved
from otgen.listed import Tiles
from otgen.solvers import listed
from otgen.solvers.result import OTResult

RESULTS = Path(__file__).parent / "results" / "skipping" / "cpu.json"

PAIRS = ("cube", "sphere", "shifted")

WIDTHS = (32, 64, 128)

SHIFT = (1.0, 0.5, 0.0)

SAMPLED = 500
"""Rows whose sums are recomputed in float64."""


def clouds(pair: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform in the unit cube, or on the sphere inside it; and uniform in the unit cube, or in one shifted by SHIFT."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 3, generator=generator), torch.rand(n, 3, generator=generator)
    if pair == "sphere":
        normal = torch.randn(n, 3, generator=generator)
        x = 0.5 + 0.5 * normal / normal.norm(dim=1, keepdim=True)
    return x, y + torch.tensor(SHIFT) if pair == "shifted" else y


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, seconds of the processor and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    found = run()
    return found, time.process_time() - processor, time.perf_counter() - clock


def solved(pair: str, n: int, blur: float, tol: float, tiles: str) -> tuple[OTResult, dict[str, Any]]:
    """A solve and a row that describes it."""
    x, y = clouds(pair, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result, seconds, clock = timed(lambda: otgen.solve_sample(x, y, blur=blur, tol=tol, tiles=tiles))
    row = {"pair": pair, "tiles": tiles, "n": n, "blur": blur, "tol": tol, "stop": result.stop, "passes": result.passes}
    row |= {"visited": round(result.visited, 4), "omitted_mass": result.omitted_mass, "marginal_error": result.marginal_error}
    return result, row | {"wrong": wrong(result, x, y), "seconds": round(seconds, 1), "clock": round(clock, 1)}


def wrong(result: OTResult, x: torch.Tensor, y: torch.Tensor) -> float:
    """n·|r_i − a_i| in the mean over SAMPLED rows, in float64: an estimate of the marginal error that is reported."""
    rows = torch.arange(0, len(x), max(1, len(x) // SAMPLED))
    cost = torch.cdist(x[rows].double(), y.double()).square()
    f, g = result.potential_a[rows].double(), result.potential_b.double()
    sums = torch.exp((f[:, None] + g - cost) / result.reg).mean(1)
    return float((sums - 1.0).abs().mean())


def by_width(result: OTResult, pair: str, n: int) -> list[dict[str, Any]]:
    """Shares and seconds of a half step for blocks of each of WIDTHS, at the potentials found."""
    x, y = clouds(pair, n)
    shift, scale = (x.sum(0) + y.sum(0)) / (2 * n), 2.0 / (math.log(2.0) * result.reg)
    x, y, weights = x - shift, y - shift, torch.full((n,), 1.0 / n)
    u, v = (scale / 2 * (f - points.square().sum(1)) for f, points in ((result.potential_a, x), (result.potential_b, y)))
    rows = []
    for width in WIDTHS:
        blocks, sorting, _ = timed(partial(_sorted, x, y, width))
        tiles = Tiles(blocks[0], blocks[1], weights, weights, listed.MOST_OMITTED)
        half_step = partial(tiles.half_step, u, v, scale, 1.0)
        (_, both, _), (_, sweep, _) = timed(half_step), timed(half_step)
        times = {"sort": round(sorting, 3), "lists": round(both - sweep, 3), "sweep": round(sweep, 3)}
        rows.append({"pair": pair, "width": width, "visited": round(tiles.visited, 4), "omitted_mass": tiles.omitted, **times})
    return rows


def _sorted(x: torch.Tensor, y: torch.Tensor, width: int) -> tuple[Blocks, Blocks]:
    return halved(x, width), halved(y, width)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what leaving out tiles leaves out, and time it.")
    parser.add_argument("--n", type=int, default=50_000, help="points in each cloud")
    parser.add_argument("--blur", type=float, default=0.02, help="reg = 2·blur²")
    parser.add_argument("--tol", type=float, default=1e-3, help="marginal error")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads")
    parser.add_argument("--without", nargs="*", choices=PAIRS, default=list(PAIRS), help="pairs to solve with all tiles too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = {"machine": platform.machine(), "threads": options.threads, "torch": version("torch")}
    found: dict[str, list[dict[str, Any]]] = {"solves": [], "widths": []}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for tiles, pairs in (("auto", PAIRS), ("all", options.without)):
        for pair in pairs:
            result, row = solved(pair, options.n, options.blur, options.tol, tiles)
            found["solves"].append(row)
            if tiles == "auto":
                found["widths"] += by_width(result, pair, options.n)
            print(row, flush=True)
            RESULTS.write_text(json.dumps({"environment": environment, **found}, indent=1) + "\n")
    visited = [row["visited"] for row in found["solves"] if row["tiles"] == "auto"]
    print(f"visited in the mean: {100 * sum(visited) / len(visited):.1f} % of the pairs")


if __name__ == "__main__":
    main()
