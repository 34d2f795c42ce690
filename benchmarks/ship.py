"""Tunes the standard set for GPUs of the table and writes tuning_db/<slug>.db.

Usage: python benchmarks/ship.py [--max-trials N] [SLUG ...]; all GPUs by default.

All GPUs share one working database, so GPUs of one architecture, and sizes of one problem, share their compilations. Without the
GPU the rows are predicted. Interrupt it whenever you like; run again, it goes on. The problem whose instruction counts are quoted
(benchmarks/static.py) is searched eight times as deep, before all others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from otgen.families import FAMILIES, family
from otgen.gpus import GPUS, gpu
from otgen.resources import resource
from otgen.store import Store
from otgen.tuner import Settings, standard_problems, tune

QUOTED = [family("sinkhorn").problem(4096, 4096, 64, schedule="symmetric")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slugs", nargs="*", metavar="SLUG")
    parser.add_argument("--max-trials", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("build/ship.db"), help="the working database")
    options = parser.parse_args()
    problems = standard_problems(tuple(FAMILIES), None, ("fp32",))
    with Store.open(options.work) as store:
        for slug in options.slugs or sorted(GPUS, key=lambda slug: str(GPUS[slug].arch)):
            began, added = time.monotonic(), 0
            for chosen, trials in ((QUOTED, 8 * options.max_trials), (problems, options.max_trials)):
                for summary in tune(chosen, gpu(slug), store, Settings(max_trials=trials), lambda progress: None):
                    added += summary.added
            store.snapshot(resource("tuning_db") / f"{slug}.db", winners_of=slug)
            print(f"{slug}: {added} trials in {time.monotonic() - began:.0f} s, {len(store.winners(slug))} winners", flush=True)


if __name__ == "__main__":
    main()
