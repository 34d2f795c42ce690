"""From a problem to a variant: tiers, warnings, refusals, and what the hot path imports."""

from __future__ import annotations

import math
import re
import sqlite3
import subprocess
import sys
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_family import HASH, MODES, TOY, install, put, variant

from otgen import families, gpus
from otgen.dispatch import Choice, Dispatcher
from otgen.errors import NoValidVariant, UsageError
from otgen.precision import MODES as ALL_MODES
from otgen.problem import Problem, Variant, bucket, largest_alike
from otgen.store import Store, TuningWarning


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuning.db"


def tuned(path: Path, n: int, m: int, d: int, gpu: str = "a100", width: int = 1, **put_options: object) -> None:
    with Store.open(path) as store:
        problem = TOY.problem(n, m, d, width=width)
        put(store, problem, gpu, **put_options)
        store.decide(problem, gpu)


def ask(
    dispatcher: Dispatcher, n: int, m: int, d: int, gpu: str = "a100", modes: tuple[str, ...] = MODES, width: int = 1
) -> Choice:
    return dispatcher.choose("toy", gpu, n, m, d, "fp32", TOY.problem(n, m, d, width=width).flags, modes)


def quietly(path: Path, *question: int, **options: object) -> Choice:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        return ask(Dispatcher([path]), *question, **options)


@pytest.mark.parametrize(
    ("size", "power"), [(1, 0), (2, 1), (3, 2), (5, 2), (6, 3), (1023, 10), (1448, 10), (1449, 11), (2**33 + 1, 33)]
)
def test_a_bucket_is_the_nearest_power_of_two_by_ratio(size: int, power: int) -> None:
    assert bucket(size) == power
    assert bucket(largest_alike(size)) == power == bucket(largest_alike(size) + 1) - 1


def test_an_exact_hit_is_silent_remembered_and_shared_by_its_bucket(path: Path) -> None:
    tuned(path, 4096, 4096, 64, measured=5.0)
    dispatcher = Dispatcher([path])
    choice = ask(dispatcher, 4096, 4096, 64)
    assert (choice.cache, choice.variant, choice.precision) == ("exact", variant(), "ieee")
    path.unlink()
    assert ask(dispatcher, 4096, 4096, 64) is choice
    assert ask(dispatcher, 5000, 3000, 64) is choice


def test_what_a_row_takes_for_each_pair_is_asked_in_silence(path: Path) -> None:
    tuned(path, 4096, 2048, 64, measured=5.0)
    tuned(path, 64, 64, 64, predicted=3.0)
    dispatcher = Dispatcher([path])

    def asked(n: int, m: int, gpu: str = "a100") -> float:
        return dispatcher.us_per_pair("toy", gpu, n, m, 64, "fp32", TOY.problem(1, 1, 1, width=1).flags, MODES)

    assert asked(1024, 2048) == 5.0 / (4096 * 2048)
    assert asked(64, 64) == 3.0 / 64**2
    assert asked(64, 64, "h100") == math.inf
    path.unlink()
    assert asked(1000, 2000) == 5.0 / (4096 * 2048)
    dispatcher.forget()
    path.touch()
    assert asked(1000, 2000) == math.inf
    dispatcher.pin("toy", variant=variant(), width=1)
    assert asked(1000, 2000) == 0.0


def test_forget_reads_the_databases_again(path: Path) -> None:
    tuned(path, 64, 64, 64, measured=5.0)
    dispatcher = Dispatcher([path])
    before = ask(dispatcher, 64, 64, 64)
    tuned(path, 64, 64, 64, measured=4.0, choice=variant(BLOCK_M=16))
    assert ask(dispatcher, 64, 64, 64) is before
    dispatcher.forget()
    assert ask(dispatcher, 64, 64, 64).variant == variant(BLOCK_M=16)


def test_the_fastest_admissible_precision_is_taken(path: Path) -> None:
    for precision, us in (("ieee", 9.0), ("tf32", 5.0), ("bf16", 3.0)):
        tuned(path, 64, 64, 64, measured=us, choice=variant(precision))
    dispatcher = Dispatcher([path])
    assert ask(dispatcher, 64, 64, 64).precision == "bf16"
    assert ask(dispatcher, 64, 64, 64, modes=("ieee", "tf32")).precision == "tf32"
    assert ask(dispatcher, 64, 64, 64, modes=("ieee",)).precision == "ieee"


def test_a_precision_that_is_not_admissible_is_never_answered(path: Path) -> None:
    tuned(path, 64, 64, 64, measured=1.0, choice=variant("bf16"))
    choice = quietly(path, 64, 64, 64, modes=("ieee", "tf32"))
    assert (choice.cache, choice.precision, choice.source) == ("default", "ieee", None)
    assert quietly(path, 64, 64, 64, modes=("tf32",)).precision == "tf32"


def test_nearest_comes_before_ported_and_both_before_predicted(path: Path) -> None:
    tuned(path, 1024, 1024, 64, predicted=1.0, choice=variant(BLOCK_M=16))
    assert quietly(path, 1024, 1024, 64).cache == "predicted"
    tuned(path, 1024, 1024, 64, gpu="rtx4090", measured=1.0)
    assert quietly(path, 1024, 1024, 64).cache == "predicted", "the rtx4090 is of another architecture"
    tuned(path, 1024, 1024, 64, gpu="l4", measured=1.0)
    ported = quietly(path, 1024, 1024, 64, gpu="rtx4090", modes=("ieee",))
    assert ported.cache == "exact"
    ported = quietly(path, 1024, 1024, 64, gpu="l40s")
    assert (ported.cache, ported.source.gpu) == ("ported", "l4")
    tuned(path, 2048, 2048, 64, gpu="l40s", measured=1.0)
    nearest = quietly(path, 1024, 1024, 64, gpu="l40s")
    assert (nearest.cache, nearest.source.problem.n) == ("nearest", 2048)


def test_a_far_measurement_answers_only_where_no_prediction_does(path: Path) -> None:
    tuned(path, 64, 64, 16, measured=1.0, choice=variant(BLOCK_K=16))
    assert quietly(path, 65536, 65536, 16).cache == "nearest"
    tuned(path, 65536, 65536, 16, predicted=1.0, choice=variant(BLOCK_K=16))
    assert quietly(path, 65536, 65536, 16).cache == "predicted"


def test_the_nearest_is_near_in_the_logarithm_of_every_size(path: Path) -> None:
    for n, m, d, width in ((1024, 1024, 64, 1), (1024, 1024, 64, 8), (8192, 1024, 64, 1), (1024, 1024, 32, 1)):
        tuned(path, n, m, d, width=width, measured=1.0, choice=variant(BLOCK_K=16))

    def nearest(*question: int, width: int = 1) -> Problem:
        return quietly(path, *question, width=width).source.problem

    assert nearest(2048, 1024, 64) == TOY.problem(1024, 1024, 64)
    assert nearest(4096, 1024, 64) == TOY.problem(8192, 1024, 64)
    assert nearest(1024, 1024, 24) == TOY.problem(1024, 1024, 32)
    assert nearest(1024, 1024, 64, width=5) == TOY.problem(1024, 1024, 64, width=8)


def test_another_value_of_a_named_flag_or_dtype_is_another_problem(path: Path) -> None:
    tuned(path, 64, 64, 64, measured=1.0)
    with pytest.warns(TuningWarning, match="default"):
        choice = Dispatcher([path]).choose(
            "toy", "a100", 64, 64, 64, "fp32", TOY.problem(1, 1, 1, schedule="symmetric").flags, MODES
        )
    assert choice.cache == "default"
    with pytest.warns(TuningWarning, match=r"--shape 64x64x64 --dtype bf16`"):
        choice = Dispatcher([path]).choose("toy", "a100", 64, 64, 64, "bf16", TOY.problem(1, 1, 1).flags, MODES)
    assert choice.cache == "default"


def test_a_resident_row_block_stays_resident(path: Path) -> None:
    tuned(path, 64, 64, 64, measured=1.0, choice=variant(BLOCK_M=16, BLOCK_K=64))
    assert quietly(path, 64, 64, 100).variant == variant(BLOCK_M=16, BLOCK_K=128)
    assert quietly(path, 64, 64, 30).variant == variant(BLOCK_M=16, BLOCK_K=32)


def test_a_streamed_row_block_stays_streamed_and_numbers_are_cut_to_the_space(path: Path) -> None:
    tuned(path, 64, 64, 128, measured=1.0, choice=variant(BLOCK_M=16, BLOCK_K=64))
    assert quietly(path, 64, 64, 100).variant == variant(BLOCK_M=16, BLOCK_K=64)
    assert quietly(path, 64, 64, 16).variant == variant(BLOCK_M=16, BLOCK_K=16)


def test_a_variant_that_does_not_fit_the_new_problem_is_passed_over(path: Path) -> None:
    tuned(path, 64, 64, 64, measured=1.0, choice=variant(BLOCK_M=64, BLOCK_K=64))
    tuned(path, 128, 128, 64, measured=9.0, choice=variant(BLOCK_M=16, BLOCK_K=64))
    with pytest.warns(TuningWarning, match=r"a better row was refused, does not fit 64x64x128 on a100: too large for a toy"):
        choice = ask(Dispatcher([path]), 64, 64, 128)
    assert choice.variant == variant(BLOCK_M=16, BLOCK_K=128)


def test_falling_past_the_first_tier_is_said_once_with_the_cure(path: Path) -> None:
    tuned(path, 1024, 1024, 64, predicted=1.0)
    dispatcher = Dispatcher([path])
    cure = "run `otgen tune --gpu a100 --family toy --shape 1000x1024x64`"
    with pytest.warns(TuningWarning, match=f"predicted for 1024x1024x64 on a100 is used, which was never timed; {re.escape(cure)}"):
        ask(dispatcher, 1000, 1024, 64)
    ask(dispatcher, 1000, 1024, 64)
    ask(dispatcher, 1024, 1024, 64)


def test_a_stale_row_is_a_miss_that_says_so(path: Path) -> None:
    tuned(path, 64, 64, 64, measured=1.0)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE winner SET template_hash = 'ba9876543210'")
    with pytest.warns(TuningWarning, match=f"stale: tuned on template ba9876543210, the template is now {HASH}.*otgen tune"):
        assert ask(Dispatcher([path]), 64, 64, 64).cache == "default"


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("variant", '{"BLOCK_K":64,"BLOCK_M":48,"precision":"ieee"}', "expected BLOCK_M among 16, 32, 64; got 48"),
        ("variant", '{"BLOCK_K":64,"BLOCK_M":"32); import os","precision":"ieee"}', "expected BLOCK_M among"),
        ("variant", '{"BLOCK_K":64,"precision":"ieee"}', "missing BLOCK_M"),
        ("flags", '{"schedule":"sideways","width":1}', "unknown value of toy's flag schedule"),
        ("flags", '{"schedule":"symmetric","n":1}', "unknown flag of toy 'n'"),
        ("variant", "{}", "does not have precision 'ieee'"),
    ],
)
def test_a_row_outside_the_declared_space_is_skipped_with_a_warning(path: Path, column: str, value: str, complaint: str) -> None:
    tuned(path, 64, 64, 64, measured=1.0)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE winner SET {column} = ?", (value,))
    with pytest.warns(TuningWarning) as caught:
        assert ask(Dispatcher([path]), 64, 64, 64).cache == "default"
    assert complaint in str(caught[0].message)


def test_a_corrupt_database_is_said_and_the_others_answer(path: Path, tmp_path: Path) -> None:
    tuned(path, 64, 64, 64, measured=1.0)
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"nothing of the kind" * 100)
    with pytest.warns(TuningWarning, match="is corrupt"):
        assert ask(Dispatcher([path, broken]), 64, 64, 64).cache == "exact"


def test_the_users_rows_overlay_the_shipped_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own.db"
    monkeypatch.setattr("otgen.store.winners.resource", lambda folder: shipped)
    monkeypatch.setenv("OTGEN_DB", str(own))
    tuned(shipped / "a100.db", 64, 64, 64, predicted=1.0)
    with pytest.warns(TuningWarning, match="never timed"):
        assert ask(Dispatcher(), 64, 64, 64).source.path == shipped / "a100.db"
    tuned(own, 64, 64, 64, measured=9.0, choice=variant(BLOCK_M=16))
    choice = ask(Dispatcher(), 64, 64, 64)
    assert (choice.cache, choice.source.path, choice.variant) == ("exact", own, variant(BLOCK_M=16))


def test_unknown_names_and_empty_sizes(path: Path) -> None:
    dispatcher = Dispatcher([])
    with pytest.raises(UsageError, match="unknown GPU 'a101'"):
        ask(dispatcher, 64, 64, 64, gpu="a101")
    with pytest.raises(UsageError, match="unknown family 'tory'"):
        dispatcher.choose("tory", "a100", 64, 64, 64, "fp32", (), MODES)
    with pytest.raises(UsageError, match="expected sizes n, m from 1"):
        dispatcher.choose("toy", "a100", 0, 64, 64, "fp32", (), MODES)


def test_no_variant_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_bf16(problem: Problem, variant: Variant, gpu: gpus.Gpu) -> str:
        return "toys dislike bf16" if variant["precision"] == "bf16" else ""

    monkeypatch.setitem(families.FAMILIES, "toy", replace(TOY, fits=refuse_bf16))
    with pytest.raises(
        NoValidVariant, match=r"expected a variant of toy.* in precision bf16; neither a tuned one nor the default fits; run"
    ):
        ask(Dispatcher([]), 64, 64, 64, modes=("bf16",))


def test_a_kernel_is_rendered_once_per_bucket(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(path, 64, 64, 64, measured=1.0)
    rendered = []

    def load(problem: Problem, variant: Variant) -> SimpleNamespace:
        rendered.append((problem, variant))
        return SimpleNamespace(launch=lambda **arguments: "launched")

    monkeypatch.setattr("otgen.render.load", load)
    dispatcher, flags = Dispatcher([path]), TOY.problem(1, 1, 1).flags
    kernel = dispatcher.kernel("toy", "a100", 60, 70, 64, "fp32", flags, MODES)
    assert kernel.launch(x=1) == "launched"
    assert dispatcher.kernel("toy", "a100", 64, 64, 64, "fp32", flags, MODES) is kernel
    assert rendered == [(TOY.problem(64, 64, 64), variant())]


def test_a_gpu_outside_the_table_is_ported_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(gpus.GPUS["rtx4090"], slug="rtx-4080", name="NVIDIA GeForce RTX 4080", approximate=True)
    monkeypatch.setattr("otgen.gpus.detect", lambda device: found)
    tuned(path, 64, 64, 64, gpu="l4", measured=1.0)
    dispatcher = Dispatcher([path])
    with pytest.warns(TuningWarning, match="RTX 4080 is not in otgen's table of GPUs; .* ported from l4 and l40s and rtx4090"):
        slug = dispatcher.current_gpu(0)
    with pytest.warns(TuningWarning, match="measured for 64x64x64 on l4"):
        choice = ask(dispatcher, 64, 64, 64, gpu=slug)
    assert (slug, choice.cache) == ("rtx-4080", "ported")


@pytest.mark.parametrize("name", ["sinkhorn", "transport", "hvp"])
def test_real_families_get_a_default_that_fits_and_a_carried_winner(name: str, path: Path) -> None:
    family = families.family(name)
    problem = family.problem(1000, 777, 3)
    for gpu in ("a100", "l4", "b200"):
        with pytest.warns(TuningWarning, match="the default variant is used"):
            choice = Dispatcher([]).choose(name, gpu, 1000, 777, 3, "fp32", problem.flags, tuple(ALL_MODES))
        assert family.fits(problem, choice.variant, gpus.gpu(gpu)) == ""
    source, target = family.problem(4096, 4096, 64), family.problem(8192, 4096, 16)
    with Store.open(path) as store:
        put(store, source, "h100", choice=family.default(source), predicted=10.0)
        store.decide(source, "h100")
    with pytest.warns(TuningWarning, match="predicted for 4096x4096x64 on h100"):
        choice = Dispatcher([path]).choose(name, "h200", 8192, 4096, 16, "fp32", target.flags, tuple(ALL_MODES))
    assert family.check(target, choice.variant) == choice.variant


def test_a_hot_hit_imports_nothing_heavy(path: Path) -> None:
    tuned(path, 64, 64, 64, measured=1.0)
    script = (
        "import sys, warnings; from pathlib import Path; from otgen.dispatch import Dispatcher\n"
        "warnings.simplefilter('ignore')\n"
        "dispatcher, flags = Dispatcher([Path(sys.argv[1])]), (('schedule', 'alternating'),)\n"
        "for _ in range(2): dispatcher.choose('sinkhorn', 'a100', 64, 64, 64, 'fp32', flags, ('ieee',))\n"
        "print(*{'sqlite_utils', 'jinja2', 'optuna', 'click', 'rich', 'torch', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_pinned_variant_is_taken_whatever_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pin` decides for its flags and no others, without a warning; where it does not fit it is refused, never replaced."""
    install(monkeypatch)
    dispatcher = Dispatcher([])
    wanted = variant("tf32", BLOCK_M=16, BLOCK_K=64)
    dispatcher.pin("toy", schedule="symmetric", variant=dict(wanted))
    flags = (("schedule", "symmetric"), ("width", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = dispatcher.choose("toy", "a100", 100, 100, 64, "fp32", flags, ("ieee",))
    assert (choice.variant, choice.cache, choice.source) == (wanted, "pinned", None)
    with pytest.warns(TuningWarning, match="default"):
        other = dispatcher.choose("toy", "a100", 100, 100, 64, "fp32", (("schedule", "alternating"), ("width", 1)), MODES)
    assert other.cache == "default"
    with pytest.raises(NoValidVariant, match="expected the pinned variant to fit"):
        dispatcher.choose("toy", "a100", 100, 100, 16, "fp32", flags, MODES)
    with pytest.raises(UsageError, match="expected BLOCK_M among"):
        dispatcher.pin("toy", schedule="symmetric", variant=dict(wanted.with_(BLOCK_M=17)))
