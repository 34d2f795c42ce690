"""`otgen show`: the winners that are stored."""

from __future__ import annotations

import json
from pathlib import Path

import click

from otgen import families, gpus
from otgen.ranking import stale
from otgen.store import Winner, default_path, overlay, read_winners, shipped

WIDTH = 220
"""Columns of the table where the output is not a terminal."""


@click.command()
@click.option("--gpu", metavar="SLUG", help="Only the winners for this GPU.")
@click.option("--family", metavar="NAME", help="Only the winners of this family.")
@click.option("--db", "path", metavar="PATH", type=click.Path(path_type=Path), help="Read this database alone.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def show(gpu: str | None, family: str | None, path: Path | None, as_json: bool) -> None:
    """List the winners, those of your database over the shipped ones.

    The evidence says whether a time was measured on the GPU or predicted by the model. A stale winner was tuned on an earlier
    template and is not used.
    """
    if gpu is not None:
        gpu = gpus.gpu(gpu).slug
    if family is not None:
        family = families.family(family).name
    own = default_path()
    paths = [path] if path else [*shipped(), *([own] if own.exists() else [])]
    winners = overlay((read_winners(source, gpu=gpu, family=family) for source in paths), stale)
    if as_json:
        click.echo(json.dumps([winner.to_json() for winner in winners], indent=1))
    elif winners:
        _print_table(winners)
    else:
        command = f"otgen tune --gpu {gpu or 'SLUG'}{f' --family {family}' if family else ''}"
        click.echo(f"No winners in {', '.join(map(str, paths)) or own}; run `{command}`.")


def _print_table(winners: list[Winner]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("family", "gpu", "shape", "dtype", "precision", "evidence"):
        table.add_column(heading, no_wrap=True)
    for heading in ("µs", "registers", "spills", "shared"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("variant")
    for winner in winners:
        problem = winner.problem
        table.add_row(
            f"{problem.family} {problem.flag_text}",
            winner.gpu,
            problem.shape,
            problem.dtype,
            winner.precision,
            f"{winner.evidence}, stale" if stale(winner) else winner.evidence,
            f"{winner.us:.4g}",
            *("–" if value is None else str(value) for value in (winner.registers, winner.spills, winner.shared_bytes)),
            " ".join(f"{axis}={value}" for axis, value in winner.variant.items() if axis != "precision"),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
