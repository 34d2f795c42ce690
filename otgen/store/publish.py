"""Files that appear at once and whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from otgen.errors import StoreError
from otgen.store.connect import connect, errors_of, transaction
from otgen.store.facts import Fact
from otgen.store.union import unite


@contextmanager
def new_file(path: Path, *, replace: bool) -> Iterator[Path]:
    """A place to write what then appears at `path`; after an error nothing has.

    Raises StoreError when a file is there already, unless `replace`, when a database there is in use, or when `path` cannot be
    written. Of two that write the same new file at a time, one is refused.
    """
    _refuse(path, replace=replace)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".otgen-") as folder:
            unfinished = Path(folder) / "unfinished"
            yield unfinished
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            _refuse(path, replace=replace)
            if replace:
                os.replace(unfinished, path)
            else:
                _link(unfinished, path)
    except OSError as error:
        raise StoreError(f"expected to write {path}; got: {error.strerror or error}; name another place with -o") from error


def _link(unfinished: Path, path: Path) -> None:
    """Give the file its name, which fails where another has it; file systems without links are asked first and then told."""
    try:
        os.link(unfinished, path)
    except OSError as error:
        if isinstance(error, FileExistsError) or path.exists():
            raise _exists(path) from error
        os.replace(unfinished, path)


def _refuse(path: Path, *, replace: bool) -> None:
    if path.is_dir() or (path.exists() and not replace):
        raise _exists(path)
    for suffix in ("-wal", "-journal"):
        beside = path.with_name(path.name + suffix)
        if beside.exists() and beside.stat().st_size > 0:
            raise StoreError(f"expected no database in use at {path}; found {beside.name}; close what uses it or name another file")


def _exists(path: Path) -> StoreError:
    if path.is_dir():
        return StoreError(f"expected the name of a file; {path} is a folder; name a file in it with -o")
    return StoreError(f"expected no file at {path}; there is one; name another with -o, or replace it with --force")


def write_text(text: str, path: Path, *, replace: bool) -> None:
    """Write a text file; errors as `new_file`."""
    with new_file(path, replace=replace) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_database(facts: Iterable[Fact], path: Path, *, replace: bool) -> None:
    """Write a database of `facts`, given oldest first, and what follows from them: a snapshot, one file, no write-ahead log."""
    with (
        new_file(path, replace=replace) as unfinished,
        errors_of(path),
        closing(connect(unfinished, readonly=False)) as connection,
    ):
        with transaction(connection):
            unite(connection, facts, {})
        connection.execute("PRAGMA journal_mode = DELETE")
