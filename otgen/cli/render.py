"""`otgen render`: the source of one kernel."""

from __future__ import annotations

from pathlib import Path

import click

from otgen.cli.arguments import parse_problem, parse_variant
from otgen.gpus import gpu


@click.command()
@click.argument("family")
@click.argument("words", metavar="[FLAG=VALUE | AXIS=VALUE]...", nargs=-1)
@click.option("--shape", required=True, metavar="NxMxD", help="Sizes of the two clouds and their dimension.")
@click.option("--gpu", "slug", default="a100", show_default=True, metavar="SLUG", help="The GPU the variant must be legal on.")
@click.option("--dtype", default="fp32", show_default=True, help="Storage type of the coordinates.")
@click.option("--winner", is_flag=True, help="Start from the stored winner instead of the family's default variant.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead of standard output.")
def render(family: str, words: tuple[str, ...], shape: str, slug: str, dtype: str, winner: bool, out: Path | None) -> None:
    """Write the module that computes FAMILY in one variant: readable, importable, with a launch().

    Flags say what is computed, axes how; `otgen render sinkhorn --shape 4096x4096x64 schedule=symmetric fusion=one_sweep
    stabiliser=shifted precision=tf32` prints the symmetric step that takes both sums from one sweep.
    """
    from otgen.render import source

    problem, axes = parse_problem(family, shape, dtype, words)
    text = source(problem, parse_variant(problem, axes, gpu(slug), winner=winner))
    if out is None:
        click.echo(text, nl=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        click.echo(f"wrote {out}", err=True)
