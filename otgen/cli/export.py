"""`otgen export`: a database, or a part of it, in a form for others."""

from __future__ import annotations

from pathlib import Path

import click

from otgen import families, gpus
from otgen.errors import UsageError, unknown
from otgen.problem import parse_shape
from otgen.store import default_path

FORMATS = ("json", "csv", "t4", "sqlite")


@click.command()
@click.option("--format", "form", required=True, metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")
@click.option("--trials", is_flag=True, help="All trials; without it, those that won.")
@click.option("--gpu", metavar="SLUG", help="Only what is for this GPU.")
@click.option("--family", metavar="NAME", help="Only what is of this family.")
@click.option("--shape", metavar="NxMxD", help="Only problems of this shape.")
@click.option("--db", "path", metavar="PATH", type=click.Path(path_type=Path), help="The database to read; yours by default.")
@click.option("-o", "--out", metavar="FILE", type=click.Path(path_type=Path), help="Write to FILE instead of standard output.")
@click.option("--force", is_flag=True, help="Replace FILE if there is one.")
def export(
    form: str,
    trials: bool,
    gpu: str | None,
    family: str | None,
    shape: str | None,
    path: Path | None,
    out: Path | None,
    force: bool,
) -> None:
    """Write winners, or all trials, with everything that is known of them.

    json and sqlite are for `otgen import` and lose nothing; csv is a table for a spreadsheet; t4 is the results file that Kernel
    Tuner and the BAT benchmarks share, one configuration a trial.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "sqlite" and out is None:
        raise UsageError("expected a file for a database; got standard output; name one with -o")
    wanted = (gpu and gpus.gpu(gpu).slug, family and families.family(family).name, shape and parse_shape(shape))

    from otgen.store.formats import TEXT
    from otgen.store.publish import write_database, write_text
    from otgen.store.reading import read_database

    contents = read_database(path or default_path())
    for sentence in contents.refused:
        click.echo(f"otgen: left out {sentence}", err=True)
    won = {winner.trial for winner in contents.winners}
    chosen = []
    for number, fact in contents.facts.items():
        problem = fact.trial.problem
        own = (fact.trial.gpu, problem.family, (problem.n, problem.m, problem.d))
        if (trials or number in won) and all(one is None or one == other for one, other in zip(wanted, own)):
            chosen.append((fact, number in won))
    if form == "sqlite" and out is not None:
        write_database([fact for fact, _ in chosen], out, replace=force)
    elif out is not None:
        write_text(TEXT[form](chosen), out, replace=force)
    else:
        click.echo(TEXT[form](chosen), nl=False)
    if out is not None:
        click.echo(f"wrote {len(chosen)} trials to {out}", err=True)
