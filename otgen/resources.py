"""Where templates/ and tuning_db/ are: inside the package (a wheel) or beside it (a checkout, an editable install)."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from otgen.errors import OtgenError

PACKAGE = Path(__file__).parent

SHARED = tuple(PACKAGE / name for name in ("blocks.py", "packing.py", "shares.py"))
"""The modules of Triton functions that rendered kernels share; one may use those before it."""


@lru_cache
def resource(folder: str) -> Path:
    """The directory `folder`, looked for beside the package first, so that a checkout never reads a stale copy.

    Raises OtgenError when neither place has it.
    """
    for place in (PACKAGE.parent / folder, PACKAGE / folder):
        if place.is_dir():
            return place
    raise OtgenError(f"expected {folder}/ in or beside {PACKAGE}; found neither; reinstall otgen")


@lru_cache
def template_hash(family: str) -> str:
    """Twelve hex digits of the sources a kernel of `family` is made of: its template, in parts, and the shared functions."""
    digest = hashlib.sha256()
    folder = resource("templates")
    template = folder / f"{family}.py.jinja"
    for part in (template, *(folder / name for name in _INCLUDE.findall(template.read_text())), *SHARED):
        digest.update(part.read_bytes())
    return digest.hexdigest()[:12]


_INCLUDE = re.compile(r'^ *#: include "(.+)"$', re.MULTILINE)
