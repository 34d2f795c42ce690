"""`otgen tune`: search, and store the winners."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from otgen.cli.arguments import assignment
from otgen.errors import NoValidVariant, OtgenError, UsageError, unknown
from otgen.families import FAMILIES, family
from otgen.gpus import Gpu, detect, gpu
from otgen.problem import DTYPES, parse_shape

if TYPE_CHECKING:
    from otgen.tuner import Settings, Summary

TOP = 10


@click.command()
@click.option("--gpu", "slug", required=True, metavar="SLUG|auto", help="The GPU to tune for; auto: the one in this machine.")
@click.option("--family", "families", multiple=True, metavar="NAME", help="A family to tune; all of them by default.")
@click.option("--shape", "shapes", multiple=True, metavar="NxMxD", help="A shape to tune; the standard set by default.")
@click.option(
    "--flag", "words", multiple=True, metavar="NAME=VALUE", help="A flag of the problems; each standard choice by default."
)
@click.option("--dtype", default="fp32", show_default=True, metavar="TYPE,...", help="Storage types of the coordinates.")
@click.option(
    "--max-trials", default=30, show_default=True, type=click.IntRange(1), help="Variants per problem, earlier ones counted in."
)
@click.option("--budget", metavar="TIME", help="Stop starting trials after this long: 90s, 10m, 2h.")
@click.option("--sampler", default="tpe", show_default=True, help="What proposes after the model's favourites: tpe, random.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sampler.")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Compilers at a time; one per core by default.")
@click.option("--db", "path", type=click.Path(path_type=Path, dir_okay=False), help="The database to write; yours by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the winners as a JSON list and nothing else on standard output.")
def tune(
    slug: str,
    families: tuple[str, ...],
    shapes: tuple[str, ...],
    words: tuple[str, ...],
    dtype: str,
    max_trials: int,
    budget: str | None,
    sampler: str,
    seed: int,
    jobs: int | None,
    path: Path | None,
    as_json: bool,
) -> None:
    """Generate, compile, rank and store kernels for a GPU, which need not be here.

    On a machine with that GPU every variant is checked and timed on it; anywhere else times are predicted from the compiled code,
    labelled so, and would-be winners are checked in the interpreter. Interrupt it whenever you like: the same command goes on.
    """
    for name in families:
        family(name)
    dtypes = [word.strip() for word in dtype.split(",")]
    for word in dtypes:
        if word not in DTYPES:
            raise unknown("dtype", word, DTYPES)
    parsed = [parse_shape(shape) for shape in shapes]
    flags = dict(assignment(word) for word in words)
    seconds = _seconds(budget) if budget else None
    target = detect() if slug == "auto" else gpu(slug)

    from otgen.render import cache_is_writable
    from otgen.search import SAMPLERS
    from otgen.store import Store, default_path
    from otgen.tuner import Settings, standard_problems
    from otgen.tuner import tune as run

    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    settings = Settings(max_trials, seconds, sampler, seed, measured=slug == "auto" or _is_here(target))
    if jobs:
        settings = replace(settings, jobs=jobs)
    problems = standard_problems(families or tuple(FAMILIES), parsed or None, dtypes, flags)
    path = path or default_path()
    cache_is_writable()
    say = _Voice(as_json)
    evidence = _evidence(target, settings)
    say(f"otgen tune: {len(problems)} problems for {target.slug} ({target.name}). {evidence}")
    summaries: list[Summary] = []
    with Store.open(path) as store:
        try:
            with _Bar(settings) as bar:
                summaries.extend(run(problems, target, store, settings, bar.show))
        except KeyboardInterrupt:
            say(f"Interrupted; every finished trial is stored in {path}. To go on:")
            say(f"  {shlex.join([sys.executable, '-m', 'otgen', *sys.argv[1:]])}")
            say(evidence)
            raise
    _report(say, summaries, problems, path)
    if as_json:
        import json

        click.echo(json.dumps([winner.to_json() for summary in summaries for winner in summary.winners], indent=1))
    say(evidence)
    if any(summary.winners for summary in summaries):
        return
    if not any(summary.trials for summary in summaries):
        raise OtgenError(f"expected time for at least one trial; --budget {budget} ended first; type a longer one, such as 2m")
    raise NoValidVariant(f"expected a variant that compiles and agrees with float64; found none; the trials in {path} say why")


class _Voice:
    """Prints to standard output, or to standard error when that is reserved for JSON."""

    def __init__(self, reserved: bool) -> None:
        self.reserved = reserved

    def __call__(self, text: str) -> None:
        click.echo(text, err=self.reserved)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"expected a time such as 90s, 10m or 2h; got {text!r}; write for example --budget 10m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _is_here(target: Gpu) -> bool:
    """Whether the GPU in this machine is the one asked for; torch, slow to import, is asked only where a driver is."""
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1" if target.backend == "cuda" else "libamdhip64.so")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available() and detect().slug == target.slug


def _evidence(target: Gpu, settings: Settings) -> str:
    if settings.measured:
        return f"Times are MEASURED on this machine's {target.slug}: median, cold L2, the default variant timed in the same batch."
    return f"No {target.slug} here: times are PREDICTED from compiled code by a model, none is measured."


def _report(say: _Voice, summaries: list[Summary], problems: list[Any], path: Path) -> None:
    for summary in summaries:
        if len(problems) <= len(FAMILIES) * 3:
            _top(say, summary)
        _pin(say, summary)
    added = sum(summary.added for summary in summaries)
    total = sum(len(summary.trials) for summary in summaries)
    failed: dict[str, int] = {}
    for summary in summaries:
        for status, count in summary.failures.items():
            failed[status] = failed.get(status, 0) + count
    counts = ", ".join(f"{count} {status}" for status, count in sorted(failed.items())) or "none failed"
    say(f"{added} trials run, {total} known for these problems; not ok: {counts}.")
    carried = sum(summary.carried for summary in summaries)
    if carried:
        say(f"  {carried} of them carried over from an earlier template that renders to the same kernels.")
    for status, message in _examples(summaries).items():
        say(f"  {status}, for example: {message}")
    if len(summaries) < len(problems):
        say(f"The budget ended before {len(problems) - len(summaries)} of {len(problems)} problems; run again to go on.")
    say(f"{sum(len(summary.winners) for summary in summaries)} winners stored in {path}; otgen show --db {path} lists them.")


def _top(say: _Voice, summary: Summary) -> None:
    """The best trials of the strongest evidence there is: measured ones, or else predicted ones, never both in one list."""
    good = [trial for trial in summary.trials if trial.status == "ok" and trial.us is not None]
    measured = [trial for trial in good if trial.measured_us is not None]
    good = sorted(measured or good, key=lambda trial: trial.us or 0.0)
    if not good:
        return
    best = good[0].us or 1.0
    say(f"\n{summary.problem}: the best {min(TOP, len(good))} of {len(good)} {'measured' if measured else 'predicted'}")
    for trial in good[:TOP]:
        us = trial.us or 0.0
        say(f"  {us:10.1f} µs  {100 * best / us:5.1f} % of best  {trial.registers:3} registers  {trial.variant.text}")


def _pin(say: _Voice, summary: Summary) -> None:
    """The fastest winner, and the line of Python that makes the dispatcher take it always."""
    if not summary.winners:
        say(f"{summary.problem}: no winner")
        return
    winner = min(summary.winners, key=lambda winner: (winner.measured_us is None, winner.us))
    flags = "".join(f", {name}={value!r}" for name, value in summary.problem.flags)
    say(f"{summary.problem}: {winner.us:.1f} µs {winner.evidence} ({winner.precision}); to pin it:")
    say(f"  otgen.pin({summary.problem.family!r}{flags}, variant={dict(winner.variant)!r})")


def _examples(summaries: list[Summary]) -> dict[str, str]:
    """The first message of each status."""
    found: dict[str, str] = {}
    for summary in summaries:
        for trial in summary.trials:
            if trial.status != "ok" and trial.message:
                found.setdefault(trial.status, f"{summary.problem.family} {trial.variant.text}: {trial.message}")
    return found


class _Bar:
    """A progress bar on standard error: trials, rate, time left, the best so far."""

    def __init__(self, settings: Settings) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.fields[problem]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f}/min"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("best {task.fields[best]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=None, problem="", rate=0.0, best="–")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def show(self, progress: Any) -> None:
        elapsed = self._bar.tasks[0].elapsed or 1.0
        best = f"{progress.best_us:.1f} µs" if progress.best else "–"
        rate = 60.0 * progress.trials / max(elapsed, 1e-3)
        self._bar.update(
            self._task, completed=progress.done, total=progress.total, problem=str(progress.problem), rate=rate, best=best
        )
