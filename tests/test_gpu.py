"""On a real GPU: every kind of variant against float64, the redo, 64-bit offsets, the solver, and what must not happen.

Skipped without one. Run with `TRITON_INTERPRET=0 pytest -m gpu`, or `python benchmarks/gpu.py tests`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from kinds import every

import otgen
from otgen import ops
from otgen.candidates import Refinements
from otgen.errors import ConvergenceWarning
from otgen.families import FAMILIES, family, sinkhorn
from otgen.families.sinkhorn import SWEPT
from otgen.gpus import detect
from otgen.measure import FEWEST, Points, measure
from otgen.precision import MODES
from otgen.problem import Problem, Variant
from otgen.render import load
from otgen.resources import resource
from otgen.store import read_winners
from otgen.verify import call_arguments, failures, verify

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::otgen.store.TuningWarning")]

MASKED = 40
"""Dimensions: two reads of 32 coordinates, the second masked, or one masked read of 64."""


def problems(n: int, m: int, d: int) -> list[Problem]:
    """One problem of every family and standard combination of flags."""
    return [problem for kind in FAMILIES.values() for problem in every(kind, n, m, d)]


def variants(problem: Problem) -> Iterator[Variant]:
    """Every precision mode with both stabilisers and every fusion; resident and looped, warps and stages take turns.

    Every way to add biases besides, with every precision mode and fusion.
    """
    fusions = family(problem.family).axes(problem).get("fusion", ("",))
    base = family(problem.family).default(problem).with_(BLOCK_M=64, BLOCK_N=32)
    for (i, mode), (j, stabiliser), fusion in product(enumerate(MODES), enumerate(("running", "shifted")), fusions):
        if fusion in SWEPT and stabiliser == "running":
            continue
        own = {"fusion": fusion} if fusion else {}
        if fusion in ("", "one_sweep"):
            own["SPLITS"] = (1, 4)[(i + j) % 2]
        yield base.with_(
            precision=mode,
            stabiliser=stabiliser,
            BLOCK_K=(32, 64)[(i + j) % 2],
            num_warps=(4, 8)[i % 2],
            num_stages=1 + (i + j) % 3,
            **own,
        )
        if stabiliser == "shifted":
            for bias in family(problem.family).axes(problem).get("bias", ())[1:]:
                resident = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1 + i % 2}
                yield base.with_(precision=mode, stabiliser=stabiliser, bias=bias, **resident, **own)


CASES = [pytest.param(p, v, id=f"{p.family}-{p.flag_text}-{v.text}") for p in problems(131, 157, MASKED) for v in variants(p)]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted; set TRITON_INTERPRET=0")


@pytest.mark.parametrize(("problem", "variant"), CASES)
def test_every_kind_of_variant_agrees_with_float64(problem: Problem, variant: Variant) -> None:
    misfit = family(problem.family).fits(problem, variant, detect())
    if misfit:
        pytest.skip(misfit)
    assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cuda")))


@pytest.mark.parametrize("bias", ["added", "mma", "wgmma"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("schedule", "fusion"), [("alternating", "half_step"), ("symmetric", "one_sweep"), ("own", "half_sweep")])
def test_every_refinement_agrees_with_float64(bias: str, batch: int, schedule: str, fusion: str) -> None:
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 1, "stabiliser": "shifted"}
    problem = family("sinkhorn").problem(500, 500 if schedule == "own" else 301, MASKED, schedule=schedule, batch=batch)
    split = {"SPLITS": 4} if schedule != "alternating" else {}
    variant = family("sinkhorn").default(problem).with_(**tile, **split, bias=bias, fusion=fusion, precision="tf32")
    refinements = Refinements(problem, detect())
    if not refinements.allow(variant):
        pytest.skip(family("sinkhorn").fits(problem, variant, detect()))
    for refined in refinements.near(variant):
        assert not list(failures(verify(problem, refined, load(problem, refined).launch, "cuda"))), refined


def test_a_launch_by_descriptor_can_be_captured_in_a_cuda_graph() -> None:
    """Its descriptors are in the graph's own memory."""
    problem = family("sinkhorn").problem(500, 301, MASKED)
    axes = {"BLOCK_K": 64, "stabiliser": "shifted", "loads": "descriptor"}
    variant = family("sinkhorn").default(problem).with_(**axes)
    if misfit := family("sinkhorn").fits(problem, variant, detect()):
        pytest.skip(misfit)
    call = call_arguments(problem, sinkhorn.inputs(problem, 0), "cuda")
    launch = load(problem, variant).launch
    launch(**call)
    torch.cuda.synchronize()
    expected, graph = call["u_out"].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(**call)
    call["u_out"].fill_(torch.nan)
    junk = [torch.randn(1000, device="cuda") for _ in range(100)]
    graph.replay()
    assert torch.equal(call["u_out"], expected)
    assert len(junk) == 100


@pytest.mark.parametrize("problem", problems(1, 1, 1) + problems(65, 33, 17), ids=str)
def test_awkward_sizes_agree_with_float64(problem: Problem) -> None:
    variant = family(problem.family).default(problem)
    assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cuda")))


@pytest.mark.parametrize("problem", problems(16385, 8195, 64), ids=str)
def test_a_large_problem_is_measured_and_agrees_with_float64(problem: Problem) -> None:
    axes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "precision": "tf32", "stabiliser": "shifted"}
    variant = family(problem.family).default(problem).with_(**axes)
    checks, timing = measure(problem, variant)
    assert not list(failures(checks))
    assert timing is not None
    assert min(timing.samples_us + timing.default_us) > 0
    assert len(timing.samples_us) == len(timing.default_us) >= FEWEST


@pytest.mark.parametrize("problem", problems(4096, 4096, 64), ids=str)
def test_shipped_winners_agree_with_float64(problem: Problem) -> None:
    path = resource("tuning_db") / f"{detect().slug}.db"
    if not path.exists():
        pytest.skip(f"nothing is shipped for {detect().slug}")
    found = [winner.variant for winner in read_winners(path, family=problem.family) if winner.problem == problem]
    points = Points.of(problem)
    for variant in found:
        call = call_arguments(problem, points.given(), "cuda")
        load(problem, variant).launch(**call)
        assert not list(failures(points.compare(variant, call))), variant


@pytest.mark.parametrize("fusion", ["half_step", "two_launches", "one_launch", "one_sweep"])
@pytest.mark.parametrize("offset", [-3000.0, -130.0, 130.0, 3000.0])
@pytest.mark.parametrize("every", [1, 7])
def test_a_shift_out_of_range_is_redone(fusion: str, offset: float, every: int) -> None:
    """u* does not depend on u: however wrong the shift, the kernel must find it; rho itself may leave fp32's range."""
    schedule = "alternating" if fusion == "half_step" else "symmetric"
    problem = family("sinkhorn").problem(300, 211, MASKED, schedule=schedule)
    full = {"damping": 1.0, "damping_a": 1.0, "damping_b": 1.0, "step": 1.0}
    given = {**sinkhorn.inputs(problem, 1), **full}
    expected = sinkhorn.reference(problem, given)["u_out"]
    given["u"][::every] += offset
    call = call_arguments(problem, given, "cuda")
    load(problem, family("sinkhorn").default(problem).with_(stabiliser="shifted", fusion=fusion)).launch(**call)
    torch.testing.assert_close(call["u_out"].cpu().double(), expected, rtol=1e-6, atol=1e-3)


def clouds(n: int, m: int, d: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x (n, d), y (m, d), a (n,), b (m,), the weights of mass one."""
    generator = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (m, d), (n,), (m,)))
    return [tensor.to(dtype) for tensor in (x, y + 0.2, a / a.sum(), b / b.sum())]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", ["added", "mma", "wgmma"])
def test_half_steps_over_listed_columns_agree_with_float64(bias: str, mode: str) -> None:
    problem = family("sinkhorn").problem(1000, 900, 3, listed=128)
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "precision": mode, "bias": bias}
    for stages in (1, 2, 3):
        variant = family("sinkhorn").default(problem).with_(**tile, num_stages=stages)
        if misfit := family("sinkhorn").fits(problem, variant, detect()):
            pytest.skip(misfit)
        assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cuda"))), variant


def test_half_steps_over_listed_columns_are_measured() -> None:
    problem = family("sinkhorn").problem(16385, 8195, 3, listed=128)
    checks, timing = measure(problem, family("sinkhorn").default(problem).with_(BLOCK_M=128, BLOCK_N=64, precision="tf32x3"))
    assert not list(failures(checks))
    assert timing is not None


@pytest.mark.parametrize("method", ["anderson", "symmetric"])
@pytest.mark.filterwarnings("ignore::otgen.errors.ConvergenceWarning")
def test_a_solve_with_lists_gives_what_all_tiles_do(method: str) -> None:
    x, y, a, b = (tensor.cuda() for tensor in clouds(20000, 15000, 3, torch.float32))
    asked = {"reg": 1e-3, "precision": "fp32", "method": method, "max_iter": 40, "tol": 1e-4}
    found, expected = (otgen.solve_sample(x, y, a, b, **asked, tiles=tiles) for tiles in ("listed", "all"))
    assert found.visited < 0.5
    assert 0.0 < found.omitted_mass <= 1.01e-7
    torch.testing.assert_close(found.potential_a, expected.potential_a, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.marginal_a, expected.marginal_a, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("method", ["alternating", "symmetric"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 3e-4), (torch.float64, 1e-9)])
def test_the_gpu_solves_what_the_cpu_solves(method: str, dtype: torch.dtype, near: float) -> None:
    """Same number of steps from the same start, so the same pair, also before it has converged."""
    options = {"reg": 0.1, "method": method, "max_iter": 16, "tol": 0.0}
    given = clouds(700, 500, 5)
    with pytest.warns(ConvergenceWarning):
        expected = otgen.solve_sample(*given, **options)
    precision = "fp32" if dtype == torch.float32 else "auto"
    with pytest.warns(ConvergenceWarning):
        found = otgen.solve_sample(*(tensor.to("cuda", dtype) for tensor in given), **options, precision=precision)
    assert found.value.is_cuda
    assert found.value.dtype == dtype
    assert found.n_iters == expected.n_iters
    for name in ("value", "value_linear", "potential_a", "potential_b", "marginal_a", "marginal_b", "a_to_b", "b_to_a"):
        torch.testing.assert_close(getattr(found, name).cpu().double(), getattr(expected, name), rtol=near, atol=near)


@pytest.mark.parametrize("tol", [1e-2, 1e-3])
def test_automatic_precision_reaches_the_tolerance(tol: float) -> None:
    given = clouds(3000, 2000, 3)
    found = otgen.solve_sample(*(tensor.to("cuda", torch.float32) for tensor in given), reg=0.05, tol=tol)
    assert found.stop == "tol"
    f, g = found.potential_a.cpu().double(), found.potential_b.cpu().double()
    x, y, a, b = given
    plan = a[:, None] * b * torch.exp((f[:, None] + g - torch.cdist(x, y).square()) / 0.05)
    assert float((plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()) < 1.5 * tol


def test_gradients_agree_with_the_cpu() -> None:
    gradients = []
    for device, dtype, precision in (("cpu", torch.float64, "auto"), ("cuda", torch.float32, "fp32")):
        given = [tensor.to(device, dtype).requires_grad_() for tensor in clouds(300, 200, 4)]
        otgen.solve_sample(*given, reg=0.3, tol=1e-5, precision=precision).value.backward()
        x, y, a, b = (tensor.grad.cpu().double() for tensor in given)
        gradients.append((x, y, a - a.mean(), b - b.mean()))
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{}, {"method": "symmetric"}, {"debias": True}, {"unbalanced": 0.5}], ids=str)
def test_a_ragged_batch_agrees_with_the_cpu(options: dict[str, object]) -> None:
    """Values and gradients of problems of very different sizes, solved side by side."""
    sizes = [(700, 500), (1, 40), (33, 1), (257, 300)]
    parts = [clouds(n, m, 5) for n, m in sizes]
    owners = [torch.cat([torch.full((size[side],), i) for i, size in enumerate(sizes)]) for side in (0, 1)]
    found = {}
    for device, dtype, tol in (("cpu", torch.float64, 1e-8), ("cuda", torch.float32, 1e-4)):
        given = [torch.cat([part[k] for part in parts]).to(device, dtype).requires_grad_() for k in range(4)]
        batch_a, batch_b = (owner.to(device) for owner in owners)
        more = {"batch_a": batch_a, "batch_b": batch_b, "reg": 0.3, "tol": tol, "max_iter": 5000, **options}
        value = otgen.solve_sample_batch(*given, **more).value
        value.sum().backward()
        found[device] = [tensor.detach().cpu().double() for tensor in (value, given[0].grad, given[1].grad)]
    for mine, expected in zip(found["cuda"], found["cpu"]):
        torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def steps(n: int, m: int, d: int) -> dict[str, torch.Tensor]:
    """Arguments of a symmetric step on the device, near its solution."""
    given = Points.of(family("sinkhorn").problem(n, m, d, schedule="symmetric")).given()
    names = ("x", "y", "u", "v", "a", "b", "x_sq", "y_sq")
    return {name: given[name].float().contiguous().cuda() for name in names}


def test_no_operation_waits_for_the_gpu() -> None:
    g = steps(1000, 900, 16)
    column = torch.ones_like(g["v"])

    def everything() -> None:
        ops.sinkhorn_symmetric_step(**g, scale=7.2)
        half = {name: g[name] for name in ("x", "y", "u", "v", "b", "x_sq")}
        ops.sinkhorn_half_step(**half, scale=7.2)
        plan = {name: g[name] for name in ("x", "y", "u", "v", "a", "b")}
        ops.apply_plan(**plan, values=column, scale=7.2)
        ops.apply_plan(**plan, values=g["y"], scale=7.2)
        ops.plan_gradient(**plan, marginal=g["a"], scale=7.2)
        ops.apply_plan_both(**plan, values=g["y"], values_t=g["x"], scale=7.2)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_captured_in_a_cuda_graph() -> None:
    g = steps(1000, 900, 16)
    ops.sinkhorn_symmetric_step(**g, scale=7.2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sinkhorn_symmetric_step(**g, scale=7.2)
    g["v"].add_(1.0)
    graph.replay()
    expected = ops.sinkhorn_symmetric_step(**g, scale=7.2)
    for found, value in zip(captured, expected):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["half_step", "two_launches", "one_launch", "one_sweep"])
def test_repeated_launches_agree(fusion: str) -> None:
    """To the last bit, unless sums are added up by atomics, whose order varies."""
    schedule = "alternating" if fusion == "half_step" else "symmetric"
    problem = family("sinkhorn").problem(3001, 2003, 64, schedule=schedule)
    launch = load(problem, family("sinkhorn").default(problem).with_(stabiliser="shifted", fusion=fusion)).launch
    given = Points.of(problem).given()
    runs = [call_arguments(problem, given, "cuda") for _ in range(3)]
    for call in runs:
        launch(**call)
    for name in ("u_out", "rho"):
        for call in runs[1:]:
            near = 1e-5 if fusion == "one_sweep" else 0.0
            torch.testing.assert_close(call[name], runs[0][name], rtol=near, atol=near)


HUGE, WIDE = 2**25 + 3, 65
"""HUGE·WIDE coordinates pass 2³¹; the points from FAR on lie beyond it."""
FAR = 2**31 // WIDE


def huge_cloud(count: int) -> torch.Tensor:
    """(HUGE, WIDE) coordinates, those beyond 2³¹ elements shifted. Skips the test unless `count` such tensors fit."""
    torch.cuda.empty_cache()
    need = int(1.1 * count * 4 * HUGE * WIDE)
    free = torch.cuda.mem_get_info()[0]
    if free < need:
        pytest.skip(f"needs {need / 1e9:.0f} GB of GPU memory; {free / 1e9:.0f} GB are free")
    cloud = torch.empty(HUGE, WIDE, device="cuda").normal_(std=0.1)
    cloud[FAR:] += 0.5
    return cloud


def row_scores(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.exp2(x.double() @ y.double().T)


def test_rows_beyond_two_to_the_31_elements() -> None:
    x, y = huge_cloud(1), torch.randn(7, WIDE, device="cuda")
    zeros, b = torch.zeros(HUGE, device="cuda"), torch.full((7,), 1.0 / 7, device="cuda")
    u_out, rho = (torch.full_like(zeros, torch.nan) for _ in range(2))
    problem = family("sinkhorn").problem(HUGE, 7, WIDE)
    vectors = {"u": zeros, "v": torch.zeros_like(b), "b": b, "x_sq": zeros, "u_out": u_out, "rho": rho}
    load(problem, family("sinkhorn").default(problem)).launch(x=x, y=y, **vectors, scale=1.0, damping=1.0, step=1.0)
    for part in (slice(0, 500), slice(FAR - 250, FAR + 250), slice(HUGE - 500, HUGE)):
        torch.testing.assert_close(rho[part].double(), row_scores(x[part], y).mean(1), rtol=1e-4, atol=0.0)
    assert bool(rho.isfinite().all())


def test_columns_beyond_two_to_the_31_elements() -> None:
    """The far columns have half of the weight, so reading others in their place would show."""
    y, x = huge_cloud(1), torch.randn(33, WIDE, device="cuda")
    b = torch.full((HUGE,), 0.5 / FAR, device="cuda")
    b[FAR:] = 0.5 / (HUGE - FAR)
    zeros = torch.zeros(33, device="cuda")
    u_out, rho = (torch.full_like(zeros, torch.nan) for _ in range(2))
    problem = family("sinkhorn").problem(33, HUGE, WIDE)
    vectors = {"u": zeros, "v": torch.zeros_like(b), "b": b, "x_sq": zeros, "u_out": u_out, "rho": rho}
    variant = family("sinkhorn").default(problem).with_(BLOCK_N=128)
    load(problem, variant).launch(x=x, y=y, **vectors, scale=1.0, damping=1.0, step=1.0)
    chunks = (slice(start, start + 2**22) for start in range(0, HUGE, 2**22))
    expected = sum(row_scores(x, y[part]) @ b[part].double() for part in chunks)
    torch.testing.assert_close(rho.double(), expected, rtol=1e-3, atol=0.0)


def test_gradients_beyond_two_to_the_31_elements() -> None:
    x, y = huge_cloud(2), torch.randn(7, WIDE, device="cuda")
    a, b = torch.ones(HUGE, device="cuda"), torch.full((7,), 1.0 / 7, device="cuda")
    out = torch.full((HUGE, WIDE), torch.nan, device="cuda")
    problem = family("transport").problem(HUGE, 7, WIDE, output="gradient")
    vectors = {"u": torch.zeros_like(a), "v": torch.zeros_like(b), "a": a, "b": b, "marginal": a, "out": out}
    load(problem, family("transport").default(problem)).launch(x=x, y=y, **vectors, scale=1.0, cost=1.0)
    for part in (slice(0, 500), slice(FAR - 250, FAR + 250), slice(HUGE - 500, HUGE)):
        expected = 2.0 * (x[part].double() - row_scores(x[part], y) / 7 @ y.double())
        torch.testing.assert_close(out[part].double(), expected, rtol=1e-4, atol=1e-3)
