"""How well the model ranks: its predictions beside the measurements of the same variants, from a tuning database.

    python benchmarks/prediction.py [DATABASE] [--out FILE.json]

For each problem with measured trials: Spearman's rank correlation of predicted and measured times, and the regret of trusting the
model, which is how much slower than the fastest measured variant the fastest of its k favourites is (k = 1 and 8). `ratio` is the
median of measured over predicted time. Exit code 1 when the database holds no variant that was both predicted and measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from otgen.errors import OtgenError
from otgen.store import Store, default_path

FAVOURITES = (1, 8)

FEWEST = 3
"""Variants below which a rank correlation says nothing."""

Pair = tuple[float, float]
"""A variant's predicted and measured time, in microseconds."""


def ranks(values: Sequence[float]) -> np.ndarray:
    """The rank of each value, from 0; equal values share the mean of theirs."""
    found = np.asarray(values, dtype=float)
    below, upto = (found[:, None] > found).sum(1), (found[:, None] >= found).sum(1)
    return (below + upto - 1) / 2


def spearman(pairs: Sequence[Pair]) -> float | None:
    """The correlation of the ranks; None when there are too few pairs, or all of one side are equal."""
    predicted, measured = (ranks(side) for side in zip(*pairs))
    if len(pairs) < FEWEST or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return None
    return float(np.corrcoef(predicted, measured)[0, 1])


def regret(pairs: Sequence[Pair], k: int) -> float:
    """Measured time of the best among the k that were predicted fastest, over the best of all, minus one."""
    favourites = sorted(pairs)[:k]
    return min(measured for _, measured in favourites) / min(measured for _, measured in pairs) - 1.0


def assess(pairs: Sequence[Pair]) -> dict[str, Any]:
    ratio = statistics.median(measured / predicted for predicted, measured in pairs)
    regrets = {f"regret_{k}": regret(pairs, k) for k in FAVOURITES}
    return {"variants": len(pairs), "spearman": spearman(pairs), **regrets, "ratio": ratio}


def report(path: Path) -> list[dict[str, Any]]:
    """A row for every problem of the database with trials that were predicted and measured, on the present templates."""
    rows = []
    with Store.open(path, readonly=True) as store:
        for problem, gpu in dict.fromkeys((winner.problem, winner.gpu) for winner in store.winners()):
            known: dict[Any, Pair] = {
                trial.variant: (trial.predicted_us, trial.measured_us)
                for trial in store.trials(problem, gpu)
                if trial.status == "ok" and trial.predicted_us is not None and trial.measured_us is not None
            }
            if known:
                rows.append({"problem": str(problem), "gpu": gpu, **assess(list(known.values()))})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'problem':58} {'variants':>8} {'spearman':>8} {'regret 1':>8} {'regret 8':>8} {'measured/predicted':>18}")
    for row in rows:
        rank = "–" if row["spearman"] is None else f"{row['spearman']:.2f}"
        print(
            f"{row['problem']:58} {row['variants']:8} {rank:>8} {row['regret_1']:8.1%} {row['regret_8']:8.1%} {row['ratio']:18.2f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare predictions with measurements.")
    parser.add_argument("database", type=Path, nargs="?", default=default_path(), help="a tuning database; yours by default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        rows = report(options.database)
    except OtgenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not rows:
        message = f"expected trials that were both predicted and measured; {options.database} has none"
        print(f"{message}; run `otgen tune --gpu auto --db {options.database}` on a GPU", file=sys.stderr)
        return 1
    show(rows)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
