"""What `static.py` counted, as tables in Markdown: `table` of everything, `summary` of what docs/performance.md shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

COLUMNS = (
    *("step", "gpu", "library", "kernel", "precision", "pick", "sweeps", "slots", "mufu", "fp32", "alu", "shuffle", "shared"),
    *("tensor", "bound", "registers", "spilled_bytes"),
)


UNITS = {"slots": "issue slots", "mufu": "exp2", "bound": "cycles"}


def table(result: Mapping[str, Any]) -> str:
    """Every row."""
    return _markdown(COLUMNS, [[_text(row[name]) for name in COLUMNS] for row in result["rows"]])


def summary(result: Mapping[str, Any]) -> str:
    """Of each step otgen's best, and whether it meets the target; flash-sinkhorn's kernels; the debiased iteration."""
    ours = _grouped((row for row in result["rows"] if row["pick"] in ("winner", "named")), "step", "gpu")
    theirs = _grouped((row for row in result["rows"] if row["library"] != "otgen"), "step", "gpu", "kernel", "precision")
    cost = ("GPU", "mode", "issue slots", "exp2", "bound")
    tables = [_markdown(("otgen, per pair", *cost, "pick", "target", "met"), [_ours(_best(rows)) for rows in ours])]
    if theirs:
        head = ("flash-sinkhorn, per pair", *cost, "kernel", "fewest", "spilled bytes", "default")
        tables.append(_markdown(head, [_beside(*sorted(rows, key=lambda row: row["pick"] == "default")) for rows in theirs]))
    head = ("debiased iteration", "otgen", "target", "met", "flash-sinkhorn")
    tables.append(_markdown(head, [_debiased(slug, found) for slug, found in result["debiased"].items()]))
    return "\n\n".join(tables)


def _grouped(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def _best(rows: Sequence[Row]) -> Row:
    """One that meets the target where there is one, of the fewest issue slots."""
    return min(rows, key=lambda row: (not row.get("met", True), row["slots"]))


def _ours(row: Row) -> list[str]:
    if "target" not in row:
        return [*_cost(row), row["pick"], "none", ""]
    wanted = ", ".join(f"{most:g} {UNITS[unit]}" for unit, most in row["target"].items())
    return [*_cost(row), row["pick"], wanted, _yes(row["met"])]


def _beside(fewest: Row, default: Row) -> list[str]:
    counted = fewest["pick"].removeprefix("fewest ")
    return [*_cost(fewest), fewest["kernel"], counted, str(fewest["spilled_bytes"]), f"{default['slots']:.2f}"]


def _cost(row: Row) -> list[str]:
    return [row["step"], row["gpu"], row["precision"], *(f"{row[name]:.2f}" for name in ("slots", "mufu", "bound"))]


def _debiased(slug: str, found: Row) -> list[str]:
    theirs = f"{found['flash-sinkhorn']:g} sweeps" if "flash-sinkhorn" in found else "not counted"
    launches = f" in {found['launches']} launches" if "launches" in found else ""
    return [slug, f"{found['otgen']:g} sweeps{launches}", f"{found['target']:g} sweeps", _yes(found["met"]), theirs]


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
