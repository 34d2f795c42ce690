"""Writes what a module uses of otgen's shared Triton functions into it, so that it needs nothing of otgen to run.

A template imports the shared functions like any module, which keeps it a valid one; its render holds their source instead.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache

from otgen.resources import SHARED

_IMPORT = re.compile(rf"^from otgen\.({'|'.join(path.stem for path in SHARED)}) import .*\n+", re.MULTILINE)


def inlined(text: str) -> str:
    """`text` without what it imports of `SHARED`: the functions it calls, and theirs, stand ahead of its first kernel.

    Their constants follow its own. Raises ValueError when `text` has no such import, or no kernel.
    """
    body = _IMPORT.sub("", text)
    if body == text:
        raise ValueError("expected a line that imports from otgen.blocks; found none")
    constants, functions = _needed(_names(ast.parse(body)))
    first = body.index("@triton.jit\n")
    return body[:first].rstrip() + "\n" + "\n\n\n".join(["\n".join(constants), *functions, body[first:]])


def _needed(mentioned: set[str]) -> tuple[list[str], list[str]]:
    """The constants and the functions behind these names, and behind the names those mention, in the order of `SHARED`."""
    sources, uses = _definitions()
    needed: set[str] = set()
    pending = mentioned & sources.keys()
    while pending:
        name = pending.pop()
        needed.add(name)
        pending |= uses[name] & sources.keys() - needed
    chosen = [text for name, text in sources.items() if name in needed]
    return [text for text in chosen if text[0] != "@"], [text for text in chosen if text[0] == "@"]


@lru_cache
def _definitions() -> tuple[dict[str, str], dict[str, set[str]]]:
    """Of everything that `SHARED` defines, the source and the names it mentions."""
    sources, uses = {}, {}
    for path in SHARED:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                name, first = node.name, node.decorator_list[0].lineno
            elif isinstance(node, ast.Assign):
                name, first = ast.unparse(node.targets[0]), node.lineno
            else:
                continue
            sources[name] = "\n".join(lines[first - 1 : node.end_lineno])
            uses[name] = _names(node)
    return sources, uses


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
