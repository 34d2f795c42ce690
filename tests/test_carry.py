"""What an edit of a template leaves valid: trials whose render is as it was count on the new template, and nothing else does."""

from __future__ import annotations

import importlib.util
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_run import MODES, Bench, search

from otgen.carry import carry
from otgen.compile import compile_key
from otgen.families import family
from otgen.gpus import gpu
from otgen.problem import Problem, Variant
from otgen.ranking import stale
from otgen.render import kernels_digest, source
from otgen.resources import resource, template_hash
from otgen.store import Accuracy, Compiled, Measurement, Prediction, Store, Trial, Winner, read_winners

A100 = gpu("a100")
SINKHORN = family("sinkhorn")
PROBLEM = SINKHORN.problem(4096, 4096, 64)
SMALLER = SINKHORN.problem(1024, 1024, 64)
SYMMETRIC = SINKHORN.problem(4096, 4096, 64, schedule="symmetric")
DEFAULT = SINKHORN.default(PROBLEM)
TABLES = ("environment", "trial", "compile", "prediction", "measurement", "accuracy")


def put(
    store: Store,
    variant: Variant,
    us: float = 10.0,
    *,
    problem: Problem = PROBLEM,
    status: str = "ok",
    message: str = "",
    measured: float | None = None,
    rendered: Variant | None = None,
) -> int:
    """Record one trial with its binary; rendered: the variant whose source was compiled for it."""
    from importlib.metadata import version

    digest = kernels_digest(source(problem, rendered or variant))
    return store.record(
        Trial(problem, "a100", variant, status, template_hash("sinkhorn"), message, compile_ms=7.0),
        environment=store.environment({"gpu": "a100", "triton": version("triton")}),
        compiled=Compiled(compile_key(problem, variant, A100), digest, 100, 0, 2048, {"launches": []}),
        prediction=Prediction(us, {"issue": us / 2}),
        measurement=Measurement("cold", measured, measured, measured, (measured,), 99.0) if measured else None,
        accuracy=[Accuracy("u_out", 0.25, 1.0), Accuracy("rho", 0.5, 1.0)],
    )


def age(path: Path) -> None:
    """Make everything in the file one template older."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("trial", "winner"):
            connection.execute(f"UPDATE {table} SET template_hash = 'older' || template_hash")
        connection.execute("UPDATE compile SET key = 'older ' || key")


def rows(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        return {table: connection.execute(f"SELECT * FROM {table} ORDER BY id").fetchall() for table in TABLES}


def told(winner: Winner) -> tuple[Any, ...]:
    """Of a winner all but where it comes from."""
    times = winner.evidence, winner.predicted_us, winner.measured_us
    return winner.key, winner.variant, times, winner.registers, winner.spills, winner.shared_bytes


@pytest.fixture
def tuned(path: Path) -> list[Winner]:
    """The winners of two sizes, one of them measured, that are then an edit of the template old."""
    with Store.open(path) as store:
        for problem in (PROBLEM, SMALLER):
            for mode, us in (("ieee", 30.0), ("tf32", 20.0), ("bf16", 10.0)):
                put(store, DEFAULT.with_(precision=mode), us, problem=problem)
                put(store, DEFAULT.with_(precision=mode, stabiliser="shifted"), 0.5 * us, problem=problem)
            put(store, DEFAULT.with_(BLOCK_N=64), 1.0, problem=problem, measured=40.0)
            put(store, DEFAULT.with_(BLOCK_N=128), 0.5, problem=problem, status="resource", message="spills 8 bytes")
            store.decide(problem, "a100")
        winners = store.winners()
    age(path)
    return winners


def test_carried_winners_are_the_old_decision_and_not_stale(path: Path, tuned: list[Winner]) -> None:
    before = rows(path)
    with Store.open(path) as store:
        assert all(map(stale, store.winners()))
        assert carry([PROBLEM, SMALLER], A100, store) == {PROBLEM: 8, SMALLER: 8}
        winners = store.winners()
    assert [told(winner) for winner in winners] == [told(winner) for winner in tuned]
    assert not any(map(stale, winners))
    assert {winner.evidence for winner in winners} == {"measured", "predicted"}
    after = rows(path)
    for table in TABLES:
        assert after[table][: len(before[table])] == before[table], "facts are inserted, never changed"
    assert [len(after[table]) - len(before[table]) for table in TABLES] == [0, 16, 8, 16, 2, 32]


def test_a_carried_trial_has_every_fact_and_says_where_it_is_from(path: Path, tuned: list[Winner]) -> None:
    with Store.open(path) as store:
        carry([PROBLEM], A100, store)
        (trial,) = [t for t in store.trials(PROBLEM, "a100") if t.variant == DEFAULT.with_(BLOCK_N=64)]
        (failed,) = [t for t in store.trials(PROBLEM, "a100") if t.status == "resource"]
        assert store.compiled(compile_key(PROBLEM, trial.variant, A100)) is not None
    with closing(sqlite3.connect(path)) as connection:
        ((old, template),) = connection.execute(
            "SELECT id, template_hash FROM trial WHERE id < ? AND n = 4096 AND variant = ?", (trial.id, trial.variant.json)
        )
        ids = {"old": old, "new": trial.id}
        for fact in ("us, terms FROM prediction", "protocol, median_us, samples_us, default_us FROM measurement"):
            one, other = (connection.execute(f"SELECT {fact} WHERE trial = ?", (ids[key],)).fetchall() for key in ids)
            assert one == other != []
        errors = connection.execute("SELECT metric, value, budget FROM accuracy WHERE trial = ?", (trial.id,)).fetchall()
        environments = connection.execute(
            "SELECT environment, compile_ms FROM trial WHERE id IN (?, ?)", (old, trial.id)
        ).fetchall()
    assert sorted(errors) == [("rho", 0.5, 1.0), ("u_out", 0.25, 1.0)]
    assert trial.message == f"carried over from trial {old} of template {template}, whose kernels are the same"
    assert failed.message.startswith("spills 8 bytes; carried over from trial ")
    assert environments == [(environments[0][0], 7.0), (environments[0][0], None)]


def test_a_second_run_carries_nothing(path: Path, tuned: list[Winner]) -> None:
    with Store.open(path) as store:
        carry([PROBLEM, SMALLER], A100, store)
        once = rows(path)
        assert carry([PROBLEM, SMALLER], A100, store) == {}
    assert rows(path) == once


def test_provenance_does_not_pile_up(path: Path, tuned: list[Winner]) -> None:
    with Store.open(path) as store:
        carry([PROBLEM], A100, store)
    age(path)
    with Store.open(path) as store:
        assert carry([PROBLEM], A100, store) == {PROBLEM: 8}
        assert {trial.message.count("carried over") for trial in store.trials(PROBLEM, "a100")} == {1}
        assert {trial.message.startswith("spills 8 bytes; ") for trial in store.trials(PROBLEM, "a100")} == {True, False}


def test_a_render_that_differs_is_not_carried(path: Path, tuned: list[Winner]) -> None:
    """Nor one whose digest nobody wrote down; other modes of the same problem are."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for mode, digest in (("tf32", "0123456789ab"), ("bf16", "")):
            of_mode = "SELECT compile FROM trial WHERE json_extract(variant, '$.precision') = ?"
            connection.execute(f"UPDATE compile SET source_hash = ? WHERE id IN ({of_mode})", (digest, mode))
    with Store.open(path) as store:
        assert carry([PROBLEM], A100, store) == {PROBLEM: 4}
        here = [winner for winner in store.winners() if winner.problem == PROBLEM]
        assert {winner.precision: stale(winner) for winner in here} == {"ieee": False, "tf32": True, "bf16": True}
        assert {trial.variant["precision"] for trial in store.trials(PROBLEM, "a100")} == {"ieee"}


def test_a_variant_that_the_space_lost_is_not_carried(path: Path, tuned: list[Winner]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("trial", "winner"):
            connection.execute(f"""UPDATE {table} SET variant = replace(variant, '"BLOCK_M":64', '"BLOCK_M":48')""")
    with Store.open(path) as store:
        assert carry([PROBLEM], A100, store) == {}
        assert all(map(stale, store.winners()))


def test_what_the_present_template_tried_is_left_alone(path: Path, tuned: list[Winner]) -> None:
    """A winner that is wrong by now does not come back, and what takes its place was carried."""
    wrong = DEFAULT.with_(precision="bf16", stabiliser="shifted")
    with Store.open(path) as store:
        put(store, wrong, status="wrong_result")
        carry([PROBLEM], A100, store)
        assert [trial.status for trial in store.trials(PROBLEM, "a100") if trial.variant == wrong] == ["wrong_result"]
        (winner,) = [w for w in store.winners() if w.problem == PROBLEM and w.precision == "bf16"]
        assert (winner.variant, stale(winner)) == (DEFAULT.with_(precision="bf16"), False)
        assert carry([PROBLEM], A100, store) == {}


def test_a_binary_shared_by_numbers_of_programs_holds_for_all_of_them(path: Path) -> None:
    """The digest stored with a binary may be that of another variant that compiles alike."""
    swept = SINKHORN.default(SYMMETRIC).with_(fusion="one_sweep", stabiliser="shifted", SPLITS=4)
    assert kernels_digest(source(SYMMETRIC, swept)) != kernels_digest(source(SYMMETRIC, swept.with_(SPLITS=8)))
    with Store.open(path) as store:
        put(store, swept, problem=SYMMETRIC, rendered=swept.with_(SPLITS=8))
        put(store, swept.with_(SPLITS=1), problem=SYMMETRIC, rendered=swept)
        store.decide(SYMMETRIC, "a100")
    age(path)
    with Store.open(path) as store:
        assert carry([SYMMETRIC], A100, store) == {SYMMETRIC: 1}
        assert [trial.variant["SPLITS"] for trial in store.trials(SYMMETRIC, "a100")] == [4]


def test_another_triton_may_compile_the_same_source_to_something_else(path: Path, tuned: list[Winner]) -> None:
    """The trial is carried, for it says what it was compiled with; the binary stays what that Triton made."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE environment SET triton = '1.0'")
    with Store.open(path) as store:
        assert carry([PROBLEM], A100, store) == {PROBLEM: 8}
        assert store.compiled(compile_key(PROBLEM, DEFAULT, A100)) is None
        assert {winner.registers for winner in store.winners() if not stale(winner)} == {100}


KILLED = """
import os, signal, sys
from otgen.carry import carry
from otgen.families import family
from otgen.gpus import gpu
from otgen.store import Store, database

left, insert = [11], database.insert_again
def insert_again(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    insert(*arguments)
database.insert_again = insert_again
problems = [family("sinkhorn").problem(n, n, 64) for n in (4096, 1024)]
with Store.open(sys.argv[1]) as store:
    carry(problems, gpu("a100"), store)
"""


def test_a_variant_of_before_an_axis_was_added_is_carried_with_the_value_it_then_had(path: Path, tuned: list[Winner]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("trial", "winner"):
            connection.execute(f"UPDATE {table} SET variant = json_remove(variant, '$.bias')")
    with Store.open(path) as store:
        assert not any("bias" in winner.variant for winner in store.winners())
        assert carry([PROBLEM, SMALLER], A100, store) == {PROBLEM: 8, SMALLER: 8}
        assert [told(winner) for winner in store.winners()] == [told(winner) for winner in tuned]
        assert carry([PROBLEM, SMALLER], A100, store) == {}


def test_killed_in_the_middle_nothing_is_carried(path: Path, tuned: list[Winner]) -> None:
    before = rows(path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert rows(path) == before
    with Store.open(path) as store:
        assert all(map(stale, store.winners()))
        assert carry([PROBLEM, SMALLER], A100, store) == {PROBLEM: 8, SMALLER: 8}


def test_what_another_process_carried_meanwhile_is_not_carried_again(path: Path, tuned: list[Winner]) -> None:
    with Store.open(path) as store:
        found = {PROBLEM: dict.fromkeys(store.outdated(PROBLEM, "a100"))}
        carry([PROBLEM], A100, store)
        once = rows(path)
        store.carry("a100", found)
    assert rows(path) == once


def test_an_edit_costs_the_variants_that_render_otherwise(path: Path, edit: Callable[[str], None]) -> None:
    with Store.open(path) as store:
        for stabiliser, us in (("running", 1.0), ("shifted", 2.0)):
            put(store, DEFAULT.with_(stabiliser=stabiliser), us)
        (old,) = store.decide(PROBLEM, "a100")
        edit("{# a word to the reader #}\n")
        assert stale(old)
        assert carry([PROBLEM], A100, store) == {PROBLEM: 2}
        (same,) = store.winners()
        assert told(same) == told(old)
        assert not stale(same)
        edit('#: if stabiliser == "running"\nLATE = 1\n#: endif\n')
        assert stale(same)
        assert carry([PROBLEM], A100, store) == {PROBLEM: 1}
        (other,) = store.winners()
        assert (other.variant["stabiliser"], other.predicted_us, stale(other)) == ("shifted", 2.0, False)


def test_a_search_goes_on_across_an_edit(tmp_path: Path, edit: Callable[[str], None]) -> None:
    """Nothing is asked, compiled or checked again, and what was compiled before is known under its new key."""
    old, store, _ = search(tmp_path, Bench(), 3 * MODES)
    edit("{# a word to the reader #}\n")
    assert carry([PROBLEM], A100, store) == {PROBLEM: 3 * MODES}
    bench = Bench()
    winners, _, run = search(tmp_path, bench, 3 * MODES)
    assert (run.added, bench.asked) == (0, [])
    assert [told(winner) for winner in winners] == [told(winner) for winner in old]
    assert all(store.compiled(compile_key(PROBLEM, winner.variant, A100)) for winner in winners)


def test_shipped_files_are_carried_over_without_a_working_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make carried` on a fresh clone: the shipped files hold the facts that they are decided by."""
    ship = Path(__file__).parents[1] / "benchmarks" / "ship.py"
    monkeypatch.syspath_prepend(str(ship.parent))
    spec = importlib.util.spec_from_file_location("ship", ship)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["ship.py", "--carry", "--work", str(tmp_path / "none.db"), "--out", str(tmp_path), "mi300x"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    before, after = (read_winners(folder / "mi300x.db") for folder in (resource("tuning_db"), tmp_path))
    kept = [(w.problem, family(w.problem.family).complete(w.problem, w.variant), w.predicted_us) for w in before]
    assert [(w.problem, w.variant, w.predicted_us) for w in after] == kept
    assert not any(stale(winner) for winner in after)
