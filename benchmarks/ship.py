"""Tunes the standard set for GPUs of the table and writes tuning_db/<slug>.db.

Usage: python benchmarks/ship.py [--max-trials N] [--carry | --lacking] [--family NAME] [--dimension D] [SLUG ...]; all GPUs by
default.

All GPUs share one working database, so GPUs of one architecture, and sizes of one problem, share their compilations. Without the
GPU the rows are predicted. Interrupt it whenever you like; run again, it goes on. The problems whose instructions are counted
(benchmarks/static.py) are searched four times as deep, before all others.

After an edit of a template, what it renders as before is carried over first and searched no more; --carry does that alone, from
the shipped files themselves where there is no working database. --lacking searches problems without any winner, and no others.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from static import QUESTIONS

from otgen.carry import carry
from otgen.families import FAMILIES
from otgen.gpus import GPUS, gpu
from otgen.problem import Problem
from otgen.ranking import stale
from otgen.resources import resource, template_hash
from otgen.store import Store
from otgen.tuner import Settings, standard_problems, tune

QUOTED = list(dict.fromkeys(question.problem for question in QUESTIONS))
"""The problems whose instructions are counted."""

BATCHES = [(n, n, d) for d in (3, 64) for n in (128, 512)]
"""Shapes of the problems of a batch of 64: minibatches, small clouds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slugs", nargs="*", metavar="SLUG")
    parser.add_argument("--max-trials", type=int, default=12)
    parser.add_argument("--carry", action="store_true", help="carry over what earlier templates taught, search nothing")
    parser.add_argument("--lacking", action="store_true", help="search only problems that have no winner yet")
    parser.add_argument("--family", help="search this one only")
    parser.add_argument("--dimension", type=int, action="append", help="search problems of this d only, or these")
    parser.add_argument("--work", type=Path, default=Path("build/ship.db"), help="the working database")
    parser.add_argument("--out", type=Path, default=resource("tuning_db"), help="where the files go")
    options = parser.parse_args()
    problems = standard_problems(tuple(FAMILIES), None, ("fp32",))
    batched = tuple(name for name, kind in FAMILIES.items() if "batch" in kind.flags)
    problems += standard_problems(batched, BATCHES, ("fp32",), {"batch": 64})
    wanted = [p for p in problems if options.family in (None, p.family) and p.d in (options.dimension or [p.d])]
    with tempfile.TemporaryDirectory() as folder:
        for slug in options.slugs or sorted(GPUS, key=lambda slug: str(GPUS[slug].arch)):
            work = options.work
            if options.carry and not work.exists():
                work = Path(shutil.copy(resource("tuning_db") / f"{slug}.db", folder))
            with Store.open(work) as store:
                ship(
                    slug, problems, wanted, store, 0 if options.carry else options.max_trials, options.out, lacking=options.lacking
                )


def ship(
    slug: str, problems: Sequence[Problem], wanted: Sequence[Problem], store: Store, max_trials: int, out: Path, *, lacking: bool
) -> None:
    """Carries over `problems`, searches up to `max_trials` variants of each that is `wanted`, and writes the GPU's file."""
    began, added = time.monotonic(), 0
    carried = carry(problems, gpu(slug), store).total()
    done = {winner.problem for winner in store.winners(slug) if not stale(winner)} if lacking else set()
    quoted = [problem for problem in QUOTED if problem in wanted]
    for searched, trials in ((quoted, 4 * max_trials), (wanted, max_trials)) if max_trials else ():
        chosen = [problem for problem in searched if problem not in done]
        for summary in tune(chosen, gpu(slug), store, Settings(max_trials=trials), lambda progress: None) if chosen else ():
            added += summary.added
    store.snapshot(out / f"{slug}.db", winners_of=slug, templates=[template_hash(name) for name in FAMILIES])
    winners = store.winners(slug)
    print(
        f"{slug}: {carried} trials carried over, {added} run in {time.monotonic() - began:.0f} s; "
        f"{len(winners)} winners, {sum(map(stale, winners))} stale, which are left out",
        flush=True,
    )


if __name__ == "__main__":
    main()
