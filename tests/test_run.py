"""The search of one problem, with the compiler and the checker replaced by tables: what is stored, checked and decided."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from otgen import precision
from otgen.attempt import Attempt
from otgen.candidates import by_mode, legal_modes, legal_variants, score, siblings
from otgen.compile import Inspection
from otgen.errors import CompileError
from otgen.families import family
from otgen.gpus import gpu
from otgen.isa import Mix
from otgen.measure import Timing
from otgen.model import predict
from otgen.pool import Outcome
from otgen.problem import Problem, Variant
from otgen.render import kernels_digest, source
from otgen.run import Progress, Run, Session
from otgen.store import RESOLUTION, Store, Winner
from otgen.verify import Accuracy
from otgen.workload import CompiledLaunch, launch_costs

A100 = gpu("a100")
PROBLEM = family("sinkhorn").problem(4096, 4096, 64)
MODES = len(legal_modes(PROBLEM, A100))


def launch(variant: Variant, *, spills: int = 0, slots: float = 5.0) -> CompiledLaunch:
    pairs = variant.int("BLOCK_M") * variant.int("BLOCK_N") / (32 * variant.int("num_warps"))
    return CompiledLaunch("half_step", variant.int("num_warps"), 128, spills, 32768, Mix(slots=slots * pairs, mufu=pairs))


class Bench:
    """Stands in for the pool: answers each task at once from `compiled`, `checked` and `measured`.

    An answer may be an Outcome without a key: what became of the worker. A group of variants shares the fate of the first such one.
    """

    def __init__(
        self,
        compiled: Callable[[Variant], Any] = lambda variant: [launch(variant)],
        checked: Callable[[Variant], Any] = lambda variant: [Accuracy("u_out", 1e-6, 1e-4)],
        measured: Callable[[Variant], Any] | None = None,
    ) -> None:
        self._answers = {"compile": compiled, "check": checked, "measure": measured}
        self._queue: list[tuple[str, Any]] = []
        self.asked: list[tuple[str, Variant]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, role: str, key: Any, function: Any, *arguments: Any) -> None:
        self._queue.append((role, key))
        self.asked += [(role, attempt.variant) for attempt in (key if role == "compile" else [key])]

    def next(self) -> Outcome:
        role, key = self._queue.pop(0)
        answer = self._answers[role]
        assert answer is not None
        value = [self._inspected(answer, attempt) for attempt in key] if role == "compile" else answer(key.variant)
        lost = next((entry for entry in (value if role == "compile" else [value]) if isinstance(entry, Outcome)), None)
        return replace(lost, key=key) if lost else Outcome(key, "ok", value=value, seconds=0.1)

    @staticmethod
    def _inspected(answer: Callable[[Variant], Any], attempt: Attempt) -> Any:
        try:
            launches = answer(attempt.variant)
        except CompileError as error:
            return Inspection([], error, 0.1)
        digest = kernels_digest(source(attempt.problem, attempt.variant))
        return launches if isinstance(launches, Outcome) else Inspection(launches, None, 0.1, digest)


def search(
    path: Path, bench: Bench, max_trials: int = 5 * MODES, measured: bool = False, problem: Problem = PROBLEM
) -> tuple[list[Winner], Store, Run]:
    store = Store.open(path / "tuning.db")
    environment = store.environment({"gpu": "a100", "triton": version("triton")})
    session = Session(A100, store, bench, environment, measured, 2, "tpe", 0, Progress(problem), lambda progress: None)  # type: ignore[arg-type]
    run = Run(problem, max_trials, session)
    run.search(math.inf)
    return store.decide(problem, "a100"), store, run


def test_every_mode_gets_its_share_and_a_checked_winner(tmp_path: Path) -> None:
    bench = Bench()
    winners, store, run = search(tmp_path, bench)
    trials = store.trials(PROBLEM, "a100")
    assert run.added == len(trials) == 5 * MODES
    assert {winner.precision for winner in winners} == set(legal_modes(PROBLEM, A100))
    checked = {variant for role, variant in bench.asked if role == "check"}
    for winner in winners:
        assert winner.variant in checked
        assert winner.evidence == "predicted"
        mine = [t.predicted_us for t in trials if t.variant["precision"] == winner.precision and t.predicted_us]
        assert winner.predicted_us == min(mine)


def test_a_run_that_goes_on_repeats_nothing(tmp_path: Path) -> None:
    search(tmp_path, Bench(), 3 * MODES)
    second = Bench()
    _, store, run = search(tmp_path, second, 5 * MODES)
    assert run.added == 2 * MODES
    variants = [trial.variant for trial in store.trials(PROBLEM, "a100")]
    assert len(set(variants)) == len(variants) == 5 * MODES
    third = Bench()
    _, _, run = search(tmp_path, third, 5 * MODES)
    assert (run.added, third.asked) == (0, [])


def test_a_run_with_nothing_left_to_try_enumerates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winners, _, _ = search(tmp_path, Bench(), MODES)
    enumerated: list[Problem] = []
    monkeypatch.setattr(
        "otgen.mode.legal_variants", lambda problem, gpu: enumerated.append(problem) or legal_variants(problem, gpu)
    )
    again, _, run = search(tmp_path, Bench(), MODES)
    assert (run.added, enumerated) == (0, [])
    assert again == winners
    search(tmp_path, Bench(), 2 * MODES)
    assert enumerated == [PROBLEM], "once for all modes"


@pytest.mark.parametrize("slug", ["a100", "mi300x"])
def test_the_modes_of_a_problem_are_known_without_enumerating_it(slug: str) -> None:
    for name, n, d, dtype, flags in (
        ("sinkhorn", 4096, 64, "fp32", {"schedule": "symmetric"}),
        ("sinkhorn", 4, 3, "bf16", {}),
        ("transport", 64, 16, "fp32", {"output": "matrix", "width": 16}),
    ):
        problem = family(name).problem(n, n, d, dtype, **flags)
        assert sorted(legal_modes(problem, gpu(slug))) == sorted(by_mode(legal_variants(problem, gpu(slug))))


def test_the_digest_of_the_source_comes_from_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_run.kernels_digest", lambda text: "from its own")
    _, store, _ = search(tmp_path, Bench(), MODES)
    with sqlite3.connect(store.path) as connection:
        assert set(connection.execute("SELECT source_hash FROM compile")) == {("from its own",)}


def test_a_run_that_goes_on_checks_what_was_passed_over_and_could_win(tmp_path: Path) -> None:
    """An interrupted run may leave a compiled variant unchecked; it is not compiled again."""
    _, store, _ = search(tmp_path, Bench(), 3 * MODES)
    winner = next(w for w in store.decide(PROBLEM, "a100") if w.precision == "tf32")
    with sqlite3.connect(store.path) as connection:
        connection.execute("DELETE FROM winner")
        connection.execute("DELETE FROM accuracy WHERE trial IN (SELECT id FROM trial WHERE variant = ?)", (winner.variant.json,))
    assert not [w for w in store.decide(PROBLEM, "a100") if w.variant == winner.variant]
    second = Bench()
    winners, _, _ = search(tmp_path, second, 3 * MODES)
    assert second.asked == [("check", winner.variant)]
    assert next(w for w in winners if w.precision == "tf32").predicted_us == pytest.approx(winner.predicted_us, rel=RESOLUTION)
    assert store.checked(PROBLEM, winner.variant)


def test_failures_are_told_and_counted_not_raised(tmp_path: Path) -> None:
    def compiled(variant: Variant) -> Any:
        if variant["stabiliser"] == "running":
            raise CompileError("the compiler said no")
        if variant.int("BLOCK_M") == 64:
            return Outcome(None, "timeout", message="took longer than 60 s")
        return [launch(variant)]

    winners, store, _ = search(tmp_path, Bench(compiled=compiled))
    statuses = {trial.status for trial in store.trials(PROBLEM, "a100")}
    assert statuses == {"ok", "compile_error", "timeout"}
    assert all(winner.variant["stabiliser"] == "shifted" for winner in winners)


def test_a_crash_costs_only_the_variant_that_caused_it(tmp_path: Path) -> None:
    """A worker that dies takes its group along: each of the group is compiled again, alone."""
    fatal: list[Variant] = []

    def compiled(variant: Variant) -> Any:
        fatal[:] = fatal or [variant]
        return Outcome(None, "crashed", message="worker ended with code -6") if variant == fatal[0] else [launch(variant)]

    bench = Bench(compiled=compiled)
    _, store, _ = search(tmp_path, bench, 2 * MODES)
    lost = [trial.variant for trial in store.trials(PROBLEM, "a100") if trial.status != "ok"]
    assert lost == fatal
    compilations = [variant for role, variant in bench.asked if role == "compile"]
    assert len(compilations) > len(set(compilations)) == 2 * MODES


def test_the_number_of_programs_is_searched_without_compiling(tmp_path: Path) -> None:
    """SPLITS does not change the kernels: one compilation, and the store keeps the number the model finds fastest."""
    problem = family("sinkhorn").problem(4096, 4096, 64, schedule="symmetric")
    kind = family("sinkhorn")

    def compiled(variant: Variant) -> list[CompiledLaunch]:
        return [launch(variant)] * len(kind.work(problem, variant).launches)

    bench = Bench(compiled=compiled)
    winners, _, _ = search(tmp_path, bench, problem=problem)
    compiled_variants = [variant for role, variant in bench.asked if role == "compile"]
    assert {variant["SPLITS"] for variant in compiled_variants} <= {1, 2}
    swept = [winner for winner in winners if winner.variant["fusion"] == "one_sweep"]
    assert {winner.variant.int("SPLITS") for winner in swept} & {4, 8, 16}
    for winner in swept:
        choices = siblings(problem, A100, winner.variant)
        assert len(choices) >= 4 or winner.variant["SPLITS"] == 1
        times = [predict(A100, launch_costs(problem, choice, A100, compiled(choice))).microseconds for choice in choices]
        assert winner.predicted_us == min(times)


def test_what_suits_one_precision_is_tried_in_the_others(tmp_path: Path) -> None:
    """A tile that compiles to a tenth of the instructions is found by one mode and reaches all of them."""
    special: list[Variant] = []
    hopeful = score(PROBLEM, A100)

    def compiled(variant: Variant) -> list[CompiledLaunch]:
        plain = variant.with_(precision="ieee")
        if variant["operands"] == "packed":
            return [launch(variant, slots=100.0)]
        everywhere = all(hopeful(variant.with_(precision=mode)) < math.inf for mode in ("ieee", "tf32x3", "bf16x3"))
        if variant["precision"] == "tf32" and variant["stabiliser"] == "shifted" and everywhere and not special:
            special.append(plain)
        return [launch(variant, slots=5.0 if plain in special else 100.0)]

    bench = Bench(compiled=compiled)
    search(tmp_path, bench, 12 * MODES)
    tried = {variant["precision"] for role, variant in bench.asked if variant.with_(precision="ieee") in special}
    assert tried == {"ieee", "tf32", "tf32x3", "bf16x3", "bf16", "fp16"}


def test_a_wrong_leader_is_replaced_by_the_best_of_the_others(tmp_path: Path) -> None:
    """The fastest variant of each mode is wrong: the next one, which was not checked before, must be and win."""
    leaders: dict[str, Variant] = {}

    def checked(variant: Variant) -> list[Accuracy]:
        first = leaders.setdefault(str(variant["precision"]), variant) == variant
        return [Accuracy("u_out", 1.0 if first else 1e-6, 1e-4)]

    winners, store, _ = search(tmp_path, Bench(checked=checked))
    assert len(winners) == MODES
    assert not {winner.variant for winner in winners} & set(leaders.values())
    wrong = [trial for trial in store.trials(PROBLEM, "a100") if trial.status == "wrong_result"]
    assert {trial.variant for trial in wrong} == set(leaders.values())
    assert "error 1 exceeds the budget" in wrong[0].message


def test_spills_are_refused_without_a_gpu_and_the_default_is_the_last_resort(tmp_path: Path) -> None:
    default = family("sinkhorn").default(PROBLEM)

    def compiled(variant: Variant) -> list[CompiledLaunch]:
        return [launch(variant, spills=0 if variant == default.with_(precision=variant["precision"]) else 8)]

    winners, store, _ = search(tmp_path, Bench(compiled=compiled), 2 * MODES)
    assert {winner.variant for winner in winners} == {default.with_(precision=winner.precision) for winner in winners}
    assert {winner.precision for winner in winners} == {mode.name for mode in precision.MODES.values() if not mode.only_packed}
    assert {trial.status for trial in store.trials(PROBLEM, "a100")} == {"ok", "resource"}


def test_with_the_gpu_times_are_measured_and_the_default_timed_beside(tmp_path: Path) -> None:
    """Measured time decides, whatever was predicted; a variant that computes something else has no time."""

    def measured(variant: Variant) -> tuple[list[Accuracy], Timing | None]:
        if variant.int("num_warps") == 8:
            return [Accuracy("u_out", math.inf, 1e-4)], None
        us = float(variant.int("BLOCK_M"))
        return [Accuracy("u_out", 1e-6, 1e-4)], Timing((us, us + 1, us + 2), (900.0, 901.0, 902.0), 1980.0, 40.0, 300.0)

    winners, store, _ = search(tmp_path, Bench(measured=measured), measured=True)
    assert winners
    for winner in winners:
        assert winner.evidence == "measured"
        mine = [t for t in store.trials(PROBLEM, "a100") if t.variant["precision"] == winner.precision and t.status == "ok"]
        assert winner.measured_us == min(t.variant.int("BLOCK_M") for t in mine) + 1
        assert winner.predicted_us is not None, "every measured trial stores its prediction too"
        assert winner.variant["num_warps"] != 8


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (("error", "an illegal memory access was encountered"), "illegal_access"),
        (("error", "invalid argument"), "launch_error"),
        (("crashed", "worker ended with code -9"), "crashed"),
        (("timeout", "took longer than 120 s"), "timeout"),
    ],
)
def test_a_lost_measurement_has_a_class(outcome: tuple[Any, str], status: str, tmp_path: Path) -> None:
    status_of_worker, message = outcome
    lost = Outcome(None, status_of_worker, message=message, seconds=1.0)
    winners, store, _ = search(tmp_path, Bench(measured=lambda variant: lost), MODES, measured=True)
    assert winners == []
    assert {trial.status for trial in store.trials(PROBLEM, "a100")} == {status}


def test_the_interpreter_checks_a_kernel_once_for_all_sizes_and_gpus(tmp_path: Path) -> None:
    first = Bench()
    search(tmp_path, first, MODES)
    checked = [variant for role, variant in first.asked if role == "check"]
    assert checked
    store = Store.open(tmp_path / "tuning.db")
    larger, second = replace(PROBLEM, n=16384, m=16384), Bench()
    session = Session(gpu("h100"), store, second, 1, False, 2, "tpe", 0, Progress(larger), lambda progress: None)  # type: ignore[arg-type]
    for variant in checked:
        assert store.checked(larger, variant)
        assert not store.checked(larger, variant.with_(num_stages=4))
    run = Run(larger, MODES, session)
    run.search(math.inf)
    again = [variant for role, variant in second.asked if role == "check"]
    assert not set(again) & set(checked)
    assert all(winner.evidence == "predicted" for winner in store.decide(larger, "h100"))
