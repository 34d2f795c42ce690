"""`otgen compile`: one variant's machine code for any GPU, with no GPU."""

from __future__ import annotations

from pathlib import Path

import click

from otgen.cli.arguments import parse_problem, parse_variant
from otgen.errors import CompileError, unknown
from otgen.gpus import gpu

EMITS = ("source", "ptx", "cubin", "sass", "hsaco", "amdgcn")


@click.command()
@click.argument("words", metavar="[FLAG=VALUE | AXIS=VALUE]...", nargs=-1)
@click.option("--gpu", "slug", required=True, metavar="SLUG", help="The GPU to compile for.")
@click.option("--family", required=True, metavar="NAME")
@click.option("--shape", required=True, metavar="NxMxD", help="Sizes of the two clouds and their dimension.")
@click.option("--dtype", default="fp32", show_default=True, help="Storage type of the coordinates.")
@click.option("--winner", is_flag=True, help="Compile the stored winner; axes given besides change it.")
@click.option("--emit", default="source", show_default=True, metavar="KIND,...", help=f"What to write: {', '.join(EMITS)}.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory to write to.")
def compile(words: tuple[str, ...], slug: str, family: str, shape: str, dtype: str, winner: bool, emit: str, out: Path) -> None:
    """Compile one variant for a GPU that need not be here, print its resources, and write what --emit names.

    NVIDIA's kernels have ptx, cubin and sass; AMD's have hsaco and amdgcn.
    """
    from otgen.compile import compile_variant
    from otgen.pool import Pool, Role
    from otgen.render import file_name, source
    from otgen.toolchain import listings

    kinds = [kind.strip() for kind in emit.split(",")]
    target = gpu(slug)
    native = {"source", "ptx", "cubin", "sass"} if target.backend == "cuda" else {"source", "hsaco", "amdgcn"}
    for kind in kinds:
        if kind not in native:
            raise unknown(f"output of {target.slug}'s compiler", kind, native)
    problem, axes = parse_problem(family, shape, dtype, words)
    variant = parse_variant(problem, axes, target, winner=winner)
    with Pool(compile=Role(1, limit=300.0, environment={"TRITON_INTERPRET": None})) as pool:
        pool.submit("compile", None, compile_variant, problem, variant, target.slug)
        outcome = pool.next()
    if outcome.status != "ok":
        raise outcome.error if isinstance(outcome.error, CompileError) else CompileError(f"{variant.text}: {outcome.message}")
    text = source(problem, variant)
    stem = Path(file_name(problem, variant, text)).stem
    out.mkdir(parents=True, exist_ok=True)
    if "source" in kinds:
        _write(out / f"{stem}.py", text.encode())
    click.echo(f"{problem} for {target.slug}: {variant.text}")
    for kernel in outcome.value:
        click.echo(
            f"  {kernel.name}: grid {'×'.join(map(str, kernel.grid))}, {kernel.registers} registers, "
            f"{kernel.spills} spilled bytes, {kernel.shared_bytes} bytes of shared memory"
        )
        name = f"{stem}.{target.arch}.{kernel.name}"
        contents = {"ptx": kernel.ptx.encode(), "cubin": kernel.binary, "hsaco": kernel.binary, "amdgcn": kernel.code.encode()}
        if "sass" in kinds:
            contents["sass"] = listings([kernel.binary], target.arch)[0].encode()
        for kind in kinds:
            if kind != "source":
                _write(out / f"{name}.{kind}", contents[kind])


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    click.echo(f"  wrote {path}")
