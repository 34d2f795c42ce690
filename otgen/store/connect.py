"""Connections to tuning databases, and the one place where SQLite's errors become otgen's."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from otgen.errors import StoreError
from otgen.store import schema

BUSY_SECONDS = 10.0
"""How long a writer waits for another one."""


def places() -> dict[str, Path | None]:
    """Where the user's database is looked for, first to last → the file it would be; None for what is not set."""
    chosen, home = os.environ.get("OTGEN_DB"), os.environ.get("XDG_DATA_HOME")
    inside = Path("otgen") / "tuning.db"
    return {
        "$OTGEN_DB": Path(chosen).expanduser() if chosen else None,
        "$XDG_DATA_HOME": Path(home) / inside if home else None,
        "~/.local/share": Path.home() / ".local" / "share" / inside,
    }


def default_path() -> Path:
    """The user's database: ``$OTGEN_DB``, else ``otgen/tuning.db`` in the user's data directory."""
    return next(place for place in places().values() if place is not None)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn SQLite's exceptions about `path` into StoreError: what was expected, what came, what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(_sentence(path, str(error))) from error


def _sentence(path: Path, text: str) -> str:
    if "not a database" in text or "malformed" in text:
        return f"expected an otgen tuning database; {path} is corrupt ({text}); move it away or name another file with --db"
    if "locked" in text:
        return (
            f"expected {path} to be free within {BUSY_SECONDS:g} s; another process holds it ({text}); "
            "wait for that one to end or name another file with --db"
        )
    if "readonly" in text or "unable to open" in text:
        return f"expected a database that can be written at {path}; got: {text}; name another file with --db or set OTGEN_DB"
    if "constraint failed" in text:
        return (
            f"expected a row that meets the schema of {path}; got: {text}; nothing of it was stored; report this as a bug of otgen"
        )
    return f"expected to read and write {path}; got: {text}; check the disk, or name another file with --db"


def connect(path: Path, *, readonly: bool) -> sqlite3.Connection:
    """A connection in autocommit mode to a database whose schema this version knows.

    Writable: missing folders and files are created, pending migrations applied, the journal is a write-ahead log.
    Read-only: a snapshot is opened as immutable, so that it may lie on a read-only file system.
    Raises StoreError when there is no such file (read-only), or it cannot be opened, is corrupt, locked, foreign or newer.
    """
    return _open_readonly(path) if readonly else _open_writable(path)


@contextmanager
def still(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection that leaves no file beside `path`: for whoever reads all of a database once.

    Raises StoreError as `connect` does, SQLite's errors among them, and when the file was written to meanwhile.
    """
    if not path.is_file():
        raise _missing(path)
    before = _state(path)
    with errors_of(path), closing(_open_readonly(path, "&immutable=1" if not before[-1] else _immutable(path))) as connection:
        yield connection
        if not before[-1] and _state(path) != before:
            raise StoreError(f"expected {path} to stay as it is while it is read; another process wrote to it; run this again")


def _state(path: Path) -> tuple[int, int, bool]:
    """When the file was last written, its size, and whether a write-ahead log has more to say."""
    log = path.with_name(f"{path.name}-wal")
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size, log.exists() and log.stat().st_size > 0


def _missing(path: Path) -> StoreError:
    return StoreError(f"expected a tuning database at {path}; found no file; create it with `otgen tune --gpu … --db {path}`")


def _open_readonly(path: Path, immutable: str | None = None) -> sqlite3.Connection:
    if not path.is_file():
        raise _missing(path)
    immutable = _immutable(path) if immutable is None else immutable
    with errors_of(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{immutable}", uri=True, isolation_level=None)
        with _closed_on_error(connection):
            connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
            missing = schema.pending(connection, path)
            if missing:
                raise StoreError(
                    f"expected a database of schema {missing[-1]}; {path} is older or empty; open it once with `otgen tune`"
                )
    return connection


def _immutable(path: Path) -> str:
    """``&immutable=1`` unless a writer may be at work: the file is in write-ahead mode and its folder can be written."""
    try:
        with path.open("rb") as file:
            write_ahead = file.read(19)[18:] == b"\x02"
    except OSError as error:
        raise StoreError(f"expected a readable database at {path}; got: {error}; name another file with --db") from error
    return "" if write_ahead and os.access(path.parent, os.W_OK) else "&immutable=1"


def _open_writable(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"expected a folder that can be written for {path}; got: {error}; name another with --db or OTGEN_DB"
        ) from error
    with errors_of(path):
        connection = sqlite3.connect(path, isolation_level=None)
        with _closed_on_error(connection):
            connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
            schema.pending(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            with transaction(connection):
                if schema.pending(connection, path):
                    schema.migrate(connection)
    return connection


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One write transaction: the lock is taken at the start, everything or nothing is kept."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
