"""The catalogue of mistakes otgen answers for: one class per kind, each message says what was expected, what came, what to type.

Every class carries the exit code the command line ends with (0 success, 1 failure, 2 usage, 3 no valid variant, 130 interrupted).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OtgenError(Exception):
    """Base of every error otgen raises on purpose."""

    exit_code = 1


class UsageError(OtgenError, ValueError):
    """A name, shape or option that does not exist or does not parse."""

    exit_code = 2


class InputError(OtgenError, ValueError):
    """Data that no optimal transport problem can be made of."""

    exit_code = 2


class Unsupported(UsageError, NotImplementedError):
    """What has a meaning, but is not computed: a derivative, most often."""


class ConvergenceWarning(UserWarning):
    """A solve ended before the marginal error asked for was reached, or float32 cannot hold what it reports."""


class NoValidVariant(OtgenError):
    """A problem for which every variant was refused or failed."""

    exit_code = 3


class StoreError(OtgenError):
    """A tuning database that cannot be opened, read or written."""


class CompileError(OtgenError):
    """A variant the compiler refused; ``status`` is its class in the trial vocabulary."""

    def __init__(self, message: str, status: str = "compile_error") -> None:
        super().__init__(message)
        self.status = status


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the `known` ones, with the nearest spelling.

    >>> print(unknown("GPU", "a10", ["a100", "h100"]))
    unknown GPU 'a10'; known: a100, h100. Did you mean 'a100'?
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"unknown {kind} {name!r}; known: {', '.join(names)}.{hint}")
