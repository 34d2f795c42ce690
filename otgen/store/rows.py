"""Reading one JSON object that nobody vouches for: every field by name, with its type and its range, and none left over."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any

from otgen.errors import UsageError

FINITE = 1e300
"""Every time lies below this, in the schema too."""

OPEN_ENDED = 1 << 16
"""Characters that open-ended JSON, or a message, may have."""

_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def expected(what: str, got: object) -> UsageError:
    """The error for a value of another kind; what came is shortened."""
    return UsageError(f"expected {what}; got {shortened(got)}")


class Row:
    """The fields of a JSON object. Each method takes one out and raises UsageError unless it is what it has to be."""

    def __init__(self, values: object, what: str) -> None:
        if not isinstance(values, Mapping):
            raise expected(f"{what} as an object", values)
        self._left = dict(values)
        self._what = what

    def take(self, name: str) -> Any:
        if name not in self._left:
            raise expected(f"{self._what} with {name}", list(self._left))
        return self._left.pop(name)

    def text(self, name: str, pattern: str = r".{0,256}") -> str:
        """Printable text that matches `pattern` as a whole; an escape sequence, which a terminal would obey, is not printable."""
        value = self.take(name)
        if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(pattern, value):
            raise expected(f"{name} as printable text like {pattern}", value)
        return value

    def message(self, name: str) -> str:
        """Printable text of several lines."""
        value = self.take(name)
        if not isinstance(value, str) or len(value) > OPEN_ENDED or not value.replace("\n", "").replace("\t", "").isprintable():
            raise expected(f"{name} as at most {OPEN_ENDED} printable characters", value)
        return value

    def integer(self, name: str, least: int, most: int) -> int:
        value = self.take(name)
        if type(value) is not int or not least <= value <= most:
            raise expected(f"{name} as an integer from {least} to {most}", value)
        return value

    def number(self, name: str, least: float, most: float = FINITE) -> float:
        return _number(name, self.take(name), least, most)

    def time(self, name: str) -> float:
        """A time: positive and finite."""
        value = self.number(name, 0.0)
        if not 0.0 < value < FINITE:
            raise expected(f"{name} above zero and finite", value)
        return value

    def maybe(self, name: str) -> bool:
        """Whether there is a value; one that is null is taken out."""
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return False
        return True

    def numbers(self, name: str, most: int) -> tuple[float, ...]:
        values = self.take(name)
        if not isinstance(values, list) or len(values) > most:
            raise expected(f"{name} as a list of at most {most} numbers", values)
        return tuple(_number(f"each of {name}", value, 0.0, FINITE) for value in values)

    def axes(self, name: str) -> dict[str, int | str]:
        """An object of integers and words."""
        values = self.take(name)
        if not isinstance(values, Mapping) or len(values) > 64:
            raise expected(f"{name} as an object of at most 64 integers and words", values)
        for axis, value in values.items():
            word = isinstance(value, str) and _AXIS.fullmatch(value)
            if not _AXIS.fullmatch(axis) or not (word or (type(value) is int and abs(value) < 1 << 31)):
                raise expected(f"{name} as an object of integers and words", {axis: value})
        return dict(values)

    def open_ended(self, name: str) -> dict[str, Any]:
        """Any object of finite numbers, text and lists, not too long."""
        values = self.take(name)
        try:
            length = len(json.dumps(values, allow_nan=False)) if isinstance(values, dict) else OPEN_ENDED + 1
        except (ValueError, RecursionError):
            length = OPEN_ENDED + 1
        if length > OPEN_ENDED:
            raise expected(f"{name} as an object of finite numbers of at most {OPEN_ENDED} characters", values)
        return dict(values)

    def end(self) -> None:
        """Nothing may be left."""
        if self._left:
            raise expected(f"{self._what} without {next(iter(self._left))[:64]!r}", list(self._left))


def _number(name: str, value: object, least: float, most: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:  # NaN fails too
        raise expected(f"{name} as a number from {least:g} to {most:g}", value)
    return float(value) + 0.0  # SQLite has no -0.0: a fact would not equal itself read back
