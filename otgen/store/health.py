"""What is right and wrong with a database file, without changing it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from otgen.errors import StoreError
from otgen.store.connect import still
from otgen.store.reading import foreign_objects
from otgen.store.records import Winner
from otgen.store.winners import select

NETWORK = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "davfs", "gluster", "gpfs", "lustre", "ncpfs", "nfs", "pvfs", "smb"),
    *("fuse.ceph", "fuse.davfs", "fuse.gcs", "fuse.gluster", "fuse.juicefs", "fuse.rclone", "fuse.s3", "fuse.ssh"),
)
"""How the types of file systems begin whose files several machines may have open."""

MOUNTS = Path("/proc/self/mountinfo")

_TOOLS = """
SELECT v.otgen, v.triton, v.ptxas, count(*)
FROM winner w JOIN trial t ON t.id = w.trial JOIN environment v ON v.id = t.environment GROUP BY 1, 2, 3
"""


@dataclass(slots=True)
class Health:
    """What was found of a file.

    file_system  its type, "" where that is not known;  journal  "wal" or "rollback";  integrity  "ok", or SQLite's first complaint
    stale        winners of another template than the present one
    versions     (otgen, triton, ptxas) → the winners found with them
    broken, warnings  sentences
    """

    path: Path
    file_system: str = ""
    journal: str = ""
    integrity: str = ""
    trials: int = 0
    winners: int = 0
    measured: int = 0
    stale: int = 0
    versions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine(path: Path, here: Mapping[str, str], stale: Callable[[Winner], bool]) -> Health:
    """Look at the database at `path`; here: the versions of otgen, triton and ptxas in this environment, "" for an unknown one."""
    health = Health(path, file_system_of(path))
    if health.file_system.startswith(NETWORK):
        health.warnings.append(
            f"it lies on a network file system ({health.file_system}), where SQLite's locks may fail and write-ahead logs do not "
            "work between machines; set OTGEN_DB to a local file and share with `otgen export`"
        )
    try:
        with still(path) as connection:
            with path.open("rb") as file:
                health.journal = "wal" if file.read(19)[18:] == b"\x02" else "rollback"
            _read(connection, health, stale)
    except (StoreError, OSError) as error:
        health.broken.append(str(error))
    _weigh(health, here)
    return health


def _read(connection: sqlite3.Connection, health: Health, stale: Callable[[Winner], bool]) -> None:
    foreign = foreign_objects(connection)
    if foreign:
        health.broken.append(f"it holds {foreign[0]}, which otgen never makes; export what you need and start a new file")
        return
    (health.integrity,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if health.integrity != "ok":
        health.broken.append(f"its integrity check fails ({health.integrity}); move it away, keep a copy, and tune again")
        return
    (health.trials,) = connection.execute("SELECT count(*) FROM trial").fetchone()
    winners = select(connection, health.path, {}, health.warnings.append)
    health.winners, health.stale = len(winners), sum(map(stale, winners))
    health.measured = sum(winner.evidence == "measured" for winner in winners)
    health.versions.update({(otgen, triton, ptxas): count for otgen, triton, ptxas, count in connection.execute(_TOOLS)})


def _weigh(health: Health, here: Mapping[str, str]) -> None:
    if health.stale:
        health.warnings.append(
            f"{health.stale} of {health.winners} winners are stale: tuned on another template and not used until `otgen tune` "
            "carries them over or tries anew"
        )
    for place, tool in enumerate(("otgen", "triton", "ptxas")):
        others = Counter[str]()
        for versions, count in health.versions.items():
            if here.get(tool) and versions[place] and versions[place] != here[tool]:
                others[versions[place]] += count
        for version, count in others.items():
            health.warnings.append(f"{count} winners were found with {tool} {version}; here it is {here[tool]}")


def file_system_of(path: Path) -> str:
    """The type of the file system that `path` lies or would lie on, as Linux names it; "" elsewhere."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    place, best, kind = path.resolve(), -1, ""
    for line in lines:
        mount, _, source = line.partition(" - ")
        fields = mount.split()
        if len(fields) < 5 or not source:
            continue
        folder = Path(fields[4].replace("\\040", " "))
        if (folder == place or folder in place.parents) and len(folder.parts) >= best:
            best, kind = len(folder.parts), source.split()[0]
    return kind
