"""Facts as text for other programs: JSON that otgen reads again, CSV for a spreadsheet, T4 for other tuners' tools."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from otgen import __version__
from otgen.errors import StoreError
from otgen.store.facts import Fact
from otgen.store.reading import FORMAT, MOST_BYTES, VERSION
from otgen.store.records import ENVIRONMENT

Chosen = Iterable[tuple[Fact, bool]]
"""Facts, and whether each is a winner."""

COLUMNS = (
    *("family", "gpu", "n", "m", "d", "dtype", "flags", "precision", "winner", "evidence", "status", "variant", "template_hash"),
    *(
        "created_at",
        "predicted_us",
        "measured_us",
        "p20_us",
        "p80_us",
        "default_us",
        "error",
        "registers",
        "spills",
        "shared_bytes",
    ),
    *(f"environment_{name}" for name in ENVIRONMENT),
)
"""Of a CSV file; error: the largest accuracy value as a share of its budget."""

INVALIDITY = {
    "ok": "correct",
    "wrong_result": "correctness",
    "compile_error": "compile",
    "timeout": "timeout",
    "pruned": "constraints",
    "resource": "constraints",
    "duplicate": "constraints",
}
"""Status → what T4 calls it; the others are its "runtime"."""

T4_VERSION = "1.0.0"


def as_json(chosen: Chosen) -> str:
    """One line a trial. Raises StoreError where `otgen import` would refuse so long a file."""
    lines = [json.dumps(fact.to_json() | {"winner": winner}, separators=(",", ":"), allow_nan=False) for fact, winner in chosen]
    head = f'{{"format":{json.dumps(FORMAT)},"version":{VERSION},"otgen":{json.dumps(__version__)},"trials":['
    text = head + "".join(f"\n{line}," for line in lines).removesuffix(",") + "\n]}\n"
    if len(text) > MOST_BYTES["json"]:
        raise StoreError(
            f"expected at most {MOST_BYTES['json']:,} bytes of JSON; got {len(text):,}, which `otgen import` would refuse; "
            "choose fewer with --gpu or --family, or type --format sqlite"
        )
    return text


def as_csv(chosen: Chosen) -> str:
    """A table with the columns COLUMNS; flags and variants are JSON."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for fact, winner in chosen:
        writer.writerow({name: _cell(value) for name, value in _flat(fact, winner).items()})
    return file.getvalue()


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _flat(fact: Fact, winner: bool) -> dict[str, Any]:
    trial, problem, measured = fact.trial, fact.trial.problem, fact.measurement
    row: dict[str, Any] = {name: getattr(problem, name) for name in ("family", "n", "m", "d", "dtype")}
    row |= {name: getattr(trial, name) for name in ("gpu", "status", "template_hash")}
    row |= {name: getattr(measured, name) for name in ("p20_us", "p80_us", "default_us")} if measured else {}
    row |= {name: getattr(fact.compiled, name) for name in ("registers", "spills", "shared_bytes")} if fact.compiled else {}
    row |= {f"environment_{name}": fact.environment[name] for name in ENVIRONMENT}
    return row | {
        "flags": json.dumps(dict(problem.flags)),
        "variant": trial.variant.json,
        "precision": trial.variant["precision"],
        "winner": int(winner),
        "evidence": "measured" if measured else "predicted" if fact.prediction else "",
        "created_at": fact.created_at,
        "predicted_us": fact.prediction.us if fact.prediction else None,
        "measured_us": measured.median_us if measured else None,
        "error": max((entry.value / entry.budget for entry in fact.accuracy), default=None),
    }


def as_t4(chosen: Chosen) -> str:
    """The results file of the autotuning community's T4 schema, times in milliseconds.

    A configuration holds the problem beside the variant, for a file may have several. A predicted time is an objective and a
    measurement of its own name, ``predicted_time``, and no runtime.
    Source: results-schema.json, version 1.0.0, of Kernel Tuner and the BAT benchmarks.
    """
    return json.dumps({"schema_version": T4_VERSION, "results": [_result(fact) for fact, _ in chosen]}, indent=1) + "\n"


def _result(fact: Fact) -> dict[str, Any]:
    trial, problem = fact.trial, fact.trial.problem
    configuration = {"family": problem.family, "gpu": trial.gpu, "n": problem.n, "m": problem.m, "d": problem.d}
    measured, predicted = fact.measurement, fact.prediction
    found = [("time", measured.median_us / 1000, "ms")] if measured else []
    found += [("predicted_time", predicted.us / 1000, "ms")] if predicted else []
    if fact.compiled:
        found += [("registers", fact.compiled.registers, ""), ("shared_memory", fact.compiled.shared_bytes, "B")]
    times = {
        "compilation_time": trial.compile_ms or 0.0,
        "runtimes": [us / 1000 for us in measured.samples_us] if measured else [],
        "framework": (trial.render_ms or 0.0) + (trial.predict_ms or 0.0),
        "search_algorithm": 0.0,
        "validation": trial.verify_ms or 0.0,
    }
    return {
        "timestamp": fact.created_at,
        "configuration": {**configuration, "dtype": problem.dtype, **dict(problem.flags), **trial.variant},
        "objectives": ["time" if measured else "predicted_time"] if measured or predicted else [],
        "times": times,
        "invalidity": INVALIDITY.get(trial.status, "runtime"),
        "correctness": float(bool(fact.accuracy) and all(entry.value <= entry.budget for entry in fact.accuracy)),
        "measurements": [{"name": name, "value": value, "unit": unit} for name, value, unit in found],
    }


TEXT: Mapping[str, Callable[[Chosen], str]] = {"json": as_json, "csv": as_csv, "t4": as_t4}
