"""Instructions per pair of points, otgen beside flash-sinkhorn, read from compiled code: `python benchmarks/static.py`.

Compiles otgen's shipped winners and every configuration of flash-sinkhorn's kernels for h100 (sm_90) and a100 (sm_80), and counts
their hot loops with one counter (`otgen.isa`). Exact, repeatable, and needs no GPU: no time is measured, none is claimed.

--search N also compiles the N variants the model favours in each precision mode. --quick compiles few of flash-sinkhorn's
configurations, those of the largest tiles. Writes benchmarks/results/static/slots.json unless something was left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import debiased
import slots
import slots_report
from debiased import POINTS
from slots import Count

from otgen.candidates import by_mode, favourites, legal_variants
from otgen.families import family
from otgen.gpus import gpu
from otgen.pool import Pool, Role
from otgen.precision import MODES
from otgen.problem import Problem, Value
from otgen.toolchain import ptxas_version

RESULT = Path(__file__).parent / "results" / "static" / "slots.json"
GPUS = ("h100", "a100")
GROUP = 6
"""Kernels a worker compiles in one go."""

FEW = 4
"""Configurations of flash-sinkhorn, those of the largest tiles, that are compiled where not all are."""

DEBIASED = 2.2
"""The most sweeps that an iteration of a debiased loss should take."""

Row = dict[str, Any]
_problem = family("sinkhorn").problem


@dataclass(frozen=True)
class Peer:
    """A step of flash-sinkhorn, by its name in `flash_kernels`, TF32 allowed or not; `few` of its configurations or all."""

    step: str
    tf32: bool = True
    few: bool = False


@dataclass(frozen=True, eq=False)
class Question:
    """A step whose instructions are counted.

    accuracy  the precision mode that rounds most of those that may answer
    theirs    the steps of flash-sinkhorn that do the same
    targets   GPU → unit → the most instructions per pair there should be; "bound": cycles, see `Count.bound`
    named     GPU → axes of a kernel that is counted beside the winners, which are chosen by predicted time
    by_fma    of every four exponentials, those that multiply-add units compute: the winner with that many, whatever it has itself
    """

    name: str
    problem: Problem
    accuracy: str
    theirs: tuple[Peer, ...]
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    named: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    by_fma: int = 0


ONE_PRODUCT: Mapping[str, Value] = {
    **{"BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "precision": "fp16x3", "stabiliser": "shifted"},
    **{"fusion": "split_step", "SPLITS": 8, "operands": "packed"},
}
"""Three dimensions at the accuracy of fp32 in one matrix instruction."""

QUESTIONS = (
    Question(
        "symmetric step, both sums, d = 64",
        _problem(POINTS, POINTS, 64, schedule="symmetric"),
        "tf32",
        (Peer("SYMMETRIC"), Peer("SYMMETRIC_LARGE"), Peer("SYMMETRIC", tf32=False, few=True)),
        {"h100": {"slots": 6.2, "mufu": 1.02}, "a100": {"slots": 7.8}},
    ),
    Question(
        "half-step, d = 64",
        _problem(POINTS, POINTS, 64),
        "tf32",
        (Peer("HALF_STEP"), Peer("HALF_STEP", tf32=False, few=True)),
        {"h100": {"slots": 3.5, "mufu": 1.0}, "a100": {"slots": 5.8}},
    ),
    Question(
        "half-step, d = 64, a quarter of exp2 by multiply-add",
        _problem(POINTS, POINTS, 64),
        "tf32",
        (),
        {"h100": {"bound": 6.5}},
        by_fma=1,
    ),
    Question(
        "half-step, d = 3, fp32 accuracy",
        _problem(POINTS, POINTS, 3),
        "ieee",
        (Peer("HALF_STEP", tf32=False),),
        {"h100": {"slots": 3.0}, "a100": {"slots": 3.0}},
        named={
            "h100": {**ONE_PRODUCT, "BLOCK_M": 128, "bias": "wgmma", "num_stages": 1},
            "a100": {**ONE_PRODUCT, "BLOCK_M": 256, "bias": "mma", "num_stages": 2},
        },
    ),
)


@dataclass(frozen=True)
class Task:
    """What a row of the table is about: whose kernel (`label` says which), in what precision mode, and which of its variants."""

    question: Question
    gpu: str
    library: str
    label: str
    precision: str
    pick: str


def survey(questions: Sequence[Question], gpus: Sequence[str], *, theirs: bool, quick: bool = False, search: int = 0) -> Row:
    """What `slots_report` prints: a row per kernel, and the sweeps of a debiased iteration. Options as on the command line."""
    found: dict[Task, list[Count]] = {}
    sweeps: dict[str, dict[str, float]] = {slug: {} for slug in gpus}
    with Pool(compile=Role(2, 300.0, {"TRITON_INTERPRET": None})) as pool:
        for slug in gpus:
            for question in questions:
                _submit_ours(pool, question, slug, search)
                if theirs:
                    _submit_theirs(pool, question, slug, quick)
            pool.submit("compile", (slug, "otgen"), debiased.debiased_iteration, slug)
            if theirs:
                import flash_kernels

                pool.submit("compile", (slug, "flash-sinkhorn"), flash_kernels.debiased_sweeps, slug)
        for outcome in pool.outcomes():
            if outcome.status != "ok":
                raise RuntimeError(f"{outcome.key}: {outcome.message}")
            if isinstance(outcome.key, Task):
                found.setdefault(outcome.key, []).extend(outcome.value)
            elif outcome.key[1] == "otgen":
                sweeps[outcome.key[0]] |= dict(zip(("otgen", "launches"), outcome.value))
            else:
                sweeps[outcome.key[0]][outcome.key[1]] = outcome.value

    def place(task: Task) -> tuple[Any, ...]:
        return questions.index(task.question), gpus.index(task.gpu), task.library != "otgen", task.label, task.precision, task.pick

    names = ("triton", "flash-sinkhorn") if theirs else ("triton",)
    return {
        "versions": {"ptxas": ptxas_version(), **{name: version(name) for name in names}},
        "rows": [row(task, found[task]) for task in sorted(found, key=place)],
        "debiased": {slug: {**sweeps[slug], "target": DEBIASED, "met": sweeps[slug]["otgen"] <= DEBIASED} for slug in gpus},
    }


def _submit_ours(pool: Pool, question: Question, slug: str, search: int) -> None:
    problem = question.problem
    for winner in debiased.winners(problem, slug, question.accuracy):
        task = Task(question, slug, "otgen", str(winner.variant["fusion"]), winner.precision, "winner")
        pool.submit("compile", task, slots.of_variants, problem, [winner.variant.with_(exp2_by_fma=question.by_fma)], slug)
    if slug in question.named:
        variant = family(problem.family).default(problem).with_(**question.named[slug])
        task = Task(question, slug, "otgen", str(variant["fusion"]), str(variant["precision"]), "named")
        pool.submit("compile", task, slots.of_variants, problem, [variant], slug)
    modes = by_mode(legal_variants(problem, gpu(slug))) if search else {}
    for mode, legal in modes.items():
        if MODES[mode].floor <= MODES[question.accuracy].floor:
            chosen = favourites(problem, gpu(slug), legal, search)
            task = Task(question, slug, "otgen", "searched", mode, "fewest")
            for start in range(0, len(chosen), GROUP):
                pool.submit("compile", task, slots.of_variants, problem, chosen[start : start + GROUP], slug)


def _submit_theirs(pool: Pool, question: Question, slug: str, quick: bool) -> None:
    import flash_kernels

    d = question.problem.d
    for peer in question.theirs:
        step: flash_kernels.Step = getattr(flash_kernels, peer.step)
        tried, plain = flash_kernels.configurations(step, d, tf32=peer.tf32)
        kept = tried[:FEW] if quick or peer.few else tried
        for pick, configs in (("fewest", kept), ("default", [plain])):
            task = Task(question, slug, "flash-sinkhorn", step.label, "tf32" if peer.tf32 else "ieee", pick)
            for start in range(0, len(configs), GROUP):
                pool.submit("compile", task, flash_kernels.counts, step, d, peer.tf32, configs[start : start + GROUP], slug)


def row(task: Task, counts: list[Count]) -> Row:
    """The count of fewest issue slots. Theirs may spill, which is in their favour; ours may not, unless it is what ships."""
    count = slots.fewest(counts, spills=task.library != "otgen" or task.pick == "winner")
    targets = task.question.targets.get(task.gpu, {}) if task.library == "otgen" else {}
    found = {**count.units, "bound": count.bound(gpu(task.gpu))}
    met = not count.spills and all(round(found[unit], 2) <= most for unit, most in targets.items())
    return {
        "step": task.question.name,
        "gpu": task.gpu,
        "library": task.library,
        "kernel": task.label,
        "precision": task.precision,
        "pick": f"fewest of {len(counts)}" if task.pick == "fewest" else task.pick,
        **{name: round(number, 3) for name, number in {"sweeps": count.sweeps, **count.units}.items()},
        "bound": round(count.bound(gpu(task.gpu)), 2),
        "registers": count.registers,
        "spilled_bytes": count.spills,
        "config": dict(count.config),
        **({"target": dict(targets), "met": met} if targets else {}),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count instructions per pair of points.")
    parser.add_argument("--gpu", nargs="+", default=GPUS, choices=GPUS)
    parser.add_argument("--search", type=int, default=0, metavar="N", help="compile N more variants in each precision mode")
    parser.add_argument("--quick", action="store_true", help="few of flash-sinkhorn's configurations")
    parser.add_argument("--ours", action="store_true", help="leave flash-sinkhorn out")
    parser.add_argument("--out", type=Path, help="file to write; by default results/static/slots.json when everything was counted")
    options = parser.parse_args(arguments)
    if not options.ours:
        try:
            import flash_kernels  # noqa: F401
        except ImportError as error:
            print(f"expected flash-sinkhorn; got: {error}; install otgen[bench], or leave it out with --ours", file=sys.stderr)
            return 2
    result = survey(QUESTIONS, options.gpu, theirs=not options.ours, quick=options.quick, search=options.search)
    whole = not (options.ours or options.quick) and set(options.gpu) == set(GPUS)
    out = options.out or (RESULT if whole else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(slots_report.table(result), slots_report.summary(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
