"""The performance model: a published measurement, occupancy by hand, and facts about time that any model must respect."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import inf

import pytest

from otgen.errors import CompileError
from otgen.families import family
from otgen.gpus import GPUS
from otgen.guess import estimate, guess
from otgen.isa import Mix
from otgen.model import ASSUMED, PHASES, UNITS, Assumptions, LaunchCost, occupancy, predict
from otgen.problem import Problem, Variant
from otgen.workload import CompiledLaunch, Tile, launch_costs, tile_mix

A100 = GPUS["a100"]

N = 50_000
SYMMETRIC_8_WARPS = LaunchCost(
    # flash-sinkhorn 0.4.1, symmetric step, triton 3.7.1 for sm_80, BLOCK 128 × 128 × 32, 8 warps, 3 stages; mean of its two sweeps
    programs=2 * 391,
    num_warps=8,
    registers=217,
    shared_bytes=65536,
    iterations=391,
    mix=Mix(slots=1043.5, mufu=72, fp32=346.5, alu=267.5, shared=370, shuffle=45, tensor=128, memory=12, maxima=86.5),
    tensor_flops={"tf32": 2 * 128 * 128 * 64},
    tile_bytes=(128 + 128) * 64 * 4 + 2 * 128 * 4,
    cloud_bytes=N * 64 * 4,
)
SYMMETRIC_4_WARPS = replace(
    SYMMETRIC_8_WARPS,  # BLOCK 128 × 128 × 16: the model's favourite among its 56 shipped configurations
    num_warps=4,
    registers=255,
    shared_bytes=32768,
    mix=Mix(slots=1718.5, mufu=140, fp32=608.5, alu=377.5, shared=535, shuffle=68, tensor=256, memory=2, spills=22.5, maxima=162),
)
ALTERNATING_4_WARPS = replace(
    SYMMETRIC_4_WARPS,  # the alternating half-step, the model's favourite among its 44
    programs=391,
    mix=Mix(slots=1519, mufu=136, fp32=473, alu=366, shared=523, shuffle=36, tensor=256, memory=1, spills=9, maxima=146),
)


@pytest.mark.parametrize(
    ("launches", "published_ms"),
    [([SYMMETRIC_8_WARPS], 14.5), ([SYMMETRIC_4_WARPS], 14.5), ([ALTERNATING_4_WARPS] * 2, 10.26)],
    ids=["symmetric, 8 warps", "symmetric, 4 warps", "alternating"],
)
def test_published_times_of_flash_sinkhorn_on_a100(launches: list[LaunchCost], published_ms: float) -> None:
    """n = m = 50 000, d = 64, TF32; which configuration its autotuner took is not published."""
    prediction = predict(A100, launches)
    assert prediction.microseconds / 1e3 == pytest.approx(published_ms, rel=0.35)


def test_the_bounds_of_that_measurement() -> None:
    """Milliseconds of each unit for both sweeps, as worked out by hand."""
    terms = predict(A100, [SYMMETRIC_8_WARPS]).terms
    assert float(terms["tensor"]) / 1e3 == pytest.approx(4.1, rel=0.02)
    assert float(terms["l2"]) / 1e3 == pytest.approx(5.0, rel=0.06)
    assert float(terms["mufu"]) / 1e3 == pytest.approx(2.06 * 72 / 64, rel=0.02)
    assert float(terms["issue"]) / 1e3 == pytest.approx(3.4 * (2 * 1043.5 / 64) / 26.9, rel=0.06)
    assert terms["overlap"] == 0.0


SMALL = LaunchCost(
    programs=8 * 108,
    num_warps=4,
    registers=128,
    shared_bytes=32768,
    iterations=64,
    mix=Mix(slots=500, mufu=64, fp32=150, alu=50, shared=60, shuffle=4, tensor=32),
    tensor_flops={"bf16": 2.0 * 128 * 64 * 64},
    tile_bytes=64 * 64 * 2,
    cloud_bytes=4096 * 64 * 2,
)


def time(cost: LaunchCost, slug: str = "a100") -> float:
    return predict(GPUS[slug], [cost]).microseconds


@pytest.mark.parametrize(
    ("slug", "num_warps", "registers", "shared_bytes", "expected"),
    [
        ("a100", 4, 128, 48 * 1024, (3, "shared memory")),  # 164 KiB over 48 + 1 KiB
        ("a100", 4, 128, 0, (4, "registers")),  # 16 warps of 128 · 32 registers
        ("a100", 8, 255, 0, (1, "registers")),
        ("a100", 4, 33, 0, (12, "registers")),  # 33 · 32 registers are given as 1280
        ("a100", 2, 128, 0, (4, "registers")),  # warps are placed four at a time
        ("a100", 8, 24, 0, (8, "threads")),
        ("l4", 8, 24, 0, (6, "threads")),
        ("a10g", 1, 16, 0, (16, "blocks")),
        ("l4", 4, 64, 100 * 1024, (0, "shared memory")),
        ("a100", 4, 256, 0, (0, "registers")),
        ("mi300x", 4, 256, 32 * 1024, (2, "registers")),
    ],
)
def test_occupancy(slug: str, num_warps: int, registers: int, shared_bytes: int, expected: tuple[int, str]) -> None:
    assert occupancy(GPUS[slug], num_warps, registers, shared_bytes) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(0, (4, "registers")), (128, (4, "registers")), (160, (2, "tensor memory")), (512, (1, "tensor memory"))],
)
def test_programs_of_an_sm_share_its_tensor_memory(columns: int, expected: tuple[int, str]) -> None:
    """512 columns, given in powers of two."""
    assert occupancy(GPUS["b200"], 4, 128, 0, columns) == expected
    compiled = CompiledLaunch("k", 4, 128, 0, 0, Mix(), columns)
    (cost,) = launch_costs(SINKHORN.problem(4096, 4096, 64), TILE.with_(fusion="half_step"), GPUS["b200"], [compiled])
    terms = predict(GPUS["b200"], [replace(SMALL, shared_bytes=0, tensor_memory=cost.tensor_memory)]).terms
    assert (terms["occupancy"], terms["limit"]) == expected


def test_a_program_that_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(
        CompileError, match=r"4 warps of 128 registers with 110000 bytes of shared memory exceed its shared memory"
    ) as info:
        time(replace(SMALL, shared_bytes=110_000), "l4")
    assert info.value.status == "resource"


@pytest.mark.parametrize("unit", ["slots", "mufu", "fp32", "alu", "shared", "shuffle", "spills"])
def test_more_work_never_takes_less_time(unit: str) -> None:
    heavier = replace(SMALL, mix=replace(SMALL.mix, **{unit: getattr(SMALL.mix, unit) + 4000}))
    assert time(heavier) > 1.5 * time(SMALL)


def test_iteration_time_lies_between_longest_phase_and_sum() -> None:
    def ideal(*overlap: float) -> float:
        prediction = predict(A100, [SMALL], Assumptions(overlap=overlap, prologue_cycles=0.0, launch_us=0.0))
        assert prediction.terms["tail"] == pytest.approx(0.0, abs=1e-9)
        return prediction.microseconds

    terms = predict(A100, [replace(SMALL, programs=4 * 108 * 2)]).terms
    phases = [max(float(terms[unit]) for unit in units) for units in PHASES.values()]
    assert ideal(1.0) == pytest.approx(max(phases))
    assert ideal(0.0) == pytest.approx(sum(phases))
    assert ideal(0.0, 0.0, 0.0, 0.5) == pytest.approx((max(phases) + sum(phases)) / 2)


def test_more_resident_programs_overlap_better() -> None:
    assert list(ASSUMED.overlap) == sorted(ASSUMED.overlap)
    assert time(replace(SMALL, shared_bytes=120_000)) > time(SMALL)


def test_a_lone_program_in_the_last_wave_costs_a_round_of_its_own() -> None:
    full, one_more = predict(A100, [SMALL]), predict(A100, [replace(SMALL, programs=SMALL.programs + 1)])
    assert one_more.microseconds > full.microseconds
    assert float(one_more.terms["tail"]) > float(full.terms["tail"]) == 0.0


def test_idle_sms_are_not_free() -> None:
    assert time(replace(SMALL, programs=16, iterations=64 * 54)) > 2 * time(replace(SMALL, programs=16 * 54))


def test_a_cold_launch_costs_a_launch_and_a_prologue() -> None:
    cold = predict(A100, [replace(SMALL, cold=True)])
    assert cold.microseconds == pytest.approx(ASSUMED.launch_us + 2 * ASSUMED.prologue_cycles / A100.clock_mhz)
    assert all(cold.terms[unit] == 0.0 for unit in UNITS)
    assert predict(A100, [SMALL, SMALL]).microseconds == pytest.approx(2 * time(SMALL))


def test_tiles_requested_late_are_waited_for() -> None:
    alone = replace(SMALL, programs=108, shared_bytes=120_000)
    waiting = time(replace(alone, pipelined=False)) - time(alone)
    assert waiting == pytest.approx(64 * ASSUMED.latency_cycles / A100.clock_mhz)


def test_a_cloud_larger_than_l2_comes_from_dram_once_per_wave() -> None:
    held, spilled = (predict(A100, [replace(SMALL, cloud_bytes=size)]).terms for size in (4e7, 8e7))
    assert float(spilled["dram"]) > 3.9 * float(held["dram"])


def test_programs_that_wait_for_each_other_pay_for_each_time() -> None:
    waiting, free = predict(A100, [replace(SMALL, barriers=10)]), predict(A100, [SMALL])
    assert waiting.microseconds - free.microseconds == pytest.approx(10 * ASSUMED.barrier_us)
    assert waiting.terms["barriers"] == pytest.approx(10 * ASSUMED.barrier_us)


def test_terms_are_json_and_name_the_bound() -> None:
    terms = json.loads(json.dumps(predict(A100, [replace(SMALL, mix=replace(SMALL.mix, mufu=6400.0))]).terms))
    assert terms["bound"] == "mufu"
    assert terms["assumptions"] == "assumed"
    assert set(terms) == {*UNITS, "launch", "barriers", "prologue", "tail", "waves", "occupancy", "limit", "overlap"} | {
        "bound",
        "assumptions",
    }


SINKHORN, TRANSPORT = family("sinkhorn"), family("transport")
TILE = Variant(
    BLOCK_M=128,
    BLOCK_N=64,
    BLOCK_K=64,
    num_warps=4,
    num_stages=2,
    precision="tf32",
    stabiliser="shifted",
    fusion="one_sweep",
    SPLITS=1,
)


def symmetric(n: int = 65536, d: int = 64) -> Problem:
    return SINKHORN.problem(n, n, d, schedule="symmetric")


@pytest.mark.parametrize("slug", GPUS)
def test_estimates_respect_what_is_known(slug: str) -> None:
    gpu = GPUS[slug]
    variant = TILE if gpu.backend == "cuda" else TILE.with_(precision="bf16", num_stages=1)
    best = estimate(symmetric(), variant, gpu)
    assert 0 < best < inf
    assert best < estimate(symmetric(), variant.with_(fusion="one_launch"), gpu), "one sweep beats two"
    assert best < estimate(symmetric(), variant.with_(fusion="two_launches"), gpu), "one sweep beats two launches"
    two_launches = variant.with_(fusion="two_launches")
    assert estimate(symmetric(), two_launches, gpu) < estimate(symmetric(), two_launches.with_(stabiliser="running"), gpu)
    assert best < estimate(symmetric(), variant.with_(precision="ieee"), gpu), "fp32 products are slower than tensor cores"
    assert best < estimate(symmetric(131072), variant, gpu), "more pairs take longer"


@pytest.mark.parametrize(("slug", "bias"), [("a100", "mma"), ("h100", "wgmma"), ("b200", "wgmma"), ("rtx4090", "mma")])
def test_biases_in_the_product_are_estimated_to_save_instructions(slug: str, bias: str) -> None:
    """What they add is tensor work: a bf16 product of depth 16."""
    problem, gpu = symmetric(), GPUS[slug]
    variant = TILE.with_(bias=bias)
    assert SINKHORN.fits(problem, variant, gpu) == ""
    tile, added = (Tile.of(problem, v, SINKHORN.work(problem, v)) for v in (variant, TILE))
    assert guess(tile, variant, gpu)[0].slots < 0.9 * guess(added, TILE, gpu)[0].slots
    assert tile.tensor_flops(gpu) == {**added.tensor_flops(gpu), "bf16": 2.0 * 128 * 64 * 16}
    half = TILE.with_(bias=bias, precision="bf16")
    assert Tile.of(problem, half, SINKHORN.work(problem, half)).tensor_flops(gpu) == {"bf16": 2.0 * 128 * 64 * (64 + 16)}


def test_what_a_copy_unit_fetches_no_thread_stores() -> None:
    """64 points of 64 numbers, 128 bytes an access, shared by 4 warps; nothing else is claimed before it is compiled."""
    problem, gpu = symmetric(), GPUS["h100"]
    variant = TILE.with_(bias="wgmma", loads="descriptor")
    assert SINKHORN.fits(problem, variant, gpu) == ""
    tile = Tile.of(problem, variant, SINKHORN.work(problem, variant))
    (pointers, registers), (descriptor, needed) = (guess(tile, v, gpu) for v in (variant.with_(loads="pointers"), variant))
    assert pointers.shared - descriptor.shared == pytest.approx(64 * 64 * 4 / 128 / 4)
    assert (pointers.slots, registers) == (descriptor.slots, needed)


def test_estimates_of_tiles_that_spill_or_do_not_fit() -> None:
    spilling = TILE.with_(BLOCK_M=256, BLOCK_N=128)
    assert estimate(symmetric(), spilling, A100) > 1.5 * estimate(symmetric(), spilling.with_(num_warps=8), A100)
    assert estimate(symmetric(d=256), TILE.with_(BLOCK_K=256, BLOCK_N=256), GPUS["l4"]) == inf


def test_a_resident_row_block_is_estimated_faster_than_one_read_again() -> None:
    assert estimate(symmetric(), TILE, A100) < estimate(symmetric(), TILE.with_(BLOCK_K=32), A100)


def test_a_wider_output_than_one_block_repeats_the_scores() -> None:
    problem = TRANSPORT.problem(4096, 4096, 64, output="matrix", width=256)
    narrow = Variant({axis: value for axis, value in TILE.items() if axis not in ("fusion", "SPLITS")}, BLOCK_N=32, BLOCK_W=32)
    assert estimate(problem, narrow, A100) > estimate(problem, narrow.with_(BLOCK_W=64), A100)


LOOP = "Function : k\n" + "".join(
    f"        /*{16 * number:04x}*/                   {line} ;\n"
    for number, line in enumerate(["MUFU.EX2 R1, R2"] * 64 + ["@P0 BRA 0x0", "EXIT"])
)


def launch(mix: Mix) -> CompiledLaunch:
    return CompiledLaunch("k", 4, 128, 0, 32768, mix)


def test_launch_costs_of_each_fusion() -> None:
    problem = SINKHORN.problem(4096, 2048, 64, schedule="symmetric")
    hot = launch(tile_mix(problem, TILE, A100, LOOP))
    assert hot.mix.mufu == 64
    first, second = launch_costs(problem, TILE.with_(fusion="two_launches"), A100, [hot, hot])
    assert (first.programs, first.iterations, second.programs, second.iterations) == (32, 32, 16, 64)
    assert first.tensor_flops == {"tf32": 2.0 * 128 * 64 * 64}
    (both,) = launch_costs(problem, TILE.with_(fusion="one_launch"), A100, [hot])
    assert (both.programs, both.iterations * 48) == (48, 32 * 32 + 16 * 64)
    sweep, finish = launch_costs(problem, TILE, A100, [hot, launch(Mix())])
    assert (sweep.cold, finish.cold, finish.programs) == (False, True, 48)
    assert sweep.tile_bytes > first.tile_bytes, "atomic column sums"
    split, _ = launch_costs(problem, TILE.with_(SPLITS=4), A100, [hot, launch(Mix())])
    assert (split.programs, split.iterations) == (4 * sweep.programs, sweep.iterations / 4)
    ordered, adds = launch_costs(problem, TILE.with_(SPLITS=4, sums="ordered"), A100, [hot, launch(Mix())])
    assert sweep.tile_bytes - ordered.tile_bytes == 64 * (32 - 4), "column sums written, and no atomics"
    assert (adds.program_bytes - finish.program_bytes) * 48 == pytest.approx(4 * 128 * (32 * 4 + 16 * 32)), (
        "shares of rows, of columns"
    )


def test_matrix_outputs_add_a_second_product() -> None:
    problem = TRANSPORT.problem(4096, 4096, 64, output="gradient")
    variant = Variant({axis: value for axis, value in TILE.items() if axis not in ("fusion", "SPLITS")}, BLOCK_W=64)
    (cost,) = launch_costs(problem, variant, A100, [launch(Mix())])
    assert cost.tensor_flops == {"tf32": 2.0 * 128 * 64 * (64 + 64)}
    (exact,) = launch_costs(problem, variant.with_(precision="ieee"), A100, [launch(Mix())])
    assert exact.tensor_flops == {}


def test_a_compiled_launch_survives_the_database() -> None:
    stored = json.loads(json.dumps(launch(Mix(slots=3.5, unroll=2)).to_json()))
    assert CompiledLaunch.from_json(stored) == launch(Mix(slots=3.5, unroll=2))


def test_importing_the_model_imports_neither_torch_nor_triton() -> None:
    code = "import sys, otgen.model, otgen.workload; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
