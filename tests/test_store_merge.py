"""`otgen merge`: every fact once, decisions made anew from all of them, and what is said where files had decided differently."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from itertools import permutations
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from toy_family import HASH, put, variant

from otgen.cli import otgen
from otgen.errors import OtgenError
from otgen.problem import Problem
from otgen.store import Accuracy, Compiled, Measurement, Prediction, Store, Trial, read_winners
from otgen.store.decide import median_interval
from otgen.store.reading import read_database

pytestmark = pytest.mark.usefixtures("toy")


def database(path: Path, problem: Problem, *trials: dict[str, object]) -> Path:
    """A database of these trials (arguments of `toy_family.put`), decided."""
    with Store.open(path) as store:
        for trial in trials:
            put(store, problem, **trial)
        store.decide(problem, "a100")
    return path


def timed(path: Path, problem: Problem, block: int, samples: Sequence[float], default: float | None = None, gpu: str = "") -> Path:
    """A database with one measured trial, made in an environment told by its GPU's name."""
    ordered = sorted(samples)
    measurement = Measurement("test", ordered[len(ordered) // 2], ordered[0], ordered[-1], tuple(samples), default)
    with Store.open(path) as store:
        store.record(
            Trial(problem, "a100", variant(BLOCK_M=block), "ok", HASH),
            environment=store.environment({"gpu": gpu}),
            measurement=measurement,
            accuracy=[Accuracy("out", 0.5, 1.0)],
        )
        store.decide(problem, "a100")
    return path


def date(path: Path, when: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE trial SET created_at = ?", (f"{when}T00:00:00.000Z",))


def merge(*words: object) -> Result:
    return CliRunner().invoke(otgen, ["merge", *map(str, words)], catch_exceptions=False)


def facts(path: Path) -> set[str]:
    return {fact.identity for fact in read_database(path).facts.values()}


def test_every_fact_once_in_any_order_and_any_number_of_times(tmp_path: Path, problem: Problem) -> None:
    rest = ({"choice": variant("tf32"), "status": "timeout"}, {"choice": variant("bf16"), "measured": 3.0, "predicted": 2.0})
    sources = [
        database(tmp_path / "a.db", problem, {"choice": variant("ieee"), "predicted": 4.0}, *rest),
        database(tmp_path / "b.db", problem, {"choice": variant("ieee", BLOCK_M=16), "predicted": 5.0}),
        database(tmp_path / "c.db", problem, {"choice": variant("tf32"), "predicted": 1.0, "error": 3.0}),
    ]
    before = [path.read_bytes() for path in sources]
    union = set().union(*map(facts, sources))
    assert len(union) == 5
    results = []
    for number, order in enumerate(permutations(sources)):
        out = tmp_path / f"{number}.db"
        assert "2 winners" in merge(*order, "-o", out).stdout
        assert facts(out) == union
        results.append([(winner.key, winner.variant, winner.us) for winner in read_winners(out)])
    assert results == results[:1] * 6
    out = tmp_path / "again.db"
    text = merge(tmp_path / "0.db", sources[0], tmp_path / "5.db", "-o", out).stdout
    assert f"{sources[0]}: 0 trials that were in none before it" in text
    assert facts(out) == union
    assert [path.read_bytes() for path in sources] == before
    assert out.read_bytes()[18:20] == b"\x01\x01", "expected a rollback journal: one file to send"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.db", "b.db", "c.db", "again.db", *(f"{number}.db" for number in range(6))]
    )


def test_all_that_was_learnt_of_a_trial_is_kept(tmp_path: Path, problem: Problem) -> None:
    path = tmp_path / "a.db"
    with Store.open(path) as store:
        store.record(
            Trial(problem, "a100", variant(), "ok", HASH, "two\nlines", seed=7, compile_ms=1.5),
            environment=store.environment({"gpu": "NVIDIA A100", "driver": "570.1", "triton": "3.7.1"}),
            compiled=Compiled("key", "source", 96, 4, 1024, {"mufu": 0.1, "nested": [1, {"two": 2.5}]}),
            prediction=Prediction(0.1 + 0.2, {"issue": 1 / 3}),
            measurement=Measurement("cold", 2.5, 2.0, 3.0, (2.0, 2.5, 3.0), 9.0, 1410.0, None, -1.5, 300.0),
            accuracy=[Accuracy("out", float("inf"), 1.0), Accuracy("rho", 0.1, 0.3)],
        )
    merge(path, "-o", tmp_path / "b.db")
    (one,), (other,) = (read_database(file).facts.values() for file in (path, tmp_path / "b.db"))
    assert one == other


def test_two_binaries_of_one_key_are_both_kept(tmp_path: Path, problem: Problem) -> None:
    paths = []
    for registers in (96, 128):
        path = tmp_path / f"{registers}.db"
        with Store.open(path) as store:
            store.record(
                Trial(problem, "a100", variant(BLOCK_M=registers // 4 * 2 // 3 if registers == 96 else 32), "ok", HASH),
                environment=store.environment({}),
                compiled=Compiled("key", "source", registers, 0, 0),
            )
        paths.append(path)
    merge(*paths, "-o", tmp_path / "c.db")
    merge(tmp_path / "c.db", *reversed(paths), "-o", tmp_path / "d.db")
    with Store.open(tmp_path / "d.db", readonly=True) as store:
        assert sorted(trial.registers or 0 for trial in store.trials(problem, "a100")) == [96, 128]
        assert store.compiled("key") is not None


def test_a_trial_carried_over_in_two_copies_is_one_fact(tmp_path: Path, problem: Problem) -> None:
    paths = [database(tmp_path / f"{name}.db", problem, {"predicted": 1.0}) for name in "ab"]
    for number, path in enumerate(paths):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE trial SET message = 'carried over from trial 3 of template old, whose …'")
        date(path, f"2026-01-0{number + 1}")
    merge(*paths, "-o", tmp_path / "c.db")
    assert len(facts(tmp_path / "c.db")) == 1


SAMPLES = {
    "apart": ((10.0, 10.1, 10.2), (11.0, 11.1, 11.2)),
    "overlap": ((9.0, 10.0, 14.0), (10.4, 10.5, 10.6)),
}


@pytest.mark.parametrize(
    ("case", "winner", "why"),
    [
        ("apart", 16, "the intervals of the medians, 95 %: 10 to 10.2 µs and 95 %: 11 to 11.2 µs, do not overlap"),
        ("overlap", 64, "overlap: the measured 10.5 µs has the lower upper end"),
    ],
)
def test_measured_winners_that_disagree(tmp_path: Path, problem: Problem, case: str, winner: int, why: str) -> None:
    first, second = SAMPLES[case]
    paths = [timed(tmp_path / "a.db", problem, 16, first), timed(tmp_path / "b.db", problem, 64, second)]
    text = merge(*paths, "-o", tmp_path / "c.db").stdout
    (won,) = read_winners(tmp_path / "c.db")
    assert won.variant["BLOCK_M"] == winner
    assert why in text
    assert "toy[schedule=alternating,width=1] 1024x2048x64 fp32 on a100, ieee:" in text
    assert f"{'taken' if winner == 16 else 'left '}  {paths[0]}: 10" in text
    assert "1 winners" in text
    assert "1 conflicts." in text
    conflict = json.loads(merge(*paths, "-o", tmp_path / "d.db", "--json").stdout)["conflicts"][0]
    assert conflict["won"] == won.variant.text
    assert [claim["us"] for claim in conflict["claims"]] == [sorted(first)[1], sorted(second)[1]]
    with Store.open(tmp_path / "c.db") as store:
        assert [again.variant for again in store.decide(problem, "a100")] == [won.variant], "a later decision is the same"


def test_times_of_two_machines_are_compared_by_their_share_of_the_default(tmp_path: Path, problem: Problem) -> None:
    """12 µs where the default takes 40 is better than 11 where it takes 33."""
    a = timed(tmp_path / "a.db", problem, 16, (12.0,) * 3, default=40.0, gpu="slow")
    b = timed(tmp_path / "b.db", problem, 64, (11.0,) * 3, default=33.0, gpu="fast")
    text = merge(a, b, "-o", tmp_path / "c.db").stdout
    assert "the measured 12 µs takes the smaller share of its default's time, 0.3 against 0.333" in text
    assert read_winners(tmp_path / "c.db")[0].variant["BLOCK_M"] == 16


@pytest.mark.parametrize(
    ("one", "other", "kept", "why"),
    [
        ({"measured": 9.0}, {"predicted": 1.0}, 16, "a measured time comes before a predicted one"),
        ({"predicted": 2.0}, {"predicted": 1.0}, 64, "the prediction of the predicted 1 µs is shorter"),
        ({"predicted": 1.0}, {"predicted": 1.01}, 16, "predictions within 3% are a tie"),
        ({"measured": 9.0}, {"measured": 8.0, "template": "old"}, 16, "the measured 8 µs was tuned on another template"),
    ],
)
def test_evidence_decides(
    tmp_path: Path, problem: Problem, one: dict[str, object], other: dict[str, object], kept: int, why: str
) -> None:
    a = database(tmp_path / "a.db", problem, {"choice": variant(BLOCK_M=16)} | one)
    b = database(tmp_path / "b.db", problem, {"choice": variant(BLOCK_M=64)} | {**other, "template": HASH})
    if "template" in other:
        with closing(sqlite3.connect(b)) as connection, connection:
            connection.execute("UPDATE trial SET template_hash = 'old'")
            connection.execute("UPDATE winner SET template_hash = 'old'")
    assert why in merge(a, b, "-o", tmp_path / "c.db").stdout
    assert [winner.variant["BLOCK_M"] for winner in read_winners(tmp_path / "c.db")] == [kept]


def test_a_variant_that_one_file_found_wrong_wins_in_none(tmp_path: Path, problem: Problem) -> None:
    """What came later takes back what came earlier, whatever the order of the files."""
    good, bad = variant(BLOCK_M=16), variant(BLOCK_M=64)
    b = database(tmp_path / "b.db", problem, {"choice": bad, "status": "wrong_result"}, {"choice": good, "predicted": 5.0})
    a = database(tmp_path / "a.db", problem, {"choice": bad, "predicted": 1.0})
    date(a, "2026-01-01")
    date(b, "2026-01-02")
    for out, order in (("c.db", (a, b)), ("d.db", (b, a))):
        assert "a later wrong_result took back the predicted 1 µs" in merge(*order, "-o", tmp_path / out).stdout
        assert [winner.variant for winner in read_winners(tmp_path / out)] == [good]
    date(a, "2026-01-03")
    assert "1 conflicts." in merge(b, a, "-o", tmp_path / "e.db").stdout
    assert read_winners(tmp_path / "e.db")[0].variant == bad


def test_a_tie_falls_to_the_same_trial_in_any_order(tmp_path: Path, problem: Problem) -> None:
    paths = [
        database(tmp_path / f"{block}.db", problem, {"choice": variant(BLOCK_M=block), "predicted": 1.0}) for block in (16, 64)
    ]
    for path in paths:
        date(path, "2026-01-01")
    merge(*paths, "-o", tmp_path / "c.db")
    merge(*reversed(paths), "-o", tmp_path / "d.db")
    one, other = (read_winners(tmp_path / name)[0].variant for name in ("c.db", "d.db"))
    assert one == other


def test_winners_of_older_templates_are_kept_for_carrying_over(tmp_path: Path, problem: Problem) -> None:
    paths = []
    for number, block in ((1, 16), (2, 64)):
        path = database(tmp_path / f"{number}.db", problem, {"choice": variant(BLOCK_M=block), "predicted": float(number)})
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE trial SET template_hash = ?", (f"old{number}",))
            connection.execute("UPDATE winner SET template_hash = ?", (f"old{number}",))
        date(path, f"2026-01-0{number}")
        paths.append(path)
    merge(*reversed(paths), "-o", tmp_path / "c.db")
    assert [(winner.template_hash, winner.variant["BLOCK_M"]) for winner in read_winners(tmp_path / "c.db")] == [("old2", 64)]


def test_the_file_that_is_there_is_kept_unless_forced(tmp_path: Path, problem: Problem) -> None:
    a = database(tmp_path / "a.db", problem, {"predicted": 1.0})
    out = tmp_path / "c.db"
    out.write_text("notes")
    with pytest.raises(OtgenError, match=r"expected no file at .*c\.db; there is one; .* replace it with --force"):
        merge(a, "-o", out)
    assert out.read_text() == "notes"
    merge(a, "-o", out, "--force")
    assert facts(out) == facts(a)
    with pytest.raises(OtgenError, match=r"a\.db is one of its sources, which are never changed"):
        merge(a, "-o", a, "--force")
    (tmp_path / "d.db-wal").write_text("frames")
    with pytest.raises(OtgenError, match=r"expected no database in use at .*d\.db; found d\.db-wal"):
        merge(a, "-o", tmp_path / "d.db", "--force")
    with pytest.raises(OtgenError, match="is a folder"):
        merge(a, "-o", tmp_path, "--force")


def test_of_two_merges_at_once_one_is_refused(tmp_path: Path, problem: Problem) -> None:
    sources = [database(tmp_path / f"{name}.db", problem, {"predicted": 1.0}) for name in "ab"]
    out = tmp_path / "new" / "c.db"
    command = [sys.executable, "-m", "otgen", "merge", *map(str, sources), "-o", str(out)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(process.communicate()[1], process.returncode) for process in running]
    assert sorted(code for _, code in ends) == [0, 1, 1], ends
    assert sum("expected no file at" in err for err, _ in ends) == 2
    with closing(sqlite3.connect(out)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [path.name for path in out.parent.iterdir()] == ["c.db"]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 10, 40, 100, 101])
def test_the_interval_of_a_median_is_symmetric_and_covers_95_percent(count: int) -> None:
    """Ranks r and n + 1 - r, with P(fewer than r of n fair coins fall heads) ≤ 3 % each, where n allows that at all."""
    from math import comb

    low, high = median_interval(range(1, count + 1)[::-1])
    assert low + high == count + 1
    tail = sum(comb(count, heads) for heads in range(int(low))) / 2**count
    assert tail <= 0.03 or low == 1
    assert low > 1 or count < 12
