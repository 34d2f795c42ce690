"""What two lists of winners have in common, and what not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from otgen.store.records import Winner

FIELDS = ("variant", "evidence", "measured_us", "predicted_us", "template_hash")
"""What may change of a winner."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Winners that only the second list has, that only the first has, that both have and not alike; how many are alike."""

    added: Sequence[Winner]
    removed: Sequence[Winner]
    changed: Sequence[tuple[Winner, Winner]]
    same: int

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def to_json(self) -> dict[str, Any]:
        """As `otgen diff --json` prints it."""
        pairs = [{"fields": changes(old, new), "before": old.to_json(), "after": new.to_json()} for old, new in self.changed]
        return {
            "added": [winner.to_json() for winner in self.added],
            "removed": [winner.to_json() for winner in self.removed],
            "changed": pairs,
            "same": self.same,
        }


def changes(old: Winner, new: Winner) -> list[str]:
    """The fields, of FIELDS, in which two winners of one problem differ."""
    return [name for name in FIELDS if getattr(old, name) != getattr(new, name)]


def compare(first: Iterable[Winner], second: Iterable[Winner]) -> Difference:
    """The difference between two lists of winners, each problem, GPU and precision mode for itself."""
    before, after = {winner.key: winner for winner in first}, {winner.key: winner for winner in second}
    both = [(before[key], after[key]) for key in before if key in after]
    changed = [(old, new) for old, new in both if changes(old, new)]
    return Difference(
        [winner for key, winner in after.items() if key not in before],
        [winner for key, winner in before.items() if key not in after],
        changed,
        len(both) - len(changed),
    )
