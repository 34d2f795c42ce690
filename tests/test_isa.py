"""Reading machine code: loops from branches, counts per unit, and one kernel fresh from the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from otgen import isa
from otgen.errors import CompileError
from otgen.isa import Mix, average, hot_loops


def sass(*lines: str) -> str:
    """A listing as cuobjdump prints it, one instruction every 16 bytes; ``{name}:`` marks the address ``{name}`` stands for."""
    labels: dict[str, str] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{16 * len(code):x}"
        else:
            code.append(line)
    body = "\n".join(
        f"        /*{16 * number:04x}*/                   {line.format(**labels)} ;   /* 0x00 */\n" + " " * 60 + "/* 0x000fe200 */"
        for number, line in enumerate(code)
    )
    return f"\tcode for sm_80\n\t\tFunction : kernel\n{body}\n"


def repeated(opcode: str, count: int) -> list[str]:
    return [f"{opcode} R1, R2"] * count


END = ["EXIT", "end:", "BRA {end}"]

PLAIN = sass(
    "MOV R1, c[0x0][0x28]",
    "@!P0 BRA {done}",
    "tile:",
    "LDS.128 R4, [R2]",
    "LDSM.16.M88.4 R8, [R3]",
    *repeated("HMMA.1688.F32.TF32", 3),
    *repeated("FADD", 4),
    *repeated("MUFU.EX2", 4),
    *repeated("FFMA", 4),
    "IADD3 R1, R1, 0x40, RZ",
    "ISETP.GE.AND P1, PT, R1, R0, PT",
    "NOP",
    "@!P1 BRA {tile}",
    "done:",
    "STG.E [R2], R1",
    *END,
)


def test_counts_of_a_plain_loop() -> None:
    (mix,) = hot_loops(PLAIN, pairs_per_lane=4)
    assert mix == Mix(slots=20, mufu=4, fp32=8, alu=2, shared=8, tensor=3)
    assert mix.per_pair(4)["slots"] == 5.0


def test_the_endless_branch_behind_a_kernel_is_no_loop() -> None:
    with pytest.raises(CompileError, match=r"expected a loop with 8 exp2 per lane; the kernel's largest holds 0"):
        hot_loops(sass(*repeated("MUFU.EX2", 8), *END), pairs_per_lane=8)


def test_a_rolled_inner_loop_is_multiplied_by_its_trips() -> None:
    text = sass(
        "tile:", "MOV R1, RZ", "k:", "HMMA.1688.F32.TF32 R1, R2", "FADD R1, R1", "@P0 BRA {k}",
        *repeated("MUFU.EX2", 4), "@P1 BRA {tile}", *END,
    )  # fmt: skip
    (mix,) = hot_loops(text, pairs_per_lane=4, inner_trips=(5,))
    assert (mix.tensor, mix.fp32, mix.slots, mix.mufu) == (5, 5, 1 + 3 * 5 + 4 + 1, 4)
    with pytest.raises(CompileError, match="got 1; pass their trip counts"):
        hot_loops(text, pairs_per_lane=4)


def test_inner_loops_take_their_trips_in_program_order_or_the_largest() -> None:
    text = sass(
        "tile:", "MOV R1, RZ", "k:", *repeated("FFMA", 1), "@P0 BRA {k}", *repeated("MUFU.EX2", 4),
        "w:", *repeated("HMMA", 1), "@P2 BRA {w}", "@P1 BRA {tile}", *END,
    )  # fmt: skip
    (mix,) = hot_loops(text, pairs_per_lane=4, inner_trips=(2, 7))
    assert (mix.fp32, mix.tensor) == (2, 7)
    (mix,) = hot_loops(text, pairs_per_lane=4, inner_trips=(2, 7, 3))
    assert (mix.fp32, mix.tensor) == (7, 7)


def test_a_barrier_wait_inside_the_loop_runs_once_wherever_the_compiler_put_it() -> None:
    text = sass(
        "tile:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA {retry}",
        "back:", *repeated("HMMA", 2), *repeated("MUFU.EX2", 4), "@P1 BRA {tile}", "EXIT",
        "retry:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA {retry}", "BRA {back}", "end:", "BRA {end}",
    )  # fmt: skip
    (mix,) = hot_loops(text, pairs_per_lane=4, inner_trips=(9,))
    assert (mix.tensor, mix.mufu, mix.slots) == (2, 4, 12)


def test_an_unrolled_pair_loop_is_divided_by_its_unrolling() -> None:
    (mix,) = hot_loops(sass("tile:", *repeated("MUFU.EX2", 16), *repeated("FADD", 8), "@P1 BRA {tile}", *END), pairs_per_lane=8)
    assert (mix.unroll, mix.mufu, mix.fp32) == (2, 8, 4)


def test_rescaling_by_a_running_maximum_is_no_unrolling() -> None:
    text = sass("tile:", *repeated("FMNMX", 8), *repeated("MUFU.EX2", 16), "@P1 BRA {tile}", *END)
    (mix,) = hot_loops(text, pairs_per_lane=8)
    assert (mix.unroll, mix.mufu, mix.maxima) == (1, 16, 8)


def test_a_tile_with_less_than_a_fragment_per_lane_is_computed_more_than_once() -> None:
    (mix,) = hot_loops(sass("tile:", *repeated("MUFU.EX2", 4), "@P1 BRA {tile}", *END), pairs_per_lane=1)
    assert (mix.unroll, mix.mufu) == (1, 4)


def test_the_redo_of_a_shifted_kernel_is_cold_and_a_running_kernel_is_not() -> None:
    main = ["main:", *repeated("MUFU.EX2", 8), *repeated("FFMA", 8), "@P1 BRA {main}"]
    redo = ["redo:", *repeated("FMNMX", 8), *repeated("MUFU.EX2", 9), "@P2 BRA {redo}"]
    (hot,) = hot_loops(sass(*main, "@P3 EXIT", *redo, *END), pairs_per_lane=8)
    assert (hot.maxima, hot.fp32) == (0, 8)
    (running,) = hot_loops(sass(*redo, *END), pairs_per_lane=8)
    assert running.maxima == 8


def test_two_sweeps_in_one_launch_are_two_loops() -> None:
    rows = ["rows:", *repeated("MUFU.EX2", 8), "@P1 BRA {rows}"]
    columns = ["columns:", *repeated("MUFU.EX2", 8), *repeated("SHFL.BFLY", 4), "@P2 BRA {columns}"]
    both = hot_loops(sass(*rows, *columns, *END), pairs_per_lane=8)
    assert [mix.shuffle for mix in both] == [0, 4]
    assert average(both).shuffle == 2


def test_a_call_used_as_a_jump_does_not_break_the_loop() -> None:
    text = sass("tile:", *repeated("MUFU.EX2", 8), "@P3 CALL.REL.NOINC {out}", "BRA {tile}", "out:", *END)
    (mix,) = hot_loops(text, pairs_per_lane=8)
    assert mix.slots == 10


@pytest.mark.parametrize(
    ("opcode", "unit", "work"),
    [
        ("FFMA.FTZ", "fp32", 1),
        ("FFMA2", "fp32", 2),
        ("IMAD.MOV.U32", "fp32", 1),
        ("FMNMX3", "alu", 1),
        ("ISETP.GE.AND", "alu", 1),
        ("F2FP.BF16.F32.PACK_AB", "alu", 1),
        ("F2F.F64.F32", "mufu", 1),
        ("LDS.64", "shared", 2),
        ("LDSM.16.MT88.4", "shared", 4),
        ("LDGSTS.E.BYPASS.128", "shared", 4),
        ("STSM.16.M88", "shared", 1),
        ("LDTM.x64", "shared", 64),
        ("SHFL.BFLY", "shuffle", 1),
        ("REDUX.SUM", "shuffle", 1),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "memory", 1),
        ("LDG.E.128", "memory", 1),
        ("UTMALDG.2D", "memory", 1),
        ("STL.64", "spills", 1),
        ("HGMMA.64x128x8.F32.TF32", "tensor", 1),
        ("UTCHMMA", "tensor", 1),
        ("UIADD3", "", 1),
        ("R2UR", "", 1),
        ("WARPGROUP.ARRIVE", "", 1),
        ("LDGDEPBAR", "", 1),
        ("v_exp_f32_e32", "mufu", 1),
        ("v_pk_fma_f32", "fp32", 2),
        ("v_fmac_f32_e32", "fp32", 1),
        ("v_cndmask_b32_e64", "alu", 1),
        ("v_mfma_f32_32x32x4_xf32", "tensor", 1),
        ("ds_read_b128", "shared", 8),
        ("ds_read2st64_b64", "shared", 8),
        ("ds_bpermute_b32", "shuffle", 1),
        ("global_load_dwordx4", "memory", 1),
        ("scratch_load_dword", "spills", 1),
        ("s_waitcnt", "", 1),
    ],
)
def test_units(opcode: str, unit: str, work: int) -> None:
    assert isa._unit(opcode) == (unit, work)


def test_amdgcn_loops_follow_labels() -> None:
    text = textwrap.dedent(
        """\
        kernel:                                 ; @kernel
        ; %bb.0:
        \ts_load_dwordx2 s[0:1], s[4:5], 0x0
        .LBB0_1:                                ; =>This Inner Loop Header: Depth=1
        \tds_read_b128 v[0:3], v4
        \tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
        \tv_exp_f32_e32 v0, v1
        \tv_exp_f32_e32 v1, v1
        \tv_exp_f32_e32 v2, v1
        \tv_exp_f32_e32 v3, v1
        \tv_add_f32_e32 v2, v0, v2
        \ts_add_i32 s0, s0, 1
        \ts_cbranch_scc1 .LBB0_1
        ; %bb.2:
        \ts_endpgm
        \t.section\t.rodata
        """
    )
    (mix,) = hot_loops(text, pairs_per_lane=4)
    assert mix == Mix(slots=6, mufu=4, fp32=1, shared=8, tensor=1)


def test_text_without_instructions_is_refused() -> None:
    with pytest.raises(CompileError, match="got no instruction"):
        isa.parse("Function : empty")


KERNEL = """
import subprocess, tempfile
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, D)
    x = tl.load(x_ptr + rows[:, None] * D + dims[None, :])
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, m, BLOCK_N):
        y = tl.load(y_ptr + (start + tl.arange(0, BLOCK_N))[:, None] * D + dims[None, :])
        total += tl.sum(tl.exp2(tl.dot(x, tl.trans(y))), 1)
    tl.store(out_ptr + rows, total)

signature = dict(x_ptr="*fp16", y_ptr="*fp16", out_ptr="*fp32", m="i32", BLOCK_M="constexpr", BLOCK_N="constexpr", D="constexpr")
source = ASTSource(kernel, signature, {(4,): 64, (5,): 64, (6,): 32}, {(i,): [["tt.divisibility", 16]] for i in range(3)})
target, options = GPUTarget("cuda", ARCH, 32), dict(num_warps=4, num_stages=2, enable_fp_fusion=True)
cubin = triton.compile(source, target=target, options=options).asm["cubin"]
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(cubin)
    file.flush()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    print(subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_fresh_from_the_compiler(arch: int, tmp_path: Path) -> None:
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL.replace("ARCH", str(arch)))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (mix,) = hot_loops(run.stdout, pairs_per_lane=64 * 64 / 128)
    assert mix.unroll == 1
    assert mix.mufu == 32, "one exp2 per pair"
    assert mix.tensor == (16 if arch == 80 else 2), "a warp's 16 × 64 pairs × 32: m16n8k16 on sm_80, m64n64k16 on sm_90"
    assert mix.spills == 0
    assert 2 < mix.per_pair(32)["slots"] < 10
