"""The tuning database: facts that are only ever inserted, and the decisions (winners) recomputed from them.

Reading needs the standard library alone; sqlite_utils is imported when a file has to be created or migrated.
"""

from otgen.store.connect import default_path
from otgen.store.database import Store
from otgen.store.decide import RESOLUTION
from otgen.store.records import (
    EVIDENCE,
    STATUSES,
    Accuracy,
    Compiled,
    Measurement,
    PastTrial,
    Prediction,
    StoredTrial,
    Trial,
    TuningWarning,
    Winner,
)
from otgen.store.winners import overlay, read_winners, shipped

__all__ = [
    "EVIDENCE",
    "RESOLUTION",
    "STATUSES",
    "Accuracy",
    "Compiled",
    "Measurement",
    "PastTrial",
    "Prediction",
    "Store",
    "StoredTrial",
    "Trial",
    "TuningWarning",
    "Winner",
    "default_path",
    "overlay",
    "read_winners",
    "shipped",
]
