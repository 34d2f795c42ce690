"""How rows get into the tables of facts. Every function runs inside the transaction the caller has opened."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from otgen.errors import StoreError
from otgen.store.records import ENVIRONMENT, Accuracy, Measurement, Prediction


def insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any], *, conflict: str = "ABORT") -> int:
    """The id of the new row; table and columns are names of the schema, never data."""
    columns, places = ", ".join(row), ", ".join(f":{column}" for column in row)
    cursor = connection.execute(f"INSERT OR {conflict} INTO {table} ({columns}) VALUES ({places})", row)
    return cursor.lastrowid or 0


def environment_id(connection: sqlite3.Connection, facts: Mapping[str, str]) -> int:
    """The id of the environment with these facts, inserted when new; one left out is empty."""
    row = {name: facts.get(name, "") for name in ENVIRONMENT}
    insert(connection, "environment", row, conflict="IGNORE")
    where = " AND ".join(f"{name} = :{name}" for name in ENVIRONMENT)
    return int(connection.execute(f"SELECT id FROM environment WHERE {where}", row).fetchone()[0])


def insert_learnt(
    connection: sqlite3.Connection,
    trial: int,
    prediction: Prediction | None,
    measurement: Measurement | None,
    accuracy: Iterable[Accuracy],
) -> None:
    """What was learnt of the trial of this id; an accuracy that is not finite is stored as NULL."""
    if prediction:
        insert(connection, "prediction", {"trial": trial, "us": prediction.us, "terms": as_json(prediction.terms)})
    if measurement:
        values = asdict(measurement) | {"samples_us": as_json(list(measurement.samples_us))}
        insert(connection, "measurement", {"trial": trial} | values)
    for entry in accuracy:
        value = entry.value if isfinite(entry.value) else None
        insert(connection, "accuracy", {"trial": trial, "metric": entry.metric, "value": value, "budget": entry.budget})


def as_json(value: Any) -> str:
    """Raises StoreError for a number that is not finite."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise StoreError(f"expected finite numbers to store; got {value!r}; report this as a bug of otgen") from error
