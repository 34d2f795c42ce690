"""Fits the coefficients of otgen/guess.py to the compiled trials of databases: `python benchmarks/guess.py DB...`.

Writes otgen/guess.json, where kinds of kernel that the databases lack keep their coefficients, and prints how well the coefficients
do on a third of the kernels, when they are fitted to the others: the standard deviation of log(guess / compiled), the rank
correlation, and of the variants that spilled how many the guess of registers would have refused. Needs SciPy. Coefficients are not
negative: each stands for instructions somebody has to issue.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr

from otgen.families import family
from otgen.gpus import gpu
from otgen.guess import COEFFICIENTS, PER_PAIR, PER_THREAD, kernel_kind, tile_features
from otgen.problem import Variant
from otgen.workload import Tile

SPILLED = 275.0
"""What a guess should at least say of registers where the compiler spilled."""

QUERY = """
SELECT t.gpu, t.family, t.n, t.m, t.d, t.dtype, t.flags, t.variant, c.registers, c.spills, c.instructions
FROM trial t JOIN compile c ON c.id = t.compile
"""


class Kernel(NamedTuple):
    kind: str
    features: dict[str, float]
    slots: float
    shared: float
    registers: int
    spills: int


def kernels(path: Path) -> dict[Any, Kernel]:
    """The plain kernels of NVIDIA GPUs in a database, each once."""
    found: dict[Any, Kernel] = {}
    with sqlite3.connect(path) as connection:
        for slug, name, n, m, d, dtype, flags, variant, registers, spills, instructions in connection.execute(QUERY):
            target, kind, chosen = gpu(slug), family(name), Variant(json.loads(variant))
            if target.backend != "cuda" or kind.plain(chosen) != chosen:
                continue
            problem = kind.problem(n, m, d, dtype, **json.loads(flags))
            tile = Tile.of(problem, chosen, kind.work(problem, chosen))
            pairs = tile.m * tile.n / (32 * chosen.int("num_warps"))
            mix = next(launch["mix"] for launch in json.loads(instructions)["launches"] if launch["mix"]["slots"])
            found[target.arch, name, d, dtype, flags, kind.same_kernels(chosen)] = Kernel(
                kernel_kind(tile, chosen, target),
                tile_features(tile, chosen, target),
                mix["slots"] / pairs,
                mix["shared"] / pairs,
                registers,
                spills,
            )
    return found


def matrix(names: tuple[str, ...], chosen: list[Kernel]) -> np.ndarray:
    return np.array([[kernel.features[name] for name in names] for kernel in chosen], dtype=float)


def fit_relative(names: tuple[str, ...], chosen: list[Kernel], wanted: np.ndarray) -> np.ndarray:
    """Least relative error, outliers weighing less from round to round."""
    rows, weights = matrix(names, chosen), 1.0 / wanted
    for _ in range(15):
        fitted, _ = nnls(rows * weights[:, None], wanted * weights)
        off = np.abs(np.log(np.maximum(rows @ fitted, 1e-3) / wanted))
        weights = 1.0 / wanted / np.sqrt(np.maximum(off, 0.1))
    return fitted


def fit_registers(chosen: list[Kernel]) -> np.ndarray:
    """Least squares where nothing spilled; where something did, only guesses below SPILLED count as wrong."""
    fine = [kernel for kernel in chosen if not kernel.spills and kernel.registers < 250]
    spilled = [kernel for kernel in chosen if kernel.spills]
    rows, wanted = matrix(PER_THREAD, fine), np.array([kernel.registers for kernel in fine], dtype=float)
    fitted, _ = nnls(rows, wanted)
    for _ in range(15 if spilled else 0):
        low = matrix(PER_THREAD, spilled)
        low = low[low @ fitted < SPILLED]
        fitted, _ = nnls(np.vstack([rows, low]), np.concatenate([wanted, np.full(len(low), SPILLED)]))
    return fitted


def main() -> None:
    every: dict[Any, Kernel] = {}
    for path in sys.argv[1:]:
        every |= kernels(Path(path))
    tables: dict[str, dict[str, dict[str, float]]] = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    for kind in sorted({kernel.kind for kernel in every.values()}):
        mine = [kernel for kernel in every.values() if kernel.kind == kind]
        random.Random(0).shuffle(mine)
        third = len(mine) // 3
        for table, names in (("slots", PER_PAIR), ("shared", PER_PAIR), ("registers", PER_THREAD)):
            for chosen, held_out in ((mine[third:], mine[:third]), (mine, [])):
                if table == "registers":
                    fitted = fit_registers(chosen)
                    report_registers(kind, fitted, held_out)
                else:
                    unspilled = [k for k in chosen if not k.spills and getattr(k, table) > 0]
                    wanted = np.array([getattr(kernel, table) for kernel in unspilled])
                    fitted = fit_relative(names, unspilled, wanted)
                    report(kind, table, fitted, [k for k in held_out if not k.spills and getattr(k, table) > 0])
            tables[table][kind] = {name: float(f"{value:.2g}") for name, value in zip(names, fitted) if value > 0.005}
    lines = [
        f'"{table}": {{\n' + ",\n".join(f'  "{kind}": {json.dumps(weights)}' for kind, weights in values.items()) + "\n}"
        for table, values in tables.items()
    ]
    COEFFICIENTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def report(kind: str, table: str, fitted: np.ndarray, held_out: list[Kernel]) -> None:
    if held_out:
        guessed = np.maximum(matrix(PER_PAIR, held_out) @ fitted, 1e-3)
        real = np.array([getattr(kernel, table) for kernel in held_out])
        print(
            f"{kind} {table}: {len(held_out)} held out, sd of log {np.std(np.log(guessed / real)):.2f}, "
            f"rank correlation {spearmanr(guessed, real)[0]:.2f}"
        )


def report_registers(kind: str, fitted: np.ndarray, held_out: list[Kernel]) -> None:
    if held_out:
        guessed = matrix(PER_THREAD, held_out) @ fitted
        refused = guessed > 255
        spilled = np.array([kernel.spills > 0 for kernel in held_out])
        fine = ~spilled & np.array([kernel.registers < 250 for kernel in held_out])
        off = guessed[fine] - np.array([kernel.registers for kernel in held_out])[fine]
        print(
            f"{kind} registers: {len(held_out)} held out, root mean square error {np.sqrt(np.mean(off**2)):.0f}, "
            f"{(refused & spilled).sum()} of {spilled.sum()} that spilled refused, {(refused & fine).sum()} others too"
        )


if __name__ == "__main__":
    main()
