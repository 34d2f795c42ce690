"""`otgen diff`: what became of the winners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from otgen.errors import StoreError, UsageError

if TYPE_CHECKING:
    from otgen.store import Winner
    from otgen.store.compare import Difference

DIFFERENT = 1


@click.command()
@click.argument("first", metavar="A.db", type=click.Path(path_type=Path))
@click.argument("second", metavar="B.db", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def diff(context: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """List the winners that B has and A has not (+), that A has and B has not (-), and that changed (~).

    Compared are the variant, the evidence, the times and the template. Exit code 0: alike, 1: different, 2: a file cannot be read.
    """
    from otgen.store.compare import compare

    difference = compare(_winners(first), _winners(second))
    if as_json:
        click.echo(json.dumps(difference.to_json(), indent=1))
    else:
        _print(difference)
    if difference:
        context.exit(DIFFERENT)


def _winners(path: Path) -> list[Winner]:
    from otgen.store.reading import opened
    from otgen.store.winners import select

    try:
        with opened(path) as connection:
            return select(connection, path, {}, lambda sentence: click.echo(f"otgen: {sentence}", err=True))
    except StoreError as error:
        raise UsageError(str(error)) from error


def _print(difference: Difference) -> None:
    for sign, winners in (("-", difference.removed), ("+", difference.added)):
        for winner in winners:
            click.echo(f"{sign} {_title(winner)}: {winner.us:.4g} µs {winner.evidence}, {winner.variant.text}")
    for old, new in difference.changed:
        click.echo(f"~ {_title(old)}: {'; '.join(_changes(old, new))}")
    click.echo(
        f"{len(difference.added)} added, {len(difference.removed)} removed, {len(difference.changed)} changed, "
        f"{difference.same} the same"
    )


def _title(winner: Winner) -> str:
    return f"{winner.problem} {winner.gpu} {winner.precision}"


def _changes(old: Winner, new: Winner) -> list[str]:
    axes = [axis for axis in {**old.variant, **new.variant} if old.variant.get(axis) != new.variant.get(axis)]
    words = [f"{axis} {old.variant.get(axis, 'none')} → {new.variant.get(axis, 'none')}" for axis in axes]
    if (old.us, old.evidence) != (new.us, new.evidence):
        words.append(f"{old.us:.4g} µs {old.evidence} → {new.us:.4g} µs {new.evidence}")
    elif old.predicted_us != new.predicted_us:
        words.append("another prediction")
    if old.template_hash != new.template_hash:
        words.append(f"template {old.template_hash} → {new.template_hash}")
    return words
