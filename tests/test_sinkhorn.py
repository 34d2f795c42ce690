"""The Sinkhorn family: its formula in natural units, the redo of a failed shift, zero weights, and what fusion must not change."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from triton.runtime import _allocation

from otgen import ops
from otgen.dispatch import Choice
from otgen.families import family, sinkhorn, tiles
from otgen.gpus import gpu
from otgen.precision import LOG2_E, MODES
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.verify import call_arguments, failures, interpret, verify

KIND = family("sinkhorn")
SYMMETRIC = KIND.problem(70, 45, 5, schedule="symmetric")
ALTERNATING = KIND.problem(70, 45, 5)
OWN = KIND.problem(150, 150, 5, schedule="own")


def run(problem: Problem, given: dict[str, torch.Tensor], **axes: int | str) -> dict[str, torch.Tensor]:
    """The outputs of an interpreted kernel, in float64."""
    variant = KIND.default(problem).with_(**{"BLOCK_M": 32, "BLOCK_N": 16, **axes})
    call = call_arguments(problem, given, "cpu")
    load(problem, variant).launch(**call)
    return {name: call[name].double() for name in KIND.reference(problem, given)}


def test_reference_is_the_softmin_of_the_plan() -> None:
    """T_f(g)_i = −eps·log Σ_j b_j exp((g_j − C_ij)/eps), in natural units, through none of the base-2 code."""
    given = {**tiles.clouds(ALTERNATING, 3), "damping": 1.0, "step": 1.0}
    given["x_sq"], y_sq = (given["x"] ** 2).sum(1), (given["y"] ** 2).sum(1)
    cost = torch.cdist(given["x"], given["y"]) ** 2 * given["cost"]
    g = (given["v"] + given["scale"] / 2 * y_sq) / given["kappa"]
    f = -given["eps"] * torch.logsumexp((g - cost) / given["eps"] + given["b"].log(), 1)
    found = sinkhorn.reference(ALTERNATING, given)["u_out"]
    torch.testing.assert_close((found + given["scale"] / 2 * given["x_sq"]) / given["kappa"], f, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fusion", ["two_launches", "one_launch", "one_sweep"])
def test_fusion_and_stabiliser_do_not_change_the_step(fusion: str) -> None:
    given = sinkhorn.inputs(SYMMETRIC, 0)
    plain = run(SYMMETRIC, given, fusion="two_launches", stabiliser="running")
    fused = run(SYMMETRIC, given, fusion=fusion, stabiliser="shifted")
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fusion", ["two_launches", "one_launch", "one_sweep"])
@pytest.mark.parametrize("bias", ["added", "mma"])
@pytest.mark.parametrize("offset", [-3000.0, -130.0, 130.0, 3000.0])
def test_a_shift_out_of_range_is_redone(fusion: str, bias: str, offset: float) -> None:
    """u* does not depend on u: however wrong the shift, the kernel must find it; rho itself may leave fp32's range."""
    given = {**sinkhorn.inputs(SYMMETRIC, 1), "damping_a": 1.0, "damping_b": 1.0, "step": 1.0}
    expected = sinkhorn.reference(SYMMETRIC, given)["u_out"]
    given["u"][::7] += offset
    found = run(SYMMETRIC, given, fusion=fusion, stabiliser="shifted", bias=bias)
    torch.testing.assert_close(found["u_out"], expected, rtol=1e-6, atol=1e-3)
    if offset > 0:
        assert found["v_out"].isfinite().all()


@pytest.mark.parametrize("stabiliser", ["running", "shifted"])
def test_points_without_weight_count_for_nothing(stabiliser: str) -> None:
    """Moving a weightless point changes no other potential, and its own potential is still the softmin there."""
    given = {**sinkhorn.inputs(ALTERNATING, 2), "damping": 1.0, "step": 1.0}
    column = int((given["b"] == 0).nonzero()[0])
    before = run(ALTERNATING, given, stabiliser=stabiliser)
    given["v"][column] = 900.0
    after = run(ALTERNATING, given, stabiliser=stabiliser)
    assert torch.equal(before["u_out"], after["u_out"])


def test_marginals_have_the_same_mass() -> None:
    """Σ_i a_i rho_i = Σ_j b_j gamma_j: both are the plan's mass, out of one exponential."""
    given = sinkhorn.inputs(SYMMETRIC, 4)
    given["u"][0] += 100.0
    found = run(SYMMETRIC, given, fusion="one_sweep", stabiliser="shifted")
    rows, columns = (given["a"] * found["rho"]).sum(), (given["b"] * found["gamma"]).sum()
    torch.testing.assert_close(rows, columns, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("tile", [(32, 16), (16, 64), (64, 64)], ids=str)
def test_half_a_sweep_has_all_sums(splits: int, tile: tuple[int, int]) -> None:
    """Symmetric scores: later columns are rows too, whatever the tile and however many programs share them."""
    given = sinkhorn.inputs(OWN, 5)
    expected, (rows, columns) = sinkhorn.reference(OWN, given), tile
    options = {"fusion": "half_sweep", "stabiliser": "shifted", "BLOCK_M": rows, "BLOCK_N": columns, "SPLITS": splits}
    found = run(OWN, given, **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


def test_only_a_measure_with_itself_has_half_a_sweep() -> None:
    assert "as many columns as rows" in KIND.fits(KIND.problem(70, 45, 5, schedule="own"), KIND.default(OWN), gpu("a100"))


def test_one_sweep_needs_a_shift() -> None:
    variant = Variant(KIND.default(SYMMETRIC), fusion="one_sweep", stabiliser="running")
    assert "common shift" in KIND.fits(SYMMETRIC, variant, gpu("a100"))


IN_PRODUCT = {
    "mma": {"bias": "mma", "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4},
    "wgmma": {"bias": "wgmma", "BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4},
}
"""Tiles that hold their columns first, and take the biases from the product."""


@pytest.mark.parametrize("bias", IN_PRODUCT)
@pytest.mark.parametrize("fusion", ["half_step", "two_launches", "one_launch", "one_sweep"])
@pytest.mark.parametrize("batch", [1, 3])
def test_biases_from_the_product_agree_with_float64(bias: str, fusion: str, batch: int) -> None:
    schedule = "alternating" if fusion == "half_step" else "symmetric"
    for d in (3, 40):
        problem = KIND.problem(70, 45, d, schedule=schedule, batch=batch)
        resident = tiles.power_of_two(d)
        variant = KIND.default(problem).with_(BLOCK_K=resident, stabiliser="shifted", fusion=fusion, **IN_PRODUCT[bias])
        variants = [variant.with_(SPLITS=splits) for splits in (1, 4)] if fusion == "one_sweep" else [variant]
        for chosen in variants:
            assert not list(failures(interpret(problem, chosen))), chosen


@pytest.mark.parametrize("bias", IN_PRODUCT)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 5), (37, 1, 16), (33, 64, 17), (32, 65, 3), (65, 200, 1)], ids=str)
def test_biases_from_the_product_at_awkward_shapes(bias: str, shape: tuple[int, int, int]) -> None:
    """Whole tiles, which are not masked, none of them, and what is left over."""
    for problem in (KIND.problem(*shape), KIND.problem(*shape, schedule="symmetric")):
        axes = {"BLOCK_K": tiles.power_of_two(shape[2]), "stabiliser": "shifted", **IN_PRODUCT[bias]}
        sweeps = [{"fusion": "one_sweep", "SPLITS": splits} for splits in (1, 2, 16)]
        for own in sweeps if problem.flags[0] == ("schedule", "symmetric") else [{}]:
            variant = KIND.default(problem).with_(**axes, **own)
            assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), variant


PACKED = {"bias": "mma", "BLOCK_M": 32, "BLOCK_N": 16, "stabiliser": "shifted", "operands": "packed", "fusion": "split_step"}


@pytest.mark.parametrize("precision", [mode for mode in MODES if MODES[mode].packed])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("schedule", "fusion"), [("alternating", "split_step"), ("symmetric", "one_sweep"), ("own", "half_sweep")])
def test_packed_operands_agree_with_float64(precision: str, batch: int, schedule: str, fusion: str) -> None:
    """Within their own mode's budget: a packed operand is rounded in the interpreter too. Of one or two depths."""
    for n, m, d in ((1, 1, 1), (70, 45, 3), (33, 200, 4), (31, 7, 40)):
        problem = KIND.problem(n, n if schedule == "own" else m, d, schedule=schedule, batch=batch)
        axes = {**PACKED, "BLOCK_K": tiles.power_of_two(d), "fusion": fusion, "precision": precision}
        for splits, sums in ((1, "atomic"), (4, "ordered")):
            variant = KIND.default(problem).with_(**axes, SPLITS=splits, sums=sums)
            assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), variant


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3])
def test_one_product_has_the_accuracy_of_fp32(eps: float) -> None:
    """Three dimensions in the unit cube, fp16x3 and bf16x6 against what fp32 itself makes of the same scores."""
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.rand(60, 3, generator=generator, dtype=torch.float64).float().double() - 0.5 for _ in range(2))
    scale = 2 * LOG2_E / eps
    given = {**sinkhorn.inputs(KIND.problem(60, 60, 3), 0), "x": x, "y": y, "scale": scale, "damping": 1.0, "step": 1.0}
    given["x_sq"], given["v"] = (x * x).sum(1), -0.5 * scale * (y * y).sum(1)
    for _ in range(50):
        u = -torch.logsumexp((given["v"] + scale * x @ y.T) * tiles.LN2 + given["b"].log(), 1) / tiles.LN2
        v = -torch.logsumexp((u[:, None] + scale * x @ y.T) * tiles.LN2 + given["a"].log()[:, None], 0) / tiles.LN2
        given["u"], given["v"] = u.float().double(), v.float().double()
    problem = KIND.problem(60, 60, 3)
    exact = sinkhorn.reference(problem, given)["u_out"]
    errors = {
        mode: float((run(problem, given, **PACKED, BLOCK_K=16, precision=mode)["u_out"].double() - exact).abs().max())
        for mode in ("fp16x3", "bf16x6", "bf16x3")
    }
    plain = float((run(problem, given, stabiliser="shifted")["u_out"].double() - exact).abs().max())
    assert max(errors["fp16x3"], errors["bf16x6"]) < 4 * plain + 1e-6
    assert errors["bf16x3"] > 4 * errors["fp16x3"], "sixteen bits are fewer"


@pytest.mark.parametrize("offset", [-9e4, -3000.0, -130.0, 130.0, 3000.0, 9e4])
def test_what_packed_operands_cannot_hold_is_redone(offset: float) -> None:
    """Out of the range of a shift, or of fp16 itself: NaN is seen, and the stored operands know better."""
    given = {**sinkhorn.inputs(SYMMETRIC, 1), "damping_a": 1.0, "damping_b": 1.0, "step": 1.0}
    expected = sinkhorn.reference(SYMMETRIC, given)["u_out"]
    given["u"][::7] += offset
    found = run(SYMMETRIC, given, **{**PACKED, "fusion": "one_sweep"}, precision="fp16x3", BLOCK_K=16)
    torch.testing.assert_close(found["u_out"], expected, rtol=1e-6, atol=2e-2 if abs(offset) > 3000 else 1e-3)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fusion": "half_step"}, "to the launch that updates"),
        ({"operands": "stored", "fusion": "half_step"}, "fp16x3 products are of packed operands"),
        ({"precision": "tf32"}, "not of 16 bits"),
        ({"bias": "added"}, "hold the biases"),
        ({"BLOCK_K": 32}, "all coordinates at once"),
        ({"precision": "bf16x6", "num_stages": 4, "BLOCK_N": 64}, "operands exceed"),
        ({"precision": "bf16x6", "d": 100, "BLOCK_K": 128}, "more than 512 columns"),
        ({}, ""),
    ],
)
def test_when_operands_can_be_packed(axes: dict[str, int | str], message: str) -> None:
    d = int(axes.pop("d", 64))
    problem = KIND.problem(4096, 4096, d)
    variant = KIND.default(problem).with_(**{**PACKED, "BLOCK_M": 128, "BLOCK_K": 64, "precision": "fp16x3", **axes})
    found = KIND.fits(problem, variant, gpu("a100"))
    assert message in found if message else found == ""


@pytest.mark.parametrize("bias", ["added", "mma"])
@pytest.mark.parametrize("sums", ["atomic", "ordered"])
@pytest.mark.parametrize("batch", [1, 3])
def test_programs_that_share_a_row_agree_with_float64(bias: str, sums: str, batch: int) -> None:
    """A half-step whose columns are split among programs, down to one tile each, and to none."""
    for n, m, d in ((1, 1, 1), (70, 45, 3), (33, 200, 17)):
        problem = KIND.problem(n, m, d, batch=batch)
        axes = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": tiles.power_of_two(d), "stabiliser": "shifted", "fusion": "split_step"}
        for splits in (2, 16):
            variant = KIND.default(problem).with_(**axes, bias=bias, sums=sums, SPLITS=splits)
            assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), variant


def test_only_a_shared_row_takes_a_second_launch() -> None:
    variant = KIND.default(ALTERNATING).with_(fusion="split_step", stabiliser="shifted")
    assert "to itself can update it" in KIND.fits(ALTERNATING, variant, gpu("a100"))
    assert KIND.fits(KIND.problem(4096, 4096, 8), variant.with_(SPLITS=8), gpu("a100")) == ""
    assert "common shift" in KIND.fits(ALTERNATING, variant.with_(SPLITS=8, stabiliser="running"), gpu("a100"))


@pytest.mark.parametrize("bias", [*IN_PRODUCT, "added"])
@pytest.mark.parametrize("by_fma", [1, 2, 4])
def test_exponentials_on_multiply_add_units_change_no_sum(bias: str, by_fma: int) -> None:
    """Nor what is redone: a shift far too low or too high is seen as on the other unit."""
    axes = {"stabiliser": "shifted", **IN_PRODUCT.get(bias, {})}
    for problem, fusion in ((ALTERNATING, "half_step"), (SYMMETRIC, "one_sweep"), (OWN, "half_sweep")):
        for offset in (0.0, -3000.0, -130.0, 130.0, 3000.0):
            given = sinkhorn.inputs(problem, 3)
            if problem != OWN:
                given["u"][::7] += offset
            plain, mixed = (run(problem, given, fusion=fusion, exp2_by_fma=k, **axes) for k in (0, by_fma))
            for name, value in plain.items():
                torch.testing.assert_close(mixed[name], value, rtol=1e-6, atol=1e-5)


STREAMED = ("alternating", "half_step"), ("symmetric", "one_launch"), ("symmetric", "one_sweep"), ("own", "half_sweep")


@pytest.mark.parametrize("bias", [*IN_PRODUCT, "added"])
@pytest.mark.parametrize("batch", [1, 3])
def test_columns_fetched_by_descriptor_are_those_of_pointers(bias: str, batch: int) -> None:
    """To the last bit where sums have an order: no tile, one, several and a part of one, no coordinate masked, or some."""
    axes = {"stabiliser": "shifted", **IN_PRODUCT.get(bias, {"BLOCK_M": 32, "BLOCK_N": 16})}
    for n, m, d in ((1, 1, 4), (33, 70, 20)):
        for schedule, fusion in STREAMED:
            problem = KIND.problem(n, n if schedule == "own" else m, d, schedule=schedule, batch=batch)
            own = {"fusion": fusion, "BLOCK_K": tiles.power_of_two(d), **({"SPLITS": 2} if fusion in sinkhorn.SWEPT else {})}
            given = KIND.inputs(problem, 0)
            pointers, descriptor = (run(problem, given, **axes, **own, loads=loads) for loads in ("pointers", "descriptor"))
            for name, value in pointers.items():
                torch.testing.assert_close(descriptor[name], value, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("precision", [mode for mode in MODES if MODES[mode].packed])
def test_packed_columns_fetched_by_descriptor_are_those_of_pointers(precision: str) -> None:
    """Of one or two depths; 3 coordinates too, of which stored points could have no descriptor."""
    for d in (3, 40):
        n, m = 33, 21
        for batch, (schedule, fusion) in ((1, ("alternating", "split_step")), (3, ("symmetric", "one_sweep"))):
            problem = KIND.problem(n, n if schedule == "own" else m, d, schedule=schedule, batch=batch)
            axes = {**PACKED, "BLOCK_K": tiles.power_of_two(d), "fusion": fusion, "precision": precision}
            given = KIND.inputs(problem, 0)
            pointers, descriptor = (run(problem, given, **axes, loads=loads) for loads in ("pointers", "descriptor"))
            for name, value in pointers.items():
                torch.testing.assert_close(descriptor[name], value, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("offset", [-3000.0, 130.0])
def test_what_was_fetched_by_descriptor_is_redone_by_pointers(offset: float) -> None:
    given = {**sinkhorn.inputs(SYMMETRIC, 1), "damping_a": 1.0, "damping_b": 1.0, "step": 1.0}
    given["x"], given["y"] = (torch.nn.functional.pad(given[name], (0, 3)) for name in ("x", "y"))
    expected = sinkhorn.reference(SYMMETRIC, given)["u_out"]
    given["u"][::7] += offset
    problem = KIND.problem(70, 45, 8, schedule="symmetric")
    for fusion in ("two_launches", "one_launch", "one_sweep"):
        found = run(problem, given, fusion=fusion, stabiliser="shifted", loads="descriptor")
        torch.testing.assert_close(found["u_out"], expected, rtol=1e-6, atol=1e-3)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a view that begins 4 bytes after an address of descriptors."""
    room = torch.empty(tensor.numel() + 1)
    view = room[1:].view(tensor.shape)
    return view.copy_(tensor)


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_launch_by_descriptor_refuses_what_is_not_aligned(name: str) -> None:
    problem = KIND.problem(70, 45, 8)
    variant = KIND.default(problem).with_(stabiliser="shifted", loads="descriptor")
    call = call_arguments(problem, sinkhorn.inputs(problem, 0), "cpu")
    call[name] = unaligned(call[name])
    with pytest.raises(ValueError, match=rf"expected {name} at a multiple of 16 bytes.*type {name}.clone\(\)"):
        load(problem, variant).launch(**call)


def test_operators_copy_what_is_not_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view into somebody's tensor is no error of theirs."""
    problem = KIND.problem(70, 45, 8)
    variant = KIND.default(problem).with_(stabiliser="shifted", loads="descriptor")
    found = ops.Streamed(load(problem, variant).launch, Choice(variant, "pinned"))  # type: ignore[arg-type]
    monkeypatch.setattr(ops, "kernel", lambda *_: found)
    call = call_arguments(problem, sinkhorn.inputs(problem, 0), "cpu")
    clouds = [call[name] for name in ("x", "y")]
    rest, options = [call[name] for name in ("u", "v", "b", "x_sq")], {"scale": call["scale"]}
    expected = ops.sinkhorn_half_step(*clouds, *rest, **options)
    for one, other in zip(ops.sinkhorn_half_step(*map(unaligned, clouds), *rest, **options), expected):
        assert torch.equal(one, other)


def test_a_launch_by_descriptor_leaves_the_callers_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets its own for its kernels, in whatever thread it is called, and for nobody else."""
    problem = KIND.problem(70, 45, 8)
    module = load(problem, KIND.default(problem).with_(stabiliser="shifted", loads="descriptor"))
    seen = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: seen.append(_allocation._allocator.get()(384, 128, None))

    monkeypatch.setattr(module, "half_step", Kernel())
    before = _allocation._allocator.get()
    thread = Thread(target=module.launch, kwargs=call_arguments(problem, sinkhorn.inputs(problem, 0), "cpu"))
    thread.start()
    thread.join()
    module.launch(**call_arguments(problem, sinkhorn.inputs(problem, 0), "cpu"))
    assert [(memory.numel(), memory.dtype) for memory in seen] == 2 * [(384, torch.int8)]
    assert _allocation._allocator.get() is before


@pytest.mark.parametrize(
    ("slug", "axes", "reason"),
    [
        ("h100", {}, ""),
        ("b200", {}, ""),
        ("rtx5090", {}, ""),
        ("a100", {}, "a100 has no unit that copies tiles"),
        ("mi300x", {"precision": "bf16"}, "mi300x has no unit that copies tiles"),
        ("h100", {"stabiliser": "running"}, "reads by pointers"),
        ("h100", {"BLOCK_K": 32}, "of all coordinates"),
        ("h100", {"d": 33}, "multiples of 16 bytes"),
        ("h100", {"d": 4, "BLOCK_K": 16, "dtype": "bf16", "precision": "bf16"}, "multiples of 16 bytes"),
        ("h100", {"d": 33, "operands": "packed", "bias": "wgmma", "precision": "fp16", "fusion": "split_step"}, ""),
    ],
    ids=str,
)
def test_where_columns_may_be_fetched_by_descriptor(slug: str, axes: dict[str, int | str], reason: str) -> None:
    axes = {"d": 64, "dtype": "fp32", **axes}
    problem = KIND.problem(4096, 4096, int(axes.pop("d")), str(axes.pop("dtype")))
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "precision": "tf32", "stabiliser": "shifted", "loads": "descriptor"}
    found = KIND.fits(problem, KIND.default(problem).with_(**{**tile, **axes}), gpu(slug))
    assert (reason in found) if reason else (found == "")


@pytest.mark.parametrize("bias", [*IN_PRODUCT, "added"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_order_of_programs_changes_no_sum(bias: str, batch: int) -> None:
    """Blocks that no group divides, parts without columns, problems of a batch that end early."""
    for schedule, fusion in (("symmetric", "one_sweep"), ("own", "half_sweep")):
        problem = KIND.problem(150, 150 if schedule == "own" else 45, 5, schedule=schedule, batch=batch)
        axes = {"BLOCK_M": 32, "BLOCK_N": 16, **IN_PRODUCT.get(bias, {}), "stabiliser": "shifted", "fusion": fusion, "SPLITS": 4}
        for group in (1, 8):
            variant = KIND.default(problem).with_(**axes, BLOCK_K=16, GROUP=group)
            assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), variant


@pytest.mark.parametrize(
    ("slug", "axes", "reason"),
    [
        ("h100", {}, ""),
        ("h100", {"operands": "packed", "precision": "fp16", "fusion": "split_step"}, ""),
        ("h100", {"num_stages": 2}, "copies ahead of their use"),
        ("h100", {"bias": "added"}, "read as rows are"),
        ("h100", {"loads": "descriptor"}, "says nothing of eviction"),
        ("mi300x", {"precision": "bf16"}, "said in PTX"),
    ],
    ids=str,
)
def test_where_l2_may_be_asked_to_keep_columns(slug: str, axes: dict[str, int | str], reason: str) -> None:
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 1, "precision": "tf32", "stabiliser": "shifted"}
    problem = KIND.problem(4096, 4096, 64)
    found = KIND.fits(problem, KIND.default(problem).with_(**{**tile, "bias": "wgmma", "eviction": "last", **axes}), gpu(slug))
    assert (reason in found) if reason else (found == "")


@pytest.mark.parametrize(
    ("n", "axes", "reason"),
    [
        (4096, {}, ""),
        (4096, {"SPLITS": 1}, "one part"),
        (512, {}, "one group"),
        (513, {}, ""),
        (1 << 30, {"fusion": "half_sweep"}, ""),
    ],
    ids=str,
)
def test_where_blocks_of_rows_may_be_grouped(n: int, axes: dict[str, int | str], reason: str) -> None:
    problem = KIND.problem(n, n, 64, schedule="own" if "fusion" in axes else "symmetric")
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "stabiliser": "shifted", "fusion": "one_sweep", "SPLITS": 4, "GROUP": 8}
    found = KIND.fits(problem, KIND.default(problem).with_(**{**tile, **axes}), gpu("a100"))
    assert (reason in found) if reason else (found == "")


@pytest.mark.parametrize("bias", IN_PRODUCT)
@pytest.mark.parametrize("value", [-torch.inf, -3e38, 900.0, torch.inf])
def test_a_weightless_column_of_any_potential_counts_for_nothing_in_a_product(bias: str, value: float) -> None:
    """Where 0·inf makes NaN of a sum, that row is redone."""
    given = {**sinkhorn.inputs(ALTERNATING, 2), "damping": 1.0, "step": 1.0}
    column = int((given["b"] == 0).nonzero()[0])
    expected = run(ALTERNATING, given, stabiliser="running")["u_out"]
    given["v"][column] = value
    found = run(ALTERNATING, given, stabiliser="shifted", **IN_PRODUCT[bias])["u_out"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("bias", IN_PRODUCT)
@pytest.mark.parametrize("fusion", ["two_launches", "one_sweep"])
def test_a_column_out_of_reach_adds_exactly_nothing(bias: str, fusion: str) -> None:
    """A potential of −1e30 takes a point out as its weight of zero does, to the last bit of the others' sums."""
    given = {**sinkhorn.inputs(SYMMETRIC, 2), "damping_a": 1.0, "damping_b": 1.0, "step": 1.0}
    given["u"][0] += 100.0
    column = int((given["b"] == 0).nonzero()[0])
    expected = run(SYMMETRIC, given, stabiliser="shifted", fusion=fusion, **IN_PRODUCT[bias])["rho"]
    given["v"][column] = -1e30
    given["b"][column] = 1.0
    assert torch.equal(run(SYMMETRIC, given, stabiliser="shifted", fusion=fusion, **IN_PRODUCT[bias])["rho"], expected)


@pytest.mark.parametrize(
    ("slug", "axes", "reason"),
    [
        ("a100", {}, ""),
        ("a100", {"stabiliser": "running"}, "no part of it can wait"),
        ("a100", {"BLOCK_K": 32}, "cannot be scaled afterwards"),
        ("a100", {"precision": "ieee"}, "at the price of many additions"),
        ("a100", {"BLOCK_M": 64, "BLOCK_N": 64}, "more rows than columns"),
        ("a100", {"bias": "wgmma"}, "has no matrix instruction that spans warps"),
        ("h100", {}, "a matrix instruction spans four warps here"),
        ("h100", {"BLOCK_N": 32}, ""),
        ("h100", {"bias": "wgmma"}, ""),
        ("h100", {"bias": "wgmma", "num_warps": 8}, "must have 16 columns"),
        ("h100", {"bias": "wgmma", "num_warps": 2}, "four warps or more"),
        ("mi300x", {"bias": "wgmma", "precision": "bf16"}, ""),
        ("mi300x", {"precision": "bf16"}, ""),
    ],
    ids=str,
)
def test_where_biases_may_come_from_the_product(slug: str, axes: dict[str, int | str], reason: str) -> None:
    problem = KIND.problem(4096, 4096, 64)
    tile = {
        "BLOCK_M": 128,
        "BLOCK_N": 64,
        "BLOCK_K": 64,
        "num_warps": 4,
        "precision": "tf32",
        "stabiliser": "shifted",
        "bias": "mma",
    }
    found = KIND.fits(problem, KIND.default(problem).with_(**{**tile, **axes}), gpu(slug))
    assert (reason in found) if reason else (found == "")
