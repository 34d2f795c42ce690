"""What the compiler made of a kernel: the instructions of its pair loop, counted per execution unit.

Reads the text of nvdisasm or ``cuobjdump -sass`` (NVIDIA) or of LLVM's amdgcn assembler (AMD), rebuilds the control flow, finds the
natural loops, and keeps those that visit pairs: the innermost ones that hold an exp2 per pair, be it one instruction or the
polynomial of `otgen.blocks.exp2_by_fma`. Loops inside them that the compiler
left rolled (over the coordinates, over width blocks) are multiplied by the trip counts the caller knows.

Of several pair loops, those with a running maximum are dropped when one without exists: they are the redo of a shifted kernel,
which runs only after an overflow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

from otgen.errors import CompileError

FRAGMENT = 4
"""Accumulator elements per lane of the smallest matrix instruction: a tile with fewer is computed by several warps at once."""


class Instruction(NamedTuple):
    """One instruction: `address` orders and names it, `opcode` carries its modifiers, `target` is where a branch goes."""

    address: int
    opcode: str
    operands: str
    conditional: bool
    target: int | None


@dataclass(frozen=True, slots=True)
class Mix:
    """Warp instructions of one tile iteration, per unit.

    slots      instructions that take an issue slot: all but NOP (AMD: vector ones only; the others issue beside them)
    mufu       exp2, log2, reciprocal, and conversions that share their unit
    fp32       multiply-add pipe, integer multiply-add included; a packed pair counts twice
    alu        integer, logic, compare, select, min, max, packing
    shared     128-byte accesses to shared or tensor memory: LDS.128 counts 4; bank conflicts are not seen
    shuffle    warp shuffles
    tensor     matrix instructions
    memory     global loads, stores, atomics
    spills     loads and stores of spilled registers
    maxima     min/max instructions on floats (a running maximum has one per pair or so)
    unroll     tile iterations per trip of the compiled loop; the counts above are already divided by it
    """

    slots: float = 0.0
    mufu: float = 0.0
    fp32: float = 0.0
    alu: float = 0.0
    shared: float = 0.0
    shuffle: float = 0.0
    tensor: float = 0.0
    memory: float = 0.0
    spills: float = 0.0
    maxima: float = 0.0
    unroll: int = 1

    def per_pair(self, pairs_per_lane: float) -> dict[str, float]:
        """Lane instructions per pair and unit; `pairs_per_lane` = BLOCK_M·BLOCK_N / (warp size · warps).

        ``slots`` here is what DESIGN's table calls issue slots per pair: warp instructions × 32 ÷ pairs of a warp.
        """
        return {unit: getattr(self, unit) / pairs_per_lane for unit in COUNTS}


COUNTS = tuple(field.name for field in fields(Mix) if field.name != "unroll")


def average(mixes: Sequence[Mix]) -> Mix:
    """The mean of several loops of one launch whose programs each run one of them, in equal parts."""
    return Mix(**{unit: sum(getattr(mix, unit) for mix in mixes) / len(mixes) for unit in COUNTS})


def hot_loops(text: str, *, pairs_per_lane: float, inner_trips: Sequence[int] = ()) -> tuple[Mix, ...]:
    """One Mix per pair loop of a kernel, in program order: usually one, two when a launch holds a row sweep and a column sweep.

    text            one kernel as ``cuobjdump -sass`` or ``nvdisasm`` prints it, or amdgcn assembly
    pairs_per_lane  BLOCK_M·BLOCK_N / (warp size · warps): one exp2 each, which tells how often the compiler unrolled the loop. A
                    running maximum may need up to one more exp2 per pair to rescale: there, two per pair are not yet an unrolling
    inner_trips     trip counts of the loops inside the pair loop, in program order, one for each that may have stayed rolled. When
                    the compiler unrolled some and not others, those left take the largest count: too slow rather than too fast

    Raises CompileError when the text holds no instructions, no pair loop, or a rolled inner loop whose trip count was not given.
    """
    code = parse(text)
    loops = _natural_loops(code)
    expected = max(pairs_per_lane, FRAGMENT)
    exponentials = [_exponentials(code, body) for body in loops]
    found = []
    for body, count in zip(loops, exponentials):
        inner = [other for other in loops if other < body]
        if 2 * count < expected or any(_exponentials(code, other) for other in inner):
            continue
        running = 4 * _maxima(code, body) >= expected
        unroll = max(1, int(count / expected / (2 if running else 1) + 0.1))
        found.append(_mix(code, body, _repeats(code, inner, inner_trips), unroll))
    if not found:
        most = max(exponentials, default=0)
        raise CompileError(
            f"expected a loop with {expected:g} exp2 per lane; the kernel's largest holds {most}; check pairs_per_lane"
        )
    plain = [mix for mix in found if 4 * mix.maxima < expected]
    return tuple(plain or found)


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel, in order. Raises CompileError when there are none."""
    code = _parse_sass(text) or _parse_amdgcn(text)
    if not code:
        raise CompileError(
            "expected the text of cuobjdump, nvdisasm or amdgcn assembly; got no instruction in it; compile the kernel again"
        )
    return code


_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.MULTILINE)
_SASS_TARGET = re.compile(r"(?:^|[\s,`(])0x([0-9a-f]+)\)?\s*$")


def _parse_sass(text: str) -> list[Instruction]:
    code = []
    for address, predicate, opcode, operands in _SASS.findall(text):
        target = _SASS_TARGET.search(operands) if opcode.startswith(("BRA", "CALL", "JMP")) else None
        conditional = bool(predicate) or "," in operands or opcode.startswith("CALL")
        code.append(Instruction(int(address, 16), opcode, operands, conditional, int(target[1], 16) if target else None))
    return code


_GCN_LABEL = re.compile(r"^(\.?\w+):")
_GCN = re.compile(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")


def _parse_amdgcn(text: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := _GCN.match(line):
            lines.append((instruction[1], instruction[2].strip()))
    code = []
    for address, (opcode, operands) in enumerate(lines):
        branch = opcode.startswith(("s_cbranch", "s_branch"))
        code.append(
            Instruction(address, opcode, operands, opcode.startswith("s_cbranch"), labels.get(operands) if branch else None)
        )
    return code


def _natural_loops(code: list[Instruction]) -> list[frozenset[int]]:
    """The loops of the control flow, each as a set of indices into `code`, ordered by first instruction.

    Code placed out of line (a wait retried behind the kernel's exit) belongs to the loop it returns to and makes none of its own.
    """
    at = {instruction.address: index for index, instruction in enumerate(code)}
    successors = [_successors(code, at, index) for index in range(len(code))]
    leaders = {0} | {s for index, following in enumerate(successors) if following != [index + 1] for s in (*following, index + 1)}
    starts = sorted(leader for leader in leaders if leader < len(code))
    block_of = {start: number for number, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    graph = [[block_of[s] for s in successors[end - 1] if s in block_of] for end in ends]
    predecessors: list[list[int]] = [[] for _ in graph]
    for block, following in enumerate(graph):
        for successor in following:
            predecessors[successor].append(block)
    dominators = _dominators(graph, predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(graph):
        for head in following:
            if head in dominators.get(block, ()):
                body = bodies.setdefault(head, {head})
                pending = [block]
                while pending:
                    member = pending.pop()
                    if member not in body:
                        body.add(member)
                        pending += [p for p in predecessors[member] if p in dominators]
    return [frozenset(index for block in body for index in range(starts[block], ends[block])) for _, body in sorted(bodies.items())]


def _successors(code: list[Instruction], at: dict[int, int], index: int) -> list[int]:
    """Indices that may run after instruction `index`; a call may continue behind itself or, used as a jump, at its target."""
    instruction = code[index]
    following = [index + 1]
    if instruction.target is not None:
        return [*(following if instruction.conditional else []), *([at[instruction.target]] if instruction.target in at else [])]
    ends = instruction.opcode.startswith(("EXIT", "RET", "s_endpgm")) and not instruction.conditional
    return [] if ends or index + 1 == len(code) else following


def _dominators(graph: list[list[int]], predecessors: list[list[int]]) -> dict[int, set[int]]:
    """For each block reachable from block 0, the blocks that every path to it passes through."""
    order: list[int] = []
    seen = {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(graph[0]))]
    while stack:
        block, following = stack[-1]
        step = next((s for s in following if s not in seen), None)
        if step is None:
            order.append(stack.pop()[0])
        else:
            seen.add(step)
            stack.append((step, iter(graph[step])))
    dominators: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            found = {block} | set.intersection(*(dominators[p] for p in predecessors[block] if p in dominators))
            if dominators.get(block) != found:
                dominators[block] = found
                changed = True
    return dominators


def _exponentials(code: list[Instruction], body: frozenset[int]) -> int:
    """exp2 of both kinds. A polynomial has one addition that rounds to an integer."""
    return sum(code[index].opcode.startswith(("MUFU.EX2", "v_exp_f32")) or _is_rounding(code[index]) for index in body)


def _is_rounding(instruction: Instruction) -> bool:
    return bool(_ADDITION.match(instruction.opcode) and _ROUNDING.search(instruction.operands))


def _maxima(code: list[Instruction], body: frozenset[int]) -> int:
    """Comparisons of floats; none in a loop of polynomials, whose ranges they are: a running maximum has no polynomials."""
    polynomials = any(_is_rounding(code[index]) for index in body)
    return 0 if polynomials else sum(bool(_MAXIMUM.match(code[index].opcode)) for index in body)


def _repeats(code: list[Instruction], inner: list[frozenset[int]], trips: Sequence[int]) -> list[tuple[frozenset[int], int]]:
    """The loops inside a pair loop with their trip counts; a loop that only waits for a barrier runs once."""
    working = [
        body for body in inner if any(_unit(code[index].opcode)[0] in ("fp32", "tensor", "shared", "memory") for index in body)
    ]
    if working and not trips:
        raise CompileError(
            f"expected no rolled loop inside the pair loop; got {len(working)}; pass their trip counts as inner_trips"
        )
    counts = trips if len(trips) == len(working) else [max(trips, default=1)] * len(working)
    return list(zip(working, counts))


def _mix(code: list[Instruction], body: frozenset[int], repeats: list[tuple[frozenset[int], int]], unroll: int) -> Mix:
    counts = dict.fromkeys(COUNTS, 0.0)
    for index in body:
        opcode = code[index].opcode
        weight = 1.0 / unroll
        for loop, trips in repeats:
            weight *= trips if index in loop else 1
        unit, work = _unit(opcode)
        if unit:
            counts[unit] += weight * work
        if opcode[0].isupper() or opcode.startswith("v_"):
            counts["slots"] += weight * (not opcode.startswith(("NOP", "v_nop")))
    counts["maxima"] = _maxima(code, body) / unroll
    return Mix(**counts, unroll=unroll)


_MAXIMUM = re.compile(r"FMNMX|v_(pk_)?(max|min)3?_f32|v_maximum3?_f32")

_ADDITION = re.compile(r"FADD|v_(pk_)?(add|sub|subrev)_f32")
_ROUNDING = re.compile(r"(?<![-\d])(12582912|0x4b400000)\b")
"""1.5·2²³, which is added to round and subtracted to get what was rounded: `blocks.ROUNDING`."""

_UNITS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (unit, re.compile(pattern))
    for unit, pattern in (
        ("tensor", r"[HIQODB]?MMA\b|[HQI]GMMA|UTC\w*MMA|v_s?mfma_"),
        ("mufu", r"MUFU|F2F\b|F2I\b|I2F\b|FRND|POPC|FLO|v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        ("shuffle", r"SHFL|C?REDUX|ds_b?permute|ds_swizzle"),
        ("spills", r"LDL|STL|scratch_"),
        ("shared", r"LDS\b|STS\b|LDSM|STSM|LDGSTS|ATOMS|LDTM|STTM|ds_"),
        ("memory", r"LDG\b|STG|LD\b|ST\b|RED|ATOM|UTMALDG|UTMASTG|UBLKCP|global_|buffer_|flat_"),
        (
            "fp32",
            r"FFMA|FADD|FMUL|HFMA|HADD|HMUL|D(FMA|ADD|MUL)|IMAD|IMUL|v_(pk_)?(fma|fmac|mad|mac|add|sub|mul)_(legacy_)?f(32|16)",
        ),
        (
            "",
            r"U|BRA|BSSY|BSYNC|BREAK|CALL|RET\b|EXIT|NOP|BAR|DEPBAR|LDGDEPBAR|WARP|SYNCS|FENCE|MEMBAR|LDC|R2UR|NANOSLEEP|YIELD|s_|v_nop",
        ),
        ("alu", r"[A-Z]|v_"),
    )
)


@lru_cache(maxsize=4096)
def _unit(opcode: str) -> tuple[str, int]:
    """The unit an opcode occupies ("" for those that take an issue slot only) and for how many times its shortest stay."""
    unit = next((unit for unit, pattern in _UNITS if pattern.match(opcode)), "")
    if unit == "fp32":
        return unit, 2 if re.match(r"F\w+2\b|v_pk_\w+_f32", opcode) else 1
    if unit == "shared":
        return unit, _shared_width(opcode)
    return unit, 1


def _shared_width(opcode: str) -> int:
    """128-byte accesses one warp instruction makes, from the width in its modifiers."""
    if amd := re.match(r"ds_\w+?(2?)(?:st64)?_b(\d+)", opcode):
        return max(1, int(amd[2]) // 16) * (2 if amd[1] else 1)
    if tensor_memory := re.search(r"\.x(\d+)$", opcode):
        return int(tensor_memory[1])
    widths = {"64": 2, "128": 4, "2": 2, "4": 4}
    return next((widths[part] for part in opcode.split(".")[:0:-1] if part in widths), 1)
