"""The streamed PyTorch launches against the families' float64 references, and the seam that chooses between them and kernels."""

from __future__ import annotations

import pytest
import torch

from otgen import chunked, chunked_batch, chunked_debiased, dispatch, ops
from otgen.families import family
from otgen.problem import Spec, Variant

CASES = [
    ("sinkhorn", {"schedule": "alternating"}, chunked.half_step),
    ("sinkhorn", {"schedule": "symmetric"}, chunked.symmetric_step),
    ("sinkhorn", {"schedule": "own"}, chunked.own_step),
    ("sinkhorn", {"schedule": "debiased"}, chunked_debiased.debiased_step),
    ("transport", {"output": "vector"}, chunked.apply_vector),
    ("transport", {"output": "matrix", "width": 5}, chunked.apply_matrix),
    ("transport", {"output": "gradient"}, chunked.gradient),
    ("transport", {"output": "both", "width": 5}, chunked.apply_both),
    ("hvp", {"product": "matvec"}, chunked.matvec),
    ("hvp", {"product": "assembly"}, chunked.assemble),
]
SHAPES = [(1, 1, 1), (1, 700, 3), (700, 1, 2), (97, 131, 65), (512, 1024, 3)]
EXACT = Variant(precision="ieee")


def sized(shape, flags):
    """The shape, with columns that are its rows for a measure's transport to itself."""
    n, m, d = shape
    return n, n if flags.get("schedule") == "own" else m, d


def arguments(problem, dtype, seed=0):
    """Keyword arguments of a launch, outputs poisoned, with the float64 values they were made of."""
    given = family(problem.family).inputs(problem, seed)
    made = {}
    for name, argument in family(problem.family).arguments(problem).items():
        if isinstance(argument, Spec) and argument.role == "out":
            made[name] = torch.full(argument.shape, torch.nan, dtype=dtype)
        else:
            made[name] = given[name].to(dtype) if isinstance(argument, Spec) else given.get(name, argument)
    return made, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, shape)) for shape in SHAPES])
@pytest.mark.parametrize(("name", "flags", "launch"), CASES, ids=[case[2].__name__ for case in CASES])
def test_launch_agrees_with_the_family_reference(name, flags, launch, shape, dtype):
    problem = family(name).problem(*sized(shape, flags), **flags)
    made, given = arguments(problem, dtype)
    expected = family(name).reference(problem, given)
    budget = family(name).budget(problem, EXACT, given, expected)
    launch(**made)
    for output, value in expected.items():
        allowed = budget[output] if dtype == torch.float32 else 1e-9 * (1.0 + float(value.abs().max()))
        assert float((made[output].double() - value).abs().max()) <= allowed, output


BATCHES = [
    ("sinkhorn", {"schedule": "alternating"}, chunked_batch.half_step),
    ("sinkhorn", {"schedule": "symmetric"}, chunked_batch.symmetric_step),
    ("sinkhorn", {"schedule": "own"}, chunked_batch.own_step),
    ("sinkhorn", {"schedule": "debiased"}, chunked_debiased.debiased_steps),
    ("transport", {"output": "vector"}, chunked_batch.apply_vector),
    ("transport", {"output": "matrix", "width": 5}, chunked_batch.apply_matrix),
    ("transport", {"output": "gradient"}, chunked_batch.gradient),
    ("transport", {"output": "both", "width": 5}, chunked_batch.apply_both),
]


@pytest.mark.parametrize("tile", [64, 3000, 1 << 18], ids=["alone", "a few", "all"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 31, 3), (9, 60, 65)], ids=str)
@pytest.mark.parametrize(("name", "flags", "launch"), BATCHES, ids=[case[2].__name__ for case in BATCHES])
def test_batch_agrees_with_the_family_reference(name, flags, launch, shape, tile, monkeypatch):
    """Problems of five sizes, one resting, however many fit a tile."""
    monkeypatch.setattr(chunked_batch, "CPU_TILE", tile)
    problem = family(name).problem(*sized(shape, flags), batch=5, **flags)
    made, given = arguments(problem, torch.float64)
    made |= {extent: given[extent].int() for extent in ("rows", "columns")}
    launch(**made)
    for output, value in family(name).reference(problem, given).items():
        torch.testing.assert_close(made[output], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("schedule", "m", "launch"),
    [("symmetric", 37, chunked.symmetric_step), ("own", 1100, chunked.own_step)],
    ids=["symmetric", "own"],
)
def test_tiles_cover_every_pair_once_whatever_their_size(schedule, m, launch, monkeypatch):
    problem = family("sinkhorn").problem(1100, m, 3, schedule=schedule)
    monkeypatch.setattr(chunked, "CPU_TILE", 64)
    made, given = arguments(problem, torch.float64)
    (chunked.symmetric_step if schedule == "symmetric" else chunked.own_step)(**made)
    for output, value in family("sinkhorn").reference(problem, given).items():
        torch.testing.assert_close(made[output], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m", [512, 1024, 1536, 65536])
def test_tiles_avoid_the_strides_that_alias(m):
    _, width = chunked._tile(4096, m, 1 << 18)
    assert width % chunked.SLOW_STRIDE


def test_half_of_the_scores_do_for_a_measure_with_itself(monkeypatch):
    """Scores that are computed, of n²: a half, and half of a tile's rows."""
    counted = []
    kept = chunked.score_tiles

    def tiles(*factors, **options):
        for rows, columns, tile in kept(*factors, **options):
            counted.append(tile.numel())
            yield rows, columns, tile

    monkeypatch.setattr(chunked, "score_tiles", tiles)
    n = 6000
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_sq, a = x.square().sum(1), torch.full((n,), 1 / n, dtype=torch.float64)
    ops.sinkhorn_own_step(x, x, -0.5 * x_sq, a, x_sq, scale=1.0)
    assert sum(counted) <= 0.55 * n**2


def test_memory_stays_linear():
    """A million rows against a thousand columns would be 4 GB; a tile is a megabyte or so."""
    height, width = chunked._tile(1_000_000, 1_000, chunked.CPU_TILE)
    assert height * width <= 2 * chunked.CPU_TILE


@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_rows_and_columns_too_far_off_are_redone(offset):
    """Far from T(v) a shifted sum over- or underflows; the update must not notice, for the rows and the columns."""
    problem = family("sinkhorn").problem(40, 50, 3, schedule="symmetric")
    made, given = arguments(problem, torch.float32)
    given["u"][5] += offset
    given["v"][7] -= offset
    made |= {"u": given["u"].float(), "v": given["v"].float()}
    expected = family("sinkhorn").reference(problem, given)
    budget = family("sinkhorn").budget(problem, EXACT, given, expected)
    chunked.symmetric_step(**made)
    for output in ("u_out", "v_out"):
        assert float((made[output].double() - expected[output]).abs().max()) <= budget[output] + 1e-6 * 3000


@pytest.mark.parametrize("launch", [chunked.half_step, chunked.symmetric_step])
def test_a_point_without_weight_is_never_looked_at(launch):
    """Its potential overflows every exponential, alone and against a row without weight; the others must not notice."""
    schedule = "alternating" if launch is chunked.half_step else "symmetric"
    problem = family("sinkhorn").problem(30, 40, 2, schedule=schedule)
    made, _ = arguments(problem, torch.float64)
    clean, _ = arguments(problem, torch.float64)
    for case, potential in ((made, 5000.0), (clean, 0.0)):
        case["b"][3] = 0.0
        case["v"][3] = potential
    launch(**made)
    launch(**clean)
    torch.testing.assert_close(made["u_out"], clean["u_out"])
    torch.testing.assert_close(made["rho"], clean["rho"])


class Recorder:
    """Stands for `otgen.dispatch.kernel`: remembers what was asked for and computes it with the streamed launch."""

    def __init__(self):
        self.asked = []

    def __call__(self, family, gpu, n, m, d, dtype, flags, modes):
        self.asked.append((family, gpu, n, m, d, dtype, flags, modes))
        launch = ops.STREAMED.get(flags, ops.STREAMED_MATRIX).launch
        return dispatch.Kernel(dispatch.Choice(EXACT, "default"), launch)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "kernel", recorder := Recorder())
    return recorder


def test_the_seam_asks_dispatch_for_what_the_clouds_are(recorder):
    x, y, u, v = torch.zeros(4, 2), torch.zeros(6, 2), torch.zeros(4), torch.zeros(6)
    a, b = torch.full((4,), 0.25), torch.full((6,), 1 / 6)
    modes = ("ieee", "tf32x3")
    ops.sinkhorn_half_step(x, y, u, v, b, u, scale=1.0, modes=modes)
    ops.sinkhorn_half_step(y, x, v, u, a, v, scale=1.0)
    ops.sinkhorn_symmetric_step(x, y, u, v, a, b, u, v, scale=1.0)
    ops.apply_plan(x, y, u, v, a, b, v, scale=1.0)
    ops.apply_plan(x, y, u, v, a, b, torch.zeros(6, 3), scale=1.0)
    ops.plan_gradient(x, y, u, v, a, b, u, scale=1.0)
    ops.hvp_matvec(x, y, u, v, a, b, v, u, scale=1.0, alpha=1.0, beta=0.0)
    ops.hvp_assemble(x, y, u, v, a, b, u, x, u, v, scale=1.0, cost=1.0, inverse_eps=1.0)
    assert recorder.asked[0] == ("sinkhorn", "a100", 4, 6, 2, "fp32", (("schedule", "alternating"),), modes)
    assert recorder.asked[1][2:4] == (6, 4)
    for asked in recorder.asked:
        flags = dict(asked[6])
        assert family(asked[0]).problem(*asked[2:5], asked[5], **flags).flags == asked[6]


def test_float64_and_plain_cpu_tensors_never_reach_dispatch(recorder, monkeypatch):
    for dtype, interpret in ((torch.float64, "1"), (torch.float32, "0")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        x, u = torch.zeros(3, 2, dtype=dtype), torch.zeros(3, dtype=dtype)
        weights = torch.full_like(u, 1 / 3)
        new, rho = ops.sinkhorn_half_step(x, x, u, u, weights, u, scale=1.0)
        assert new.dtype == dtype
        torch.testing.assert_close(rho, torch.ones_like(u))
        assert ops.kernel("sinkhorn", x, x, ops.ALTERNATING, ("ieee",)).choice is None
    assert recorder.asked == []
