"""A variant that a caller names for some launches, in one thread, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from otgen.problem import Value, Variant

Override: TypeAlias = tuple[str, tuple[tuple[str, Value], ...], Variant]
"""A family, the flags of its launches but for their batch, and the variant that these take."""

_PRESENT: ContextVar[Override | None] = ContextVar("override", default=None)


@contextmanager
def override(present: Override | None) -> Iterator[None]:
    """Within it those launches take the variant, whatever is pinned or tuned; None: all take what dispatch chooses."""
    token = _PRESENT.set(present)
    try:
        yield
    finally:
        _PRESENT.reset(token)


def variant_of(family: str, flags: tuple[tuple[str, Value], ...]) -> Variant | None:
    """The variant these launches are to take; None when dispatch is to choose."""
    present = _PRESENT.get()
    return present[2] if present is not None and present[:2] == (family, flags) else None
