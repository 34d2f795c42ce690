"""`otgen import`: what somebody sent, put into a database."""

from __future__ import annotations

import json
from pathlib import Path

import click

from otgen.errors import UsageError
from otgen.store import Store, default_path

EXAMPLES = 5
"""How many refused rows are printed."""


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--db", "path", metavar="PATH", type=click.Path(path_type=Path), help="The database to add to; yours by default.")
@click.option("--partial", is_flag=True, help="Take the sound rows of a file that has others too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(file: Path, path: Path | None, partial: bool, as_json: bool) -> None:
    """Add the trials in FILE, written by `otgen export` as json or sqlite, to a database, and decide the winners anew.

    Every row is checked against the declared space first: GPU, family, flags, axes, their values, and whether the variant is legal
    on its GPU. One that fails refuses the whole file, unless --partial. No number can be checked: import from whom you trust.
    """
    from otgen.store.compare import compare
    from otgen.store.reading import is_database, read_database, read_json

    contents = read_database(file, strangers=False) if is_database(file) else read_json(file)
    if contents.refused and not partial:
        others = f" (and {len(contents.refused) - 1} more)" if len(contents.refused) > 1 else ""
        raise UsageError(f"{contents.refused[0]}{others}; nothing was imported; type --partial to take the other rows")
    for sentence in contents.refused[:EXAMPLES]:
        click.echo(f"otgen: left out {sentence}", err=True)
    path = path or default_path()
    with Store.open(path) as store:
        before = store.winners()
        added = store.add(contents.facts.values())
        difference = compare(before, store.winners())
    known = len(contents.facts) - added
    if as_json:
        counts = {"added": added, "known": known, "refused": contents.refused}
        click.echo(json.dumps(counts | {"winners": difference.to_json()}, indent=1))
        return
    click.echo(f"{added} trials added to {path}, {known} were there, {len(contents.refused)} refused.")
    click.echo(f"{len(difference.added)} winners are new, {len(difference.changed)} changed, {len(difference.removed)} went.")
