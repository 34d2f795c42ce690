"""`otgen space`: what a family may vary, and how much of it is legal."""

from __future__ import annotations

import json
from collections import Counter

import click

from otgen.cli.arguments import parse_problem
from otgen.errors import unknown
from otgen.gpus import gpu


@click.command()
@click.argument("family")
@click.argument("words", metavar="[FLAG=VALUE]...", nargs=-1)
@click.option(
    "--shape", default="4096x4096x64", show_default=True, metavar="NxMxD", help="Sizes of the clouds and their dimension."
)
@click.option("--gpu", "slug", default="a100", show_default=True, metavar="SLUG", help="The GPU that says what is legal.")
@click.option("--dtype", default="fp32", show_default=True, help="Storage type of the coordinates.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def space(family: str, words: tuple[str, ...], shape: str, slug: str, dtype: str, as_json: bool) -> None:
    """Print the axes of FAMILY, the size of their product, its legal fraction on a GPU, and why the rest is not.

    The first reason a variant is refused for counts. Refinements, axes that are tried only on top of a variant that did well, are
    not multiplied in: they have their plain value. What axes mean: docs/variants.md.
    """
    from otgen import families
    from otgen.candidates import refusals

    problem, axes = parse_problem(family, shape, dtype, words)
    if axes:
        raise unknown(f"flag of {family}", next(iter(axes)), families.family(family).flags)
    kind, target = families.family(family), gpu(slug)
    values, reasons = kind.axes(problem), Counter[str]()
    for reason, count, _ in refusals(problem, target):
        reasons[reason] += count
    size, legal = reasons.total(), reasons.pop("", 0)
    default = kind.default(problem)
    if as_json:
        facts = {
            "problem": str(problem),
            "gpu": target.slug,
            "axes": values,
            "refinements": list(kind.refinements),
            "default": dict(default),
            "size": size,
            "legal": legal,
        }
        click.echo(json.dumps({**facts, "refused": dict(reasons.most_common())}, indent=1))
        return
    click.echo(f"{problem} on {target.slug}")
    width = max(map(len, values))
    for axis, allowed in values.items():
        choices = " ".join(f"[{value}]" if value == default[axis] else str(value) for value in allowed)
        click.echo(f"  {axis:{width}}  {choices}{'  (refinement)' * (axis in kind.refinements)}")
    click.echo(f"{size:,} variants, {legal:,} legal ({legal / size:.1%}); the default is in brackets. Refused:")
    for reason, count in reasons.most_common():
        click.echo(f"  {count:>{len(f'{size:,}')},}  {reason}")
