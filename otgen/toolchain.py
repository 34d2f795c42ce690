"""The tools in Triton's wheel: the assembler's release, what a cubin needs, and the text of its instructions."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from otgen.errors import CompileError


def _run(tool: str, *arguments: str | Path) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def ptxas_version() -> str:
    """The release of the assembler, for instance ``12.8.93``."""
    match = re.search(r"V(\d[\d.]*)", _run("ptxas", "--version"))
    return match[1] if match else ""


def registers(cubin: bytes) -> int:
    """Registers per thread of the one kernel in `cubin`. Raises CompileError when the tool does not tell."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = _run("cuobjdump", "-res-usage", Path(file.name))
    match = re.search(r"REG:(\d+)", report)
    if match is None:
        raise CompileError("expected REG: in the report of cuobjdump -res-usage; found none", "crashed")
    return int(match[1])


def listings(cubins: Sequence[bytes], arch: int | str) -> list[str]:
    """The instructions of each cubin's one kernel as nvdisasm prints them, a line ``/*address*/ opcode operands ;`` each.

    The disassembler takes a quarter of a second to start and next to nothing to read: all kernels go through it as one image.
    Their addresses count on from one kernel to the next, branch targets with them.
    arch  compute capability × 10, for instance 90
    """
    if not cubins:
        return []
    codes = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        lines = _run("nvdisasm", "--no-dataflow", "--binary", _machine(arch), Path(file.name)).splitlines()
    ends = [sum(map(len, codes[: number + 1])) for number in range(len(codes))]
    found: list[list[str]] = [[] for _ in codes]
    kernel = 0
    for line in lines:
        address = _ADDRESS.match(line)
        if address:
            while int(address[1], 16) >= ends[kernel]:
                kernel += 1
            found[kernel].append(line)
    return ["\n".join(own) + "\n" for own in found]


def _machine(arch: int | str) -> str:
    """The name nvdisasm knows an architecture by; from 90 on Triton compiles for the one with its own features."""
    return f"SM{arch}a" if int(arch) >= 90 else f"SM{arch}"


_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+\S")


def _text(cubin: bytes) -> bytes:
    """The machine code of the one kernel in a cubin: the section ``.text.<name>`` of a 64-bit little-endian ELF file."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<II16xQQ", cubin, start + number * size) for number in range(count)]
    _, _, strings, _ = headers[names]
    for name, _, offset, length in headers:
        if cubin.startswith(b".text.", strings + name):
            return cubin[offset : offset + length]
    raise CompileError("expected a kernel in the cubin; found none", "crashed")
