"""`otgen why`: how the dispatcher decides for a problem."""

from __future__ import annotations

from pathlib import Path

import click

from otgen import families, gpus
from otgen.cli.arguments import parse_problem
from otgen.dispatch import Dispatcher, Explanation, cure, reason
from otgen.errors import UsageError
from otgen.precision import MODES, mode_name
from otgen.problem import Problem
from otgen.ranking import centre
from otgen.store import Store


@click.command()
@click.argument("family")
@click.argument("shape", metavar="NxMxD")
@click.argument("flags", metavar="[FLAG=VALUE]...", nargs=-1)
@click.option("--gpu", required=True, metavar="SLUG", help="The GPU to decide for.")
@click.option("--dtype", default="fp32", show_default=True, help="Storage type of the coordinates.")
@click.option("--precision", metavar="MODE", help="Admit this precision mode alone; without it, all of them.")
@click.option("--db", "path", metavar="PATH", type=click.Path(path_type=Path), help="Ask this database alone.")
def why(family: str, shape: str, flags: tuple[str, ...], gpu: str, dtype: str, precision: str | None, path: Path | None) -> None:
    """Explain which variant a problem gets on a GPU, from which file, what was refused, and what would improve it.

    A solver admits the precision modes that its data and tolerance allow; --precision shows what one of them gives.
    """
    problem, axes = parse_problem(family, shape, dtype, flags)
    if axes:
        raise UsageError(
            f"expected flags of {family}; got the axis {next(iter(axes))}, which is what `otgen why` answers; leave it out"
        )
    modes = (mode_name(precision),) if precision else tuple(MODES)
    slug = gpus.gpu(gpu).slug
    if path:
        with Store.open(path, readonly=True):
            pass
    dispatcher = Dispatcher([path] if path else None)
    explanation = dispatcher.explain(problem, slug, modes)
    click.echo(f"{problem} on {slug}, precision {', '.join(modes)}")
    click.echo(f"computes {families.family(problem.family).formula}")
    click.echo(f"looked up as {centre(problem).shape}: n and m rounded to powers of two")
    _print_sources(explanation)
    _print_rows(explanation)
    _print_answer(explanation, problem, slug)
    if problem.family == "loop":
        _print_use(dispatcher, problem, slug, modes)


def _print_sources(explanation: Explanation) -> None:
    click.echo("databases, the last one first to be believed:" if explanation.sources else "databases: none")
    for source in explanation.sources:
        click.echo(f"  {source.path}: {len(source.winners)} rows for this family and architecture")
        for complaint in source.complaints:
            click.echo(f"    {complaint}")


def _print_rows(explanation: Explanation) -> None:
    click.echo("rows considered, best first:" if explanation.considered else "rows considered: none for this dtype and these flags")
    for candidate in explanation.considered:
        winner = candidate.winner
        verdict = f"refused, {candidate.refused}" if candidate.refused else "taken"
        row = f"{winner.problem.shape} {winner.gpu} {winner.precision} {winner.evidence} {winner.us:.4g} µs"
        click.echo(f"  {candidate.cache:9} {row}: {verdict}")


def _print_answer(explanation: Explanation, problem: Problem, gpu: str) -> None:
    choice = explanation.choice
    click.echo(f"answer: {choice.cache}; {reason(choice)}")
    click.echo(f"variant: {choice.variant.text}")
    if choice.cache == "exact":
        click.echo(f"to tune it again: {cure(problem, gpu)}")
    else:
        click.echo(f"to have it tuned, and measured where this GPU is: {cure(problem, gpu)}")


def _print_use(dispatcher: Dispatcher, problem: Problem, gpu: str, modes: tuple[str, ...]) -> None:
    """Whether solvers run their iterations by this loop."""
    from otgen.iterations import per_iteration

    asked = gpu, problem.n, problem.m, problem.d, problem.dtype, problem.flags, modes
    pairs = problem.n * problem.m * problem.batch
    times = (pairs * dispatcher.us_per_pair(name, *asked) for name in ("loop", "sinkhorn"))
    looped, alone = per_iteration(str(problem.flag("schedule")), *times)
    use = "solvers take it" if looped < alone else "solvers start single steps instead"
    click.echo(f"{use}: {_us(looped)} an iteration in the loop, {_us(alone)} by steps and the Python that starts them")


def _us(time: float) -> str:
    return f"{time:.3g} µs" if time < float("inf") else "an unknown time"
