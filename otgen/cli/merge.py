"""`otgen merge`: several databases made one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from otgen.store.merge import Conflict, Merged


@click.command()
@click.argument("sources", metavar="A.db B.db...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The database to make.")
@click.option("--force", is_flag=True, help="Replace FILE if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(sources: tuple[Path, ...], out: Path, force: bool, as_json: bool) -> None:
    """Write the union of databases: every fact once, the winners decided anew from all of them.

    Where two of them had decided differently, both rows are printed, the one that won, and why: a measured time comes before a
    predicted one, and of two measured ones the 95 % confidence intervals decide. The databases are only read; FILE appears at
    once, when it is complete. What is compared, and how: docs/sharing.md.
    """
    from otgen.store.merge import merge as unite

    merged = unite(sources, out, replace=force)
    for sentence in merged.refused:
        click.echo(f"otgen: left out {sentence}", err=True)
    if as_json:
        click.echo(json.dumps(_json(merged), indent=1))
        return
    for path, added in merged.added.items():
        click.echo(f"{path}: {added} trials that were in none before it")
    for conflict in merged.conflicts:
        _print(conflict)
    measured = sum(winner.evidence == "measured" for winner in merged.winners)
    click.echo(f"{len(merged.winners)} winners in {out}, {measured} measured; {len(merged.conflicts)} conflicts.")


def _print(conflict: Conflict) -> None:
    click.echo(f"\n{conflict.problem} on {conflict.gpu}, {conflict.precision}:")
    for claim in conflict.claims:
        click.echo(f"  {'taken' if claim.variant == conflict.won else 'left '}  {claim.text}")
    if conflict.won not in {claim.variant for claim in conflict.claims}:
        click.echo(f"  instead: {conflict.won or 'no variant'}")
    click.echo(f"  why: {conflict.why}\n")


def _json(merged: Merged) -> dict[str, Any]:
    return {
        "added": {str(path): count for path, count in merged.added.items()},
        "winners": len(merged.winners),
        "refused": merged.refused,
        "conflicts": [
            {
                "problem": str(conflict.problem),
                "gpu": conflict.gpu,
                "precision": conflict.precision,
                "claims": [asdict(claim) | {"path": str(claim.path)} for claim in conflict.claims],
                "won": conflict.won,
                "why": conflict.why,
            }
            for conflict in merged.conflicts
        ],
    }
