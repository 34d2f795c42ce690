"""otgen beside flash-sinkhorn where users meet them: whole values of few points, batches, a million points, second derivatives.

    python benchmarks/sizes.py [--kinds loss batch …] [--budget SECONDS] [--out DIR]
    python benchmarks/sizes.py --device cpu --at-most 60

`questions.py` says what is asked, in what units, and why the work is equal. Every contender runs once to compile, autotune and warm
up (`first_s`), and once more, when its answer is judged; then all take turns, in an order that rotates. Seconds are those of whole
calls between two CUDA events, host work included: median and 20 % and 80 % quantiles of `samples_s`. What takes more than SLOW_S is
not repeated: its only sample is the second run.

Every row has a `status`: "ok", "left out: …" or "failed: …" with the reason, or "not reached". A peer's `ratio` is its median over
otgen's; otgen's is the smallest of them, whatever the peer's accuracy, and `met` says whether that is the `target`. `error` is what
`error_is` names; it is absent where the float64 answer could not be had, for the reason in `error_absent`. Nothing is predicted.

Before, all of what flash-sinkhorn's autotuner will try is compiled into Triton's cache, PREPARATION seconds at most, in parallel.
Writes sizes.json after every question.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from contenders import Unfit
from peers import SLOW_S, Row, environment, failure, results, timed, turns, write
from questions import ITERATIONS, KINDS, Posed, Question, Ready

from otgen.measure import quantile
from otgen.pool import Pool, Role

TARGETS = {"loss": 5.0, "symmetric": 5.0, "alternating": 5.0, "batch": 20.0, "listed": 1.0, "hvp": 2.0}
"""How many times as long flash-sinkhorn is to take."""

MILLION = 1_000_000

QUESTIONS = (
    Question("loss", 1000, 3),
    Question("batch", 256, 3, 256),
    Question("hvp", 4096, 64),
    Question("listed", 131_072, 3),
    Question("listed", MILLION, 3),
    Question("loss", 4000, 64),
    Question("batch", 256, 64, 256),
    Question("hvp", 16384, 64),
    *(Question(kind, n, d) for n, d in ((1000, 3), (4000, 64)) for kind in ("symmetric", "alternating")),
    *(
        Question(kind, n, d)
        for n, d in ((4000, 3), (1000, 64), (2000, 3), (2000, 64))
        for kind in ("loss", "symmetric", "alternating")
    ),
)
"""In order of importance: what the budget does not reach comes last."""

GROWTH = {"listed": 1.5}
"""The power of n by which a time is expected to grow, 2 for all else: with lists, and on cells, only the first stages take n²."""

PREPARATION = 90.0
NOT_REACHED = "not reached"
OURS = "otgen"


class Answers:
    """The rows so far, and how long each contender took at the sizes before."""

    def __init__(self, device: str, deadline: float, versions: dict[str, Any]) -> None:
        self.device, self.deadline, self.versions = device, deadline, versions
        self.rows: list[Row] = []
        self._known: dict[tuple[str, str, int], tuple[int, float]] = {}

    def add(self, question: Question) -> None:
        """A row for every contender, with times or the reason why there are none. An interruption leaves those not reached."""
        kind = KINDS[question.kind]
        common = asdict(question) | {"question": str(question), "target": TARGETS[question.kind], "error_is": kind.error}
        posed = kind(question, self.device)
        rows = {name: common | {"contender": name, "version": self._version(name), "eps": posed.eps} for name in posed.contenders}
        for row in rows.values():
            row["status"] = NOT_REACHED
        self.rows += rows.values()
        reference, absent = self._reference(posed)
        ready: dict[str, Ready] = {}
        for name, make in posed.contenders.items():
            row = rows[name]
            try:
                ready[name] = self._warm(question, row, make, reference, absent)
            except Unfit as reason:
                row["status"] = f"left out: {reason}"
            except Exception as error:  # a contender's failure is a result
                row["status"] = failure(error)
        quick = {name: one.run for name, one in ready.items() if rows[name]["warm_s"] <= SLOW_S}
        samples = turns(quick, sum(rows[name]["warm_s"] for name in quick), self.device)
        for name in ready:
            rows[name] |= summary(samples.get(name) or [rows[name]["warm_s"]]) | {"status": "ok"}
        compare(list(rows.values()))
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _version(self, contender: str) -> str | None:
        return self.versions.get(OURS if contender == OURS else "flash-sinkhorn")

    @staticmethod
    def _reference(posed: Posed) -> tuple[Any, str]:
        try:
            return posed.reference(), ""
        except Exception as error:  # contenders can be timed without
            return None, failure(error)

    def _warm(self, question: Question, row: Row, make: Callable[[], Ready], reference: Any, absent: str) -> Ready:
        left, key = self.deadline - time.monotonic(), (question.kind, row["contender"], question.d)
        if left < 0:
            raise Unfit("the time was up")
        before, took = self._known.get(key, (question.n, 0.0))
        if (expected := 2.0 * took * (question.n / before) ** GROWTH.get(question.kind, 2.0)) > left:
            raise Unfit(f"two runs would take {expected:.0f} s, to judge by n = {before}; {left:.0f} s are left")
        ready = make()
        row["first_s"] = timed(ready.run, self.device)
        answer: list[Any] = []
        row["warm_s"] = timed(lambda: answer.append(ready.run()), self.device)
        self._known[key] = question.n, row["warm_s"]
        row |= {"error_absent": absent} if absent else ready.judged(answer[0], reference)
        return ready


def summary(samples: list[float]) -> Row:
    quantiles = {f"{name}_s": quantile(samples, q) for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}
    return {**quantiles, "samples_s": samples}


def compare(rows: Sequence[Row]) -> None:
    """Ratios of the rows of one question, where there are times, and whether they are the target."""
    found = {row["contender"]: row for row in rows if "median_s" in row}
    ours = found.pop(OURS, None)
    if ours and found:
        for row in found.values():
            row["ratio"] = row["median_s"] / ours["median_s"]
        ours["ratio"] = min(row["ratio"] for row in found.values())
        for row in (ours, *found.values()):
            row["met"] = row["ratio"] >= row["target"]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':24}{'':20}{'ms':>11}{'20 %':>11}{'80 %':>11}{'ratio':>8}{'target':>7} {'met':4}{'error':>9}"]
    for row in rows:
        line = f"{row['question']:24}{row['contender']:20}"
        if "median_s" in row:
            line += "".join(f"{1e3 * row[name]:11.3f}" for name in ("median_s", "p20_s", "p80_s"))
            ratio, met = (f"{row['ratio']:.2f}", "yes" if row["met"] else "no") if "ratio" in row else ("", "")
            line += f"{ratio:>8}{row['target']:7g} {met:4}" + (f"{row['error']:9.1e}" if "error" in row else f"{'none':>9}")
        else:
            line += f"  {row['status']}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def verdict(rows: Sequence[Row], missed: Sequence[Question]) -> str:
    compared = [row for row in rows if row["contender"] == OURS and "met" in row]
    met = sum(row["met"] for row in compared)
    return (
        f"{met} of {len(compared)} targets met; {len({row['question'] for row in rows}) - len(compared)} questions without a "
        + (f"ratio; {len(missed)} not reached")
    )


def compiled(question: Question, contender: str) -> None:
    """Runs a contender once, for what its autotuner compiles."""
    KINDS[question.kind](question, "cuda").contenders[contender]().run()


def prepare(questions: Sequence[Question], seconds: float) -> None:
    """Fills Triton's cache. What fails or takes too long here is compiled, or fails, when its turn comes."""
    jobs = dict.fromkeys(
        Question("loss", one.n, one.d) if one.kind in ("batch", "symmetric") else one for one in questions if one.n < MILLION
    )
    end = time.monotonic() + seconds
    with Pool(compile=Role(max(1, min(len(jobs), os.cpu_count() or 1)), seconds)) as pool:
        for question in jobs:
            pool.submit("compile", question, compiled, question, "flash multiscale" if question.kind == "listed" else "flash")
        while len(pool) and time.monotonic() < end:
            outcome = pool.next()
            if outcome.status != "ok":
                print(f"not compiled ahead: {outcome.key}: {outcome.error or outcome.message or outcome.status}")


def ask(answers: Answers, questions: Sequence[Question], written: Callable[[], None]) -> list[Question]:
    """Puts the questions, until the time is up or somebody interrupts; those that were not reached."""
    for done, question in enumerate(questions):
        if time.monotonic() > answers.deadline:
            return list(questions[done:])
        began = time.monotonic()
        try:
            answers.add(question)
        except KeyboardInterrupt:
            return list(questions[done:])
        print(f"{question}: {time.monotonic() - began:.1f} s", flush=True)
        written()
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare otgen with flash-sinkhorn on whole calls.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--at-most", type=int, default=max(question.n for question in QUESTIONS), help="points and problems: a dry run"
    )
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no contender is begun")
    parser.add_argument("--out", type=Path, help="folder to write to; benchmarks/results/<device> by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected a CUDA device; torch sees none; run this on a machine with a GPU, or with --device cpu", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.budget
    questions = list(dict.fromkeys(one.at_most(options.at_most) for one in QUESTIONS if one.kind in options.kinds))
    about = environment(options.device, ITERATIONS) | {"protocol": (__doc__ or "").split("\n\n")[2:4], "budget_s": options.budget}
    out = options.out or results(options.device)
    out.mkdir(parents=True, exist_ok=True)
    answers = Answers(options.device, deadline, about)

    def written() -> None:
        write(out / "sizes.json", about, answers.rows)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a solve missed is in its row
        if options.device == "cuda":
            prepare(questions, min(PREPARATION, options.budget / 3.0))
        missed = ask(answers, questions, written)
    about["not_reached"] = [str(question) for question in missed]
    written()
    print(table(answers.rows))
    if missed:
        print(f"Not reached: {', '.join(about['not_reached'])}.")
    print(verdict(answers.rows, missed))
    ours = [row["status"] for row in answers.rows if row["contender"] == OURS]
    return 0 if ours and all(status == "ok" or status.startswith("left out") for status in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
