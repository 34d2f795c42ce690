"""Every family meets the compiler of every GPU in the table; no GPU, no driver."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import triton
from kinds import every, held

from otgen.compile import Kernel, compile_key, compile_variant, inspect_variants
from otgen.errors import CompileError
from otgen.families import FAMILIES, family
from otgen.families.sinkhorn import SWEPT
from otgen.families.tiles import power_of_two
from otgen.gpus import GPUS, gpu
from otgen.isa import parse
from otgen.pool import Outcome, Pool, Role
from otgen.problem import Problem, Variant
from otgen.workload import tile_mix

ARCHITECTURES = {entry.arch: slug for slug, entry in reversed(GPUS.items())}
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "stabiliser": "shifted"}


def compile_all(tasks: dict[object, tuple[Problem, Variant, str]]) -> dict[object, Outcome]:
    with Pool(compile=Role(2, limit=300.0, environment={"TRITON_INTERPRET": None})) as pool:
        for key, task in tasks.items():
            pool.submit("compile", key, compile_variant, *task)
        return {outcome.key: outcome for outcome in pool.outcomes()}


def tuned(problem: Problem, precision: str, **axes: int | str) -> Variant:
    own = family(problem.family).axes(problem)
    variant = {**family(problem.family).default(problem), **TILE, "BLOCK_K": 64, "precision": precision}
    variant |= {axis: value for axis, value in {"PROGRAMS": 1, **axes}.items() if axis in own}
    if "BLOCK_W" in variant:
        variant["BLOCK_W"] = 64
    return Variant(variant)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_for_every_architecture(name: str) -> None:
    kind = family(name)
    tasks = {}
    for arch, slug in ARCHITECTURES.items():
        for problem in every(kind, 4096, 4096, 64):
            for fusion in kind.axes(problem).get("fusion", ("",)):
                axes = {"fusion": fusion} if fusion else {}
                if problem.batch > 1 and fusion in SWEPT:
                    axes["sums"] = "ordered"
                tasks[arch, problem.flag_text, fusion] = *held(problem, tuned(problem, "bf16", **axes)), slug
                if name == "loop" and fusion == "streamed" and problem.batch == 1:
                    tasks[arch, problem.flag_text, "together"] = problem, tuned(problem, "bf16", PROGRAMS=32), slug
            fusions = ("half_step", "split_step", "one_sweep", "three_sweeps")
            for bias, fusion, operands in product(kind.axes(problem).get("bias", ())[1:], fusions, ("stored", "packed")):
                variant = tuned(problem, "bf16", BLOCK_M=128, bias=bias, fusion=fusion, operands=operands)
                if fusion in kind.axes(problem)["fusion"] and not kind.fits(problem, variant, gpu(slug)):
                    tasks[arch, problem.flag_text, fusion, bias, operands] = problem, variant, slug
    for operands in ("stored", "packed"):
        assert {key[0] for key in tasks if key[-1] == operands} == (set(ARCHITECTURES) if name == "sinkhorn" else set())
    outcomes = compile_all(tasks)
    assert {key: outcome.message for key, outcome in outcomes.items() if outcome.status != "ok"} == {}
    for (arch, *_), outcome in outcomes.items():
        for kernel in outcome.value:
            assert 16 <= kernel.registers <= gpu(ARCHITECTURES[arch]).registers_per_thread
            assert kernel.binary[:4] == b"\x7fELF"
            assert kernel.shared_bytes <= gpu(ARCHITECTURES[arch]).shared_per_block


@pytest.mark.parametrize(
    ("slug", "schedule", "axes", "slots"),
    [
        ("h100", "alternating", {"operands": "packed", "precision": "fp16x3", "bias": "wgmma", "num_stages": 1, "d": 3}, 2.5),
        ("a100", "alternating", {"operands": "packed", "precision": "fp16x3", "bias": "mma", "BLOCK_M": 256, "d": 3}, 3.0),
        ("a100", "alternating", {"operands": "packed", "precision": "fp16", "bias": "mma", "BLOCK_M": 256, "num_stages": 1}, 4.3),
        ("h100", "symmetric", {"bias": "wgmma", "num_stages": 2}, 5.1),
        ("h100", "alternating", {"bias": "wgmma", "num_stages": 1}, 3.5),
        ("a100", "symmetric", {"bias": "mma", "BLOCK_M": 256, "num_stages": 1}, 7.8),
        ("a100", "alternating", {"bias": "mma", "BLOCK_M": 256, "num_stages": 1}, 5.8),
        ("h100", "debiased", {"bias": "wgmma", "num_stages": 2}, 5.1),
        ("h100", "symmetric", {"bias": "wgmma", "num_stages": 2, "sums": "ordered"}, 5.1),
        ("a100", "debiased", {"bias": "mma", "BLOCK_M": 256, "num_stages": 1, "sums": "ordered"}, 7.8),
    ],
)
def test_issue_slots_of_biases_in_the_product(slug: str, schedule: str, axes: dict[str, int | str], slots: float) -> None:
    """TF32 or as accurate, d = 64, nothing spilled, one exp2 a pair. Added, both sums take 7.6 slots (h100) and 8.7 (a100).

    Three dimensions take one instruction of depth 16 at the accuracy of fp32 (target: 3 slots).
    """
    d, precision = int(axes.pop("d", 64)), str(axes.pop("precision", "tf32"))
    problem = family("sinkhorn").problem(4096, 4096, d, schedule=schedule)
    fusion = {"symmetric": "one_sweep", "debiased": "three_sweeps"}.get(schedule, "half_step")
    fusion = "split_step" if "operands" in axes and fusion == "half_step" else fusion
    swept = {"fusion": fusion, **({"SPLITS": 8} if fusion != "half_step" else {})}
    variant = tuned(problem, precision, **{"BLOCK_M": 128, "BLOCK_K": power_of_two(d), **axes, **swept})
    assert family("sinkhorn").fits(problem, variant, gpu(slug)) == ""
    with Pool(compile=Role(1, limit=300.0, environment={"TRITON_INTERPRET": None})) as pool:
        pool.submit("compile", 0, inspect_variants, problem, [variant], slug)
        ((inspection,),) = (outcome.value for outcome in pool.outcomes())
    assert [launch.spills for launch in inspection.launches] == [0] * len(inspection.launches)
    pairs = variant.int("BLOCK_M") * variant.int("BLOCK_N") / (32 * variant.int("num_warps"))
    per_pair = next(launch for launch in inspection.launches if launch.mix.slots).mix.per_pair(pairs)
    assert per_pair["slots"] <= slots
    assert per_pair["mufu"] <= 1.02


@pytest.mark.parametrize("slug", ["h100", "a100", "b200", "rtx5090", "mi300x"])
def test_exponentials_shared_with_the_multiply_add_units(slug: str) -> None:
    """A quarter of them at least leaves the special-function unit, and the counter still sees one a pair.

    An H100's half-step then needs 6.0 cycles for 32 pairs, where the exponentials alone took 8 (target: 6.5).
    """
    problem = family("sinkhorn").problem(4096, 4096, 64)
    shares = (0, 4) if slug == "mi300x" else (0, 1, 2, 4)
    axes = {"bias": "wgmma", "precision": "tf32", "num_stages": 1} if slug == "h100" else {"precision": "bf16"}
    variants = [tuned(problem, **{"BLOCK_M": 128, "exp2_by_fma": k, **axes}) for k in shares]
    assert not any(family("sinkhorn").fits(problem, variant, gpu(slug)) for variant in variants)
    with Pool(compile=Role(1, limit=300.0, environment={"TRITON_INTERPRET": None})) as pool:
        pool.submit("compile", 0, inspect_variants, problem, variants, slug)
        (outcome,) = pool.outcomes()
    pairs = 128 * 64 / (gpu(slug).warp_size * 4)
    found = [inspection.launches[0] for inspection in outcome.value]
    assert [launch.spills for launch in found[:2]] == [0, 0]
    per_pair = [launch.mix.per_pair(pairs) for launch in found]
    for units, share in zip(per_pair, shares):
        assert units["mufu"] == pytest.approx(1 - share / 4, abs=0.07)
    if slug == "h100":
        assert max(per_pair[1]["slots"], 8 * per_pair[1]["mufu"]) <= 6.1


@pytest.mark.parametrize(("schedule", "fusion"), [("symmetric", "one_sweep"), ("own", "half_sweep")])
def test_programs_in_groups_compile_for_every_architecture(schedule: str, fusion: str) -> None:
    problem = family("sinkhorn").problem(4096, 4096, 64, schedule=schedule)
    variant = tuned(problem, "bf16", fusion=fusion, SPLITS=4, GROUP=8)
    assert not any(family("sinkhorn").fits(problem, variant, gpu(slug)) for slug in ARCHITECTURES.values())
    outcomes = compile_all({arch: (problem, variant, slug) for arch, slug in ARCHITECTURES.items()})
    assert {key: outcome.message for key, outcome in outcomes.items() if outcome.status != "ok"} == {}
    assert {outcome.value[0].grid for outcome in outcomes.values()} == {(64, 4)}


@pytest.mark.parametrize("name", ["transport", "hvp"])
def test_programs_that_share_columns_compile_for_every_architecture(name: str) -> None:
    """A sweep of parts, and what merges their sums, plain or below a running maximum."""
    tasks = {}
    for i, (arch, slug) in enumerate(ARCHITECTURES.items()):
        for j, problem in enumerate(every(family(name), 4096, 4096, 64)):
            stabiliser = "shifted" if ("output", "both") in problem.flags else ("running", "shifted")[(i + j) % 2]
            variant = tuned(problem, "bf16", SPLITS=4, stabiliser=stabiliser, fusion="one_sweep")
            assert family(name).fits(problem, variant, gpu(slug)) == ""
            tasks[arch, problem.flag_text] = problem, variant, slug
    outcomes = compile_all(tasks)
    assert {key: outcome.message for key, outcome in outcomes.items() if outcome.status != "ok"} == {}
    for outcome in outcomes.values():
        sweep, merge = outcome.value[:2]
        assert sweep.programs == 4 * merge.programs


@pytest.mark.parametrize("slug", ["h100", "b200", "rtx5090"])
def test_tiles_fetched_by_descriptor_are_fetched_by_the_copy_unit(slug: str) -> None:
    """The compiler may take pointers instead; each program has room for one descriptor of stored points, two of packed ones.

    Threads then store no columns into shared memory: the tile's bytes, 128 to an access, are saved.
    """
    bias = "mma" if slug == "rtx5090" else "wgmma"
    swept = {"fusion": "one_sweep", "SPLITS": 4, "bias": bias}
    packed = {"bias": bias, "operands": "packed", "precision": "fp16", "fusion": "split_step", "SPLITS": 4}
    tasks = {}
    for schedule, axes in (("alternating", {}), ("alternating", {"bias": bias}), ("symmetric", swept), ("alternating", packed)):
        problem = family("sinkhorn").problem(4096, 4096, 64, schedule=schedule)
        for loads in ("pointers", "descriptor"):
            variant = tuned(problem, **{"precision": "tf32", "BLOCK_M": 128, "loads": loads, **axes})
            assert family("sinkhorn").fits(problem, variant, gpu(slug)) == ""
            tasks[str(axes), loads] = problem, variant, slug
    outcomes = compile_all(tasks)
    assert {key: outcome.message for key, outcome in outcomes.items() if outcome.status != "ok"} == {}
    for (axes, loads), outcome in outcomes.items():
        streaming = next(kernel for kernel in outcome.value if kernel.name in ("sweep", "half_step"))
        assert ("UTMALDG" in streaming.code) == (loads == "descriptor"), axes
    problem, variant, _ = tasks["{}", "descriptor"]
    written = [
        tile_mix(problem, variant, gpu(slug), outcomes["{}", loads].value[0].code).shared for loads in ("pointers", "descriptor")
    ]
    assert written[0] - written[1] >= 64 * 64 * 4 / 128 / variant.int("num_warps") * 0.9


@pytest.mark.parametrize("slug", ["h100", "a100", "b200", "rtx5090"])
def test_streamed_columns_are_marked_for_l2_to_keep(slug: str) -> None:
    """In loads of their own, LDG; rows and weights keep to the usual order, and the hint takes less than .2 slots a pair."""
    problem = family("sinkhorn").problem(4096, 4096, 64)
    bias = {"BLOCK_M": 128, "num_stages": 1, "bias": "mma" if slug in ("a100", "rtx5090") else "wgmma"}
    axes = {
        "stored": {"precision": "tf32"},
        "packed": {"precision": "fp16", "operands": "packed", "fusion": "split_step", "SPLITS": 4},
    }
    chosen = {
        (operands, eviction): tuned(problem, **{**own, **bias, "eviction": eviction})
        for operands, own in axes.items()
        for eviction in ("normal", "last")
    }
    assert not any(family("sinkhorn").fits(problem, variant, gpu(slug)) for variant in chosen.values())
    outcomes = compile_all({key: (problem, variant, slug) for key, variant in chosen.items()})
    streaming = ("sweep", "half_step")
    kernels = {key: next(kernel for kernel in outcome.value if kernel.name in streaming) for key, outcome in outcomes.items()}
    hints = {key: len(re.findall(r"LDG\.E\.EL", kernel.code)) for key, kernel in kernels.items()}
    slots = {key: tile_mix(problem, chosen[key], gpu(slug), kernel.code).slots for key, kernel in kernels.items()}
    for operands in axes:
        assert hints[operands, "normal"] == 0 < hints[operands, "last"]
        assert slots[operands, "last"] - slots[operands, "normal"] < 0.2 * 64


def test_listings_read_together_are_those_of_cuobjdump(tmp_path: Path) -> None:
    """On every architecture: the same instructions, in the same places, with the same branch targets."""
    problem = family("sinkhorn").problem(4096, 4096, 64, schedule="symmetric")
    variant = tuned(problem, "tf32", fusion="one_sweep")
    slugs = {arch: slug for arch, slug in ARCHITECTURES.items() if isinstance(arch, int)}
    outcomes = compile_all({arch: (problem, variant, slug) for arch, slug in slugs.items()})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for arch, outcome in outcomes.items():
        assert [kernel.name for kernel in outcome.value] == ["sweep", "update_both"]
        shift = 0
        for kernel in outcome.value:
            cubin = tmp_path / f"{arch}.{kernel.name}.cubin"
            cubin.write_bytes(kernel.binary)
            text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
            expected = [(i.address + shift, i.opcode, i.conditional, i.target and i.target + shift) for i in parse(text)]
            found = [(i.address, i.opcode, i.conditional, i.target) for i in parse(kernel.code)]
            assert found == expected
            assert len(found) > 100
            shift = found[-1][0] + 16


@pytest.mark.parametrize("slug", ["a100", "h100", "b200"])
def test_every_precision_and_stabiliser_compiles(slug: str) -> None:
    problem = family("sinkhorn").problem(4096, 4096, 64, schedule="symmetric")
    tasks = {
        (precision, stabiliser): (
            problem,
            tuned(problem, precision, BLOCK_N=32, BLOCK_K=32, fusion="one_launch", stabiliser=stabiliser),
            slug,
        )
        for precision in ("ieee", "tf32", "tf32x3", "bf16x3", "bf16", "fp16")
        for stabiliser in ("running", "shifted")
    }
    outcomes = compile_all(tasks)
    assert {key: outcome.message for key, outcome in outcomes.items() if outcome.status != "ok"} == {}
    tensor = "HMMA" if slug == "a100" else "HGMMA" if slug == "h100" else "UTC"
    for (precision, _), outcome in outcomes.items():
        assert (tensor in outcome.value[0].code) == (precision != "ieee"), precision


def test_launches_and_grids_are_those_of_launch() -> None:
    problem = family("sinkhorn").problem(1000, 500, 64, schedule="symmetric")
    tasks = {f: (problem, tuned(problem, "tf32", fusion=f), "a100") for f in ("two_launches", "one_launch", "one_sweep")}
    found = {
        key: [(kernel.name, kernel.grid, kernel.num_warps) for kernel in outcome.value]
        for key, outcome in compile_all(tasks).items()
    }
    assert found == {
        "two_launches": [("half_step", (16,), 4), ("half_step", (8,), 4)],
        "one_launch": [("update_both", (24,), 4)],
        "one_sweep": [("sweep", (16, 1), 4), ("update_both", (24,), 4)],
    }


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 100, 3), (100, 1, 17)], ids=str)
def test_a_size_of_one_compiles(shape: tuple[int, int, int]) -> None:
    """Triton turns an integer argument of 1 into a constant; the interpreter does not, so only the compiler can object."""
    tasks = {}
    for kind in FAMILIES.values():
        for problem in every(kind, *shape):
            for fusion in kind.axes(problem).get("fusion", ("",)):
                variant = kind.default(problem).with_(stabiliser="shifted", **({"fusion": fusion} if fusion else {}))
                tasks[problem.flag_text, fusion] = *held(problem, variant), "a100"
                if not fusion:
                    tasks[problem.flag_text, "split"] = problem, variant.with_(SPLITS=2), "a100"
                if "bias" in variant and fusion in ("half_step", "one_sweep", "three_sweeps"):
                    tasks[problem.flag_text, fusion, "mma"] = problem, variant.with_(bias="mma", precision="tf32"), "a100"
    assert {key: o.message for key, o in compile_all(tasks).items() if o.status != "ok"} == {}


def test_too_much_shared_memory_is_its_own_class() -> None:
    problem = family("sinkhorn").problem(4096, 4096, 64)
    variant = tuned(problem, "tf32", BLOCK_M=256, BLOCK_N=256, num_stages=4, num_warps=8)
    outcome = compile_all({0: (problem, variant, "l4")})[0]
    assert isinstance(outcome.error, CompileError)
    assert outcome.error.status == "resource"
    assert "l4 has 101376" in str(outcome.error)


def test_too_much_tensor_memory_is_refused_like_shared_memory() -> None:
    """The compiler's code would be a trap. A smaller tile says what it takes, which limits how many programs share an SM."""
    problem = family("sinkhorn").problem(4096, 4096, 64)
    variant = tuned(problem, "tf32", BLOCK_M=256, BLOCK_N=128, num_warps=8, bias="wgmma")
    tasks = {name: (problem, chosen, "b200") for name, chosen in (("large", variant), ("small", variant.with_(bias="added")))}
    outcomes = compile_all(tasks)
    error = outcomes["large"].error
    assert isinstance(error, CompileError)
    assert error.status == "resource"
    assert "half_step needs 520 columns of tensor memory; b200 has 512" in str(error)
    assert [kernel.tensor_memory for kernel in outcomes["small"].value] == [256]


def test_a_compiler_error_is_one_sentence() -> None:
    problem = family("sinkhorn").problem(4096, 4096, 64)
    outcome = compile_all({0: (problem, tuned(problem, "tf32"), "mi300x")})[0]
    if outcome.status != "ok":
        assert isinstance(outcome.error, CompileError)
        assert "\n" not in str(outcome.error)
    else:
        assert outcome.value[0].ptx == ""


def test_compile_keys_share_what_compiles_alike() -> None:
    kind = family("sinkhorn")
    problem = kind.problem(4096, 4096, 64)
    variant = tuned(problem, "tf32")
    key = compile_key(problem, variant, gpu("h100"))
    assert key == compile_key(kind.problem(65536, 1024, 64), variant, gpu("h200"))
    others = [
        compile_key(kind.problem(4096, 4096, 63), variant, gpu("h100")),
        compile_key(kind.problem(4097, 4096, 64), variant, gpu("h100")),
        compile_key(kind.problem(1, 4096, 64), variant, gpu("h100")),
        compile_key(kind.problem(4096, 4096, 64, "bf16"), variant, gpu("h100")),
        compile_key(kind.problem(4096, 4096, 64, schedule="symmetric"), variant, gpu("h100")),
        compile_key(problem, variant.with_(num_warps=8), gpu("h100")),
        compile_key(problem, variant, gpu("a100")),
    ]
    assert len({key, *others}) == len(others) + 1


def test_programs_multiply_the_grid() -> None:
    assert Kernel("k", (3, 5), 4, 32, 0, 0, "", b"", "").programs == 15
