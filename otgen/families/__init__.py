"""Every kernel family, by name. A new family is a template, a module here, a test, and one line below."""

from __future__ import annotations

from otgen.errors import unknown
from otgen.families import hvp, loop, sinkhorn, transport
from otgen.problem import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (sinkhorn, transport, hvp, loop)}


def family(name: str) -> Family:
    """The family called `name`. Raises UsageError for an unknown one."""
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return FAMILIES[name]
