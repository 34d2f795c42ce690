"""The loop family: every way to run the iterations gives what single steps give, stops where it should, and never waits in vain."""

from __future__ import annotations

import math
import multiprocessing
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from triton.runtime import interpreter

from otgen import iterations, ops, solve_sample, solve_sample_batch
from otgen.candidates import legal_variants
from otgen.families import family, loop, tiles
from otgen.gpus import GPUS
from otgen.iterations import sinkhorn_iterations
from otgen.losses import SamplesLoss
from otgen.override import override
from otgen.problem import Problem, Variant
from otgen.ranking import ranked
from otgen.render import load, source
from otgen.resources import template_hash
from otgen.solvers import annealing, sinkhorn
from otgen.solvers.steps import Steps
from otgen.store import Winner
from otgen.verify import call_arguments, failures, interpret, verify

LOOP = family("loop")

WAYS = [
    {"fusion": "streamed", "stabiliser": "running"},
    {"fusion": "streamed", "stabiliser": "shifted"},
    {"fusion": "streamed", "stabiliser": "shifted", "bias": "mma", "BLOCK_N": 16, "precision": "tf32x3"},
    {"fusion": "streamed", "stabiliser": "shifted", "PROGRAMS": 2},
    {"fusion": "streamed", "stabiliser": "shifted", "BLOCK_K": 32, "num_stages": 3},
    {"fusion": "resident", "stabiliser": "running"},
    {"fusion": "resident", "stabiliser": "shifted"},
]


def variant_of(problem: Problem, **axes: int | str) -> Variant:
    """The default in that way, in tiles of 32 × 32, one program a problem."""
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": tiles.power_of_two(problem.d), "num_stages": 1, "PROGRAMS": 1}
    default = LOOP.default(problem).with_(**tile)
    return default.with_(**axes)


def problem_of(n: int, m: int, d: int = 5, **flags: int | str) -> Problem:
    return LOOP.problem(n, n if flags.get("schedule") == "own" else m, d, **flags)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("schedule", loop.SCHEDULES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_iterations_agree_with_float64(way: dict[str, int | str], schedule: str, batch: int) -> None:
    """A course in which eps falls, marginals are relaxed, one row starts far off; awkward sizes, and one problem that rests."""
    problem = problem_of(1, 1, 40 if "BLOCK_K" in way else 5, schedule=schedule, batch=batch)
    assert not list(failures(interpret(problem, variant_of(problem, **way))))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 31), (32, 1), (31, 32), (17, 2)])
@pytest.mark.parametrize(("fusion", "schedule"), list(product(("streamed", "resident"), loop.SCHEDULES)))
def test_awkward_sizes(n: int, m: int, fusion: str, schedule: str) -> None:
    problem = problem_of(n, m, 1, schedule=schedule)
    variant = variant_of(problem, fusion=fusion, stabiliser="shifted")
    assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu")))


@pytest.mark.parametrize("fusion", ["streamed", "resident"])
@pytest.mark.parametrize("schedule", loop.SCHEDULES)
def test_it_stops_at_the_tolerance_with_the_potentials_of_that_iteration(schedule: str, fusion: str) -> None:
    problem = problem_of(30, 25, schedule=schedule)
    variant = variant_of(problem, fusion=fusion, stabiliser="shifted")
    given = LOOP.inputs(problem, 0)
    whole = LOOP.reference(problem, given)["missed"]
    stop = 5
    tol = float((whole[stop] + whole[stop - 1]) / 2)
    assert whole[:stop].min() > tol > whole[stop]  # what is missed falls

    found = call_arguments(problem, {**given, "tol": tol}, "cpu")
    load(problem, variant).launch(**found)
    fewer = call_arguments(problem, {**given, "iterations": stop + 1}, "cpu")
    load(problem, variant).launch(**fewer)

    assert found["missed"].isfinite().tolist() == [t <= stop for t in range(loop.ITERATIONS)]
    assert LOOP.reference(problem, {**given, "tol": tol})["missed"].isfinite().tolist() == found["missed"].isfinite().tolist()
    for name in ("u_out", "rho", *(() if problem.own else ("v_out", "gamma"))):
        assert torch.equal(found[name], fewer[name]), name


@pytest.mark.parametrize("fusion", ["streamed", "resident"])
def test_each_problem_of_a_batch_stops_for_itself(fusion: str) -> None:
    problem = problem_of(30, 25, schedule="symmetric", batch=3)
    variant = variant_of(problem, fusion=fusion, stabiliser="shifted")
    given = LOOP.inputs(problem, 0)
    found = call_arguments(problem, {**given, "tol": torch.tensor([1e9, -1.0, -1.0])}, "cpu")
    load(problem, variant).launch(**found)
    assert found["missed"].isfinite().sum(1).tolist() == [1, loop.ITERATIONS, loop.ITERATIONS]


@pytest.mark.parametrize("fusion", ["streamed", "resident"])
@pytest.mark.parametrize("schedule", ["alternating", "symmetric"])
def test_a_fall_of_eps_that_no_shift_survives_is_noticed(schedule: str, fusion: str) -> None:
    """In the middle of the course eps falls to a hundredth: exponentials of the old potentials overflow or vanish."""
    problem = problem_of(30, 25, schedule=schedule)
    given = LOOP.inputs(problem, 0)
    course = given["course"].clone()
    course[4:, 0] *= 100.0
    course[:, 1:3] = 0.0
    course[3, 4] = 100.0
    given |= {"course": course.float().double()}
    product = given["x"] @ given["y"].T
    before = LOOP.reference(problem, {**given, "course": given["course"][:4]})
    sums = torch.exp2(before["u_out"][:, None] + before["v_out"] + course[4, 0] * product) @ given["b"]
    assert sums.max() > 2.0**120 or sums.min() < 2.0**-80

    expected = LOOP.reference(problem, given)
    for stabiliser in ("running", "shifted"):
        found = call_arguments(problem, given, "cpu")
        variant = variant_of(problem, fusion=fusion, stabiliser=stabiliser)
        load(problem, variant).launch(**found)
        torch.testing.assert_close(found["u_out"].double(), expected["u_out"], rtol=1e-5, atol=2e-2)
        torch.testing.assert_close(found["rho"].double(), expected["rho"], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("schedule", loop.SCHEDULES)
@pytest.mark.parametrize("programs", [2, 3])
def test_programs_that_run_at_once_wait_for_each_other(schedule: str, programs: int) -> None:
    """Each program in a process of its own, over shared memory, where the interpreter's atomic operations are atomic.

    Every one comes to the end, and the result is that of one program alone.
    """
    problem = problem_of(70, 50, schedule=schedule)
    variant = variant_of(problem, stabiliser="shifted", PROGRAMS=2)
    alone = call_arguments(problem, LOOP.inputs(problem, 0), "cpu")
    module = load(problem, variant)
    module.launch(**alone)

    given = call_arguments(problem, LOOP.inputs(problem, 0), "cpu")
    given["missed"].zero_()
    n, m = problem.n, problem.m
    between = torch.empty(2 * (n if problem.own else n + m))
    arrived = torch.zeros(1, dtype=torch.int32)
    shared = [t.share_memory_() for t in (*(v for v in given.values() if isinstance(v, torch.Tensor)), between, arrived)]
    assert all(t.is_shared() for t in shared)
    order = "x y u u a a x_sq x_sq u_out u_out rho rho" if problem.own else "x y u v a b x_sq y_sq u_out v_out rho gamma"
    tensors = [given[name] for name in (*order.split(), "missed", "course")]
    scratch = [arrived] if schedule == "alternating" else [between, arrived]
    numbers = [n, m, given["tol"], given["step"], given["iterations"]]

    def run(own: int) -> None:
        builder = interpreter.interpreter_builder
        set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
        builder.set_grid_dim = lambda x, y, z: set_dim(programs, y, z)
        builder.set_grid_idx = lambda x, y, z: set_index(own, y, z)
        torch.set_num_threads(1)
        module.iterate[(1,)](*tensors, *scratch, *numbers, D=problem.d, MASK_K=True)

    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=run, args=(own,), daemon=True) for own in range(programs)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * programs
    for name in ("u_out", "rho", *(() if problem.own else ("v_out", "gamma"))):
        assert torch.equal(given[name], alone[name]), name
    torch.testing.assert_close(given["missed"], alone["missed"])


def test_a_grid_that_cannot_be_on_the_gpu_at_once_is_refused() -> None:
    problem = problem_of(4096, 4096, 64, schedule="symmetric")
    variant = variant_of(problem, PROGRAMS=128)
    assert LOOP.fits(problem, variant, GPUS["a100"]) == (
        "programs that wait for each other must all have a place: a100 has 108 multiprocessors"
    )
    assert not LOOP.fits(problem, variant, GPUS["h100"])
    batch = problem_of(4096, 4096, 64, schedule="symmetric", batch=64)
    assert "multiprocessors" in LOOP.fits(batch, variant.with_(PROGRAMS=4), GPUS["h100"])
    assert not LOOP.fits(batch, variant.with_(PROGRAMS=2), GPUS["h100"])


def test_a_resident_tile_is_listed_where_it_holds_the_problem() -> None:
    """Many programs want many points, a tile that is the whole problem few: one list has both."""
    for n, fusions in ((60, {"streamed", "resident"}), (1024, {"streamed"})):
        variants = legal_variants(problem_of(n, n, 64, schedule="symmetric", batch=64), GPUS["h100"])
        assert {variant["fusion"] for variant in variants} == fusions
        assert all(variant["PROGRAMS"] <= GPUS["h100"].sms // 64 for variant in variants)


def test_the_model_counts_the_tiles_of_every_iteration_and_its_waits() -> None:
    problem = problem_of(1000, 700, 64, schedule="symmetric")
    alone, together = (LOOP.work(problem, variant_of(problem, PROGRAMS=number)).launches[0] for number in (1, 8))
    assert alone.tiles == loop.ITERATIONS * (32 * 22 + 22 * 32)
    assert (together.programs, together.barriers, alone.barriers) == (8, loop.ITERATIONS, 0)
    assert together.tiles == loop.ITERATIONS * 7 * (32 * 22 + 22 * 32) / 54
    resident = LOOP.work(problem_of(30, 20, schedule="alternating", batch=4), variant_of(problem, fusion="resident"))
    assert (resident.launches[0].tiles, resident.products) == (2 * loop.ITERATIONS, 0)


@pytest.mark.parametrize(("n", "programs"), [(4096, 128), (1024, 64), (64, 4), (16, 1)])
def test_a_row_of_more_points_serves_fewer_with_fewer_programs(n: int, programs: int) -> None:
    tuned = problem_of(4096, 4096, schedule="own")
    variant = variant_of(tuned, PROGRAMS=128, BLOCK_M=16)
    row = Winner(tuned, "h100", "ieee", "measured", variant, None, 5.0, None, None, None, template_hash("loop"), 1, Path("own.db"))

    (candidate,) = ranked([row], problem_of(n, n, schedule="own"), GPUS["h100"], ("ieee",))

    assert (candidate.variant, candidate.refused) == (variant.with_(PROGRAMS=programs), "")


def test_loops_are_for_small_clouds_whose_steps_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or are started more slowly, by Python."""
    us = {"loop": 8.0 * loop.ITERATIONS, "sinkhorn": 9.0}
    monkeypatch.setattr(ops, "known_us", lambda family, *question: us[family])
    small, large = torch.rand(4096, 3), torch.rand(4097, 3)
    for per_iteration, step, own, alternating in (
        (1.1 * iterations.STARTED_US, 9.0, False, True),
        (1.1 * iterations.STARTED_US, 1.2 * iterations.STARTED_US, True, True),
        (2.1 * iterations.STARTED_US, 9.0, False, False),
        (50.0, math.inf, True, True),
        (math.inf, 9.0, False, False),
        (math.inf, math.inf, False, False),
    ):
        us |= {"loop": per_iteration * loop.ITERATIONS, "sinkhorn": step}
        assert iterations.pays(small, small, "own", ("ieee",)) == own
        assert iterations.pays(small, small, "alternating", ("ieee",)) == alternating
    us |= {"loop": 1.0, "sinkhorn": 1000.0}
    assert iterations.pays(small, small, "own", ("ieee",))
    assert not iterations.pays(small, large, "own", ("ieee",))
    assert not iterations.pays(small.double(), small.double(), "own", ("ieee",))
    with override(("sinkhorn", ops.OWN, Variant())):
        assert not iterations.pays(small, small, "own", ("ieee",))


def test_a_resident_tile_refuses_more_points_than_it_has() -> None:
    problem = problem_of(33, 20, schedule="symmetric")
    launch = load(problem, variant_of(problem, fusion="resident")).launch
    with pytest.raises(
        ValueError, match="at most 32 × 32 points, as fusion=resident keeps them; got 33 × 20; take fusion=streamed"
    ):
        launch(**call_arguments(problem, LOOP.inputs(problem, 0), "cpu"))


def test_only_programs_that_wait_are_launched_as_one() -> None:
    """A cooperative launch is refused by the driver when its programs cannot all run; one program needs none."""
    problem = problem_of(4096, 4096, 64, schedule="symmetric")
    assert 'options["launch_cooperative_grid"] = x.is_cuda' in source(problem, variant_of(problem, PROGRAMS=8))
    assert "launch_cooperative" not in source(problem, variant_of(problem, PROGRAMS=1))


@pytest.mark.parametrize(
    ("n", "m", "axes", "reason"),
    [
        (23, 22, {"fusion": "resident"}, "the largest of those that share its variant"),
        (22, 22, {"fusion": "resident", "num_stages": 2}, "nothing is left to stream"),
        (22, 22, {"fusion": "resident", "PROGRAMS": 2}, "one program"),
        (64, 64, {"PROGRAMS": 8}, "no rows"),
    ],
)
def test_what_does_not_fit(n: int, m: int, axes: dict[str, int | str], reason: str) -> None:
    problem = problem_of(n, m, schedule="symmetric")
    assert reason in LOOP.fits(problem, variant_of(problem, **axes), GPUS["h100"])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("schedule", loop.SCHEDULES)
def test_steps_one_after_the_other_agree_with_float64(schedule: str, batch: int) -> None:
    """The run where nothing is rendered: float64 on a CPU."""
    problem = problem_of(30, 25, schedule=schedule, batch=batch)
    given = LOOP.inputs(problem, 0)
    expected = LOOP.reference(problem, given)
    extents = {"extents": (given["rows"].int(), given["columns"].int())} if batch > 1 else {}
    names = ("x", "y", "u", "v", "a", "b", "x_sq", *(() if problem.own else ("y_sq",)))
    tensors = [given[name] for name in names] + ([given["x_sq"]] if problem.own else [])
    found = sinkhorn_iterations(
        *tensors, course=given["course"], schedule=schedule, step=given["step"], tol=given["tol"], **extents
    )
    for name, value in zip(("u_out", "v_out", "rho", "gamma", "missed"), found):
        if name in expected:
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
@pytest.mark.parametrize("fusion", ["streamed", "resident"])
@pytest.mark.parametrize("schedule", loop.SCHEDULES)
def test_a_run_is_its_single_steps(schedule: str, fusion: str) -> None:
    """One launch of k balanced iterations and k launches of one give potentials within a rounding of each other, or two."""
    problem = problem_of(30, 25, schedule=schedule)
    given = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in LOOP.inputs(problem, 0).items()}
    given["course"] = torch.tensor([[given["scale"], 0.0, 0.0, 0.0, 1.0]] * 4)
    u, v = given["u"], given["v"]
    at = {"scale": float(given["course"][0, 0]), "step": 0.5}
    x, y, a, b, x_sq = (given[name] for name in ("x", "y", "a", "b", "x_sq"))
    for _ in range(4):
        if schedule == "own":
            u, _ = ops.sinkhorn_own_step(x, y, u, a, x_sq, **at)
        elif schedule == "symmetric":
            u, v, _, _ = ops.sinkhorn_symmetric_step(x, y, u, v, a, b, x_sq, given["y_sq"], **at)
        else:
            u, _ = ops.sinkhorn_half_step(x, y, u, v, b, x_sq, **at)
            v, _ = ops.sinkhorn_half_step(y, x, v, u, a, given["y_sq"], **at)

    found = call_arguments(problem, {**LOOP.inputs(problem, 0), "course": given["course"], "iterations": 4}, "cpu")
    load(problem, variant_of(problem, fusion=fusion, stabiliser="shifted")).launch(**found)
    unit = torch.finfo(torch.float32).eps * float(u.abs().max())
    assert float((found["u_out"] - u).abs().max()) <= 8 * unit
    if not problem.own:
        assert float((found["v_out"] - v).abs().max()) <= 8 * unit


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("reach", [None, 0.7])
def test_a_divergence_is_one_launch_of_iterations_for_each_of_its_problems(
    monkeypatch: pytest.MonkeyPatch, reach: float | None, batch: tuple[int, ...]
) -> None:
    """Seven regularisations, three problems: three launches of loops, and those of the first and the last full update."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(*batch, 20, 2, generator=generator), torch.rand(*batch, 17, 2, generator=generator) + 0.2
    x.requires_grad_(True)
    loss = SamplesLoss(blur=0.1, scaling=0.6, reach=reach)
    with monkeypatch.context() as streamed:
        streamed.delenv("TRITON_INTERPRET")
        expected = loss(x, y)
        (slope,) = torch.autograd.grad(expected.sum(), x)

    monkeypatch.setattr(iterations, "pays", lambda *question: True)
    launched: list[tuple[str, str]] = []
    run = ops.run
    monkeypatch.setattr(ops, "run", lambda *given, **numbers: (launched.append((given[0], given[1][0][1])), run(*given, **numbers)))
    found = loss(x, y)
    assert [flag for name, flag in launched if name == "loop"] == ["symmetric", "own", "own"]
    assert sum(name == "sinkhorn" for name, _ in launched) == 6
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope, rtol=2e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
@pytest.mark.parametrize("method", ["alternating", "symmetric", "anderson"])
@pytest.mark.parametrize("several", [False, True])
def test_a_solve_runs_to_its_next_look_in_one_launch(monkeypatch: pytest.MonkeyPatch, method: str, several: bool) -> None:
    """As on a GPU, where the error is looked at after every eighth iteration: the answers are those of single steps."""
    monkeypatch.setattr(sinkhorn, "interval", lambda x: sinkhorn.GPU_INTERVAL)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 20, 2, generator=generator), torch.rand(2, 17, 2, generator=generator)
    solve = solve_sample_batch if several else solve_sample
    clouds = (x, y) if several else (x[0], y[0])
    options = {"reg": 0.05, "method": method, "tol": 1e-3, "debias": True}
    with monkeypatch.context() as streamed:
        streamed.delenv("TRITON_INTERPRET")
        expected = solve(*clouds, **options)

    monkeypatch.setattr(iterations, "pays", lambda *question: True)
    launched: list[str] = []
    run = ops.run
    monkeypatch.setattr(ops, "run", lambda *given, **numbers: (launched.append(given[0]), run(*given, **numbers)))
    found = solve(*clouds, **options)
    made = int(max(part.outcome.n_iters.max() if several else part.outcome.n_iters for part in found._divergence.solutions))
    assert launched.count("loop") >= 3
    assert launched.count("sinkhorn") <= 3 * (made + 12) / 2
    assert bool(torch.as_tensor(found.converged).all())
    torch.testing.assert_close(torch.as_tensor(found.value), torch.as_tensor(expected.value), rtol=2e-3, atol=1e-5)
    if not several:
        assert found.n_iters == expected.n_iters or method == "anderson"
        assert found.marginal_error == pytest.approx(expected.marginal_error, rel=0.05) or method == "anderson"


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
def test_an_iteration_of_a_loop_counts_as_the_two_sweeps_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a single step is one sweep."""
    monkeypatch.setattr(sinkhorn, "interval", lambda x: sinkhorn.GPU_INTERVAL)
    monkeypatch.setattr(Steps, "sweeps", 1)
    generator = torch.Generator().manual_seed(3)
    clouds = torch.rand(20, 2, generator=generator), torch.rand(17, 2, generator=generator)
    monkeypatch.setattr(iterations, "pays", lambda *question: False)
    stepped = solve_sample(*clouds, reg=0.05, method="symmetric", tol=1e-3)

    monkeypatch.setattr(iterations, "pays", lambda *question: True)
    lengths: list[int] = []
    run = Steps.run
    monkeypatch.setattr(Steps, "run", lambda self, u, v, eps, *given: (lengths.append(len(eps)), run(self, u, v, eps, *given))[1])
    looped = solve_sample(*clouds, reg=0.05, method="symmetric", tol=1e-3)

    assert looped.n_iters == stepped.n_iters
    assert looped.log["passes"] - stepped.log["passes"] == sum(lengths) > 0


@pytest.mark.filterwarnings("ignore::otgen.store.records.TuningWarning")
@pytest.mark.parametrize("unbalanced", [None, 0.5])
def test_the_stages_on_the_way_to_a_small_regularisation_are_one_launch(monkeypatch, unbalanced: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(20, 2, generator=generator), torch.rand(17, 2, generator=generator)
    options = {"reg": 5e-3, "unbalanced": unbalanced, "scaling": 0.7, "method": "alternating", "max_iter": 12, "tol": 1e-9}
    with monkeypatch.context() as streamed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streamed.delenv("TRITON_INTERPRET")
        expected = solve_sample(x, y, **options)

    monkeypatch.setattr(iterations, "pays", lambda *question: True)
    runs: list[int] = []
    run = ops.run
    monkeypatch.setattr(
        ops,
        "run",
        lambda *given, **numbers: (given[0] == "loop" and runs.append(given[3]["iterations"]), run(*given, **numbers)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = solve_sample(x, y, **options)
    assert runs[0] == len(annealing.stages(found._solution.steps, 0.7)[0]) > 3
    assert found.n_iters == expected.n_iters
    torch.testing.assert_close(found.potential_a, expected.potential_a, rtol=1e-3, atol=1e-4)
