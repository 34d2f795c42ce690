"""`otgen export` and `otgen import`: what comes out goes in again whole, and nothing else goes in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_family import HASH, TOY, put, variant

from otgen.cli import otgen
from otgen.errors import OtgenError, UsageError
from otgen.problem import Problem
from otgen.store import STATUSES, Accuracy, Compiled, Measurement, Prediction, Store, Trial, read_winners
from otgen.store.facts import PHASES, SENSORS, Fact, misfit
from otgen.store.formats import COLUMNS, INVALIDITY
from otgen.store.reading import read_database
from otgen.store.records import ENVIRONMENT

pytestmark = pytest.mark.usefixtures("toy")


@pytest.fixture
def path(tmp_path: Path, problem: Problem) -> Path:
    """A measured winner with all that can be learnt of a trial, a predicted one for another GPU, and a trial that failed."""
    path = tmp_path / "some.db"
    with Store.open(path) as store:
        store.record(
            Trial(problem, "a100", variant("tf32"), "ok", HASH, seed=3, compile_ms=310.5, verify_ms=2.0),
            environment=store.environment({"gpu": "NVIDIA A100", "driver": "570.1", "triton": "3.7.1", "otgen": "0.1.0"}),
            compiled=Compiled("key", "source", 128, 0, 49152, {"launches": [{"mufu": 0.1}]}),
            prediction=Prediction(11.5, {"issue": 1 / 3}),
            measurement=Measurement("cold", 12.5, 12.0, 13.0, (12.0, 12.5, 13.0), default_us=40.0, power_w=310.0),
            accuracy=[Accuracy("out", 1e-5, 1e-4)],
        )
        put(store, problem, choice=variant("ieee"), status="wrong_result", error=float("inf"))
        put(store, TOY.problem(64, 64, 16), "h100", choice=variant(BLOCK_K=16), predicted=2.0)
        store.decide(problem, "a100")
        store.decide(TOY.problem(64, 64, 16), "h100")
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(otgen, [*map(str, words)], catch_exceptions=False)


def contents(path: Path) -> tuple[list[str], list[Any]]:
    found = read_database(path)
    winners = [(winner.key, winner.evidence, winner.variant, winner.us) for winner in read_winners(path)]
    return sorted(fact.identity for fact in found.facts.values()), winners


@pytest.mark.parametrize("form", ["json", "sqlite"])
def test_a_round_trip_loses_nothing(path: Path, tmp_path: Path, form: str) -> None:
    sent, other = tmp_path / f"sent.{form}", tmp_path / "other.db"
    run("export", "--format", form, "--trials", "--db", path, "-o", sent)
    text = run("import", sent, "--db", other).stdout
    assert f"3 trials added to {other}, 0 were there, 0 refused.\n2 winners are new, 0 changed, 0 went." in text
    assert contents(other) == contents(path)
    again = run("import", sent, "--db", other).stdout
    assert "0 trials added" in again
    assert "3 were there" in again
    assert "0 winners are new" in again
    if form == "json":
        both = [run("export", "--format", "json", "--trials", "--db", file).stdout for file in (path, other)]
        assert both[0] == both[1] == sent.read_text()


def test_what_is_chosen_is_exported(path: Path) -> None:
    def exported(*words: object) -> list[tuple[str, str, bool]]:
        document = json.loads(run("export", "--format", "json", "--db", path, *words).stdout)
        return [(row["gpu"], row["status"], row["winner"]) for row in document["trials"]]

    assert exported() == [("a100", "ok", True), ("h100", "ok", True)]
    assert exported("--trials") == [("a100", "ok", True), ("a100", "wrong_result", False), ("h100", "ok", True)]
    assert exported("--gpu", "H100") == [("h100", "ok", True)]
    assert exported("--shape", "1024x2048x64") == [("a100", "ok", True)]
    assert exported("--family", "hvp") == []


def test_csv_is_a_table_of_numbers(path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("export", "--format", "csv", "--trials", "--db", path).stdout)))
    assert list(rows[0]) == list(COLUMNS)
    timed, failed, predicted = rows
    assert json.loads(timed["variant"]) == dict(variant("tf32"))
    assert (timed["measured_us"], timed["p80_us"], timed["default_us"], timed["registers"]) == ("12.5", "13.0", "40.0", "128")
    assert (timed["evidence"], predicted["evidence"], predicted["measured_us"]) == ("measured", "predicted", "")
    assert (failed["status"], failed["winner"], failed["error"]) == ("wrong_result", "0", "inf")


def test_csv_holds_no_formula(tmp_path: Path, problem: Problem) -> None:
    with Store.open(tmp_path / "a.db") as store:
        trial = Trial(problem, "a100", variant(), "ok", HASH)
        store.record(trial, environment=store.environment({"driver": "=1+1"}), prediction=Prediction(1.0))
    (row,) = csv.DictReader(io.StringIO(run("export", "--format", "csv", "--trials", "--db", tmp_path / "a.db").stdout))
    assert row["environment_driver"] == "'=1+1"


def test_t4_has_the_fields_of_its_schema(path: Path) -> None:
    document = json.loads(run("export", "--format", "t4", "--trials", "--db", path).stdout)
    assert document["schema_version"] == "1.0.0"
    allowed = {"timeout", "compile", "runtime", "correctness", "constraints", "correct"}
    assert set(INVALIDITY) <= set(STATUSES)
    assert set(INVALIDITY.values()) | {"runtime"} == allowed
    timed, failed, predicted = document["results"]
    for result in document["results"]:
        assert {"configuration", "times", "invalidity", "correctness", "measurements", "objectives"} <= set(result)
        assert set(result["times"]) == {"compilation_time", "runtimes", "framework", "search_algorithm", "validation"}
    assert timed["configuration"] == {
        **{"family": "toy", "gpu": "a100", "n": 1024, "m": 2048, "d": 64, "dtype": "fp32"},
        **{"schedule": "alternating", "width": 1, "BLOCK_M": 32, "BLOCK_K": 64, "precision": "tf32"},
    }
    assert timed["times"]["runtimes"] == [0.012, 0.0125, 0.013]
    assert timed["times"]["compilation_time"] == 310.5
    assert timed["objectives"] == ["time"]
    assert {"name": "time", "value": 0.0125, "unit": "ms"} in timed["measurements"]
    assert (failed["invalidity"], failed["correctness"], failed["objectives"]) == ("correctness", 0.0, [])
    assert (predicted["objectives"], predicted["times"]["runtimes"]) == (["predicted_time"], []), "predicted is not measured"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "xml"), "unknown format 'xml'; known: csv, json, sqlite, t4"),
        (("--format", "sqlite"), "expected a file for a database; got standard output; name one with -o"),
        (("--format", "json", "--gpu", "a1000"), "unknown GPU 'a1000'"),
        (("--format", "json", "--family", "tory"), "unknown family 'tory'"),
        (("--format", "json", "--shape", "8x8"), "expected a shape NxMxD"),
    ],
)
def test_export_refuses_bad_words(path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run("export", "--db", path, *words)


def test_an_export_too_long_to_import_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otgen.store.reading.MOST_BYTES", {"json": 1000, "sqlite": 1 << 30})
    monkeypatch.setattr("otgen.store.formats.MOST_BYTES", {"json": 1000})
    with pytest.raises(OtgenError, match=r"at most 1,000 bytes of JSON.*or type --format sqlite"):
        run("export", "--format", "json", "--db", path)


def test_an_older_import_does_not_undo_what_was_found_since(tmp_path: Path, problem: Problem) -> None:
    """The database refuted the variant after the sender's trial: the trial is added, and does not win."""
    sender, own = tmp_path / "sender.db", tmp_path / "own.db"
    with Store.open(sender) as store:
        put(store, problem, predicted=1.0)
        store.decide(problem, "a100")
    run("export", "--format", "json", "--db", sender, "-o", tmp_path / "sent.json")
    text = (tmp_path / "sent.json").read_text()
    document = json.loads(text)
    document["trials"][0]["created_at"] = "2001-01-01T00:00:00.000Z"
    (tmp_path / "sent.json").write_text(json.dumps(document))
    with Store.open(own) as store:
        put(store, problem, status="wrong_result")
    assert "1 trials added" in run("import", tmp_path / "sent.json", "--db", own).stdout
    assert read_winners(own) == []


def edited(path: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """An export of `path` with its first trial edited."""
    document = json.loads(run("export", "--format", "json", "--trials", "--db", path).stdout)
    edit(document["trials"][0])
    sent = tmp_path / "sent.json"
    sent.write_text(json.dumps(document))
    return sent


def test_a_row_that_is_not_sound_refuses_the_file_unless_partial(path: Path, tmp_path: Path) -> None:
    sent = edited(path, tmp_path, lambda row: row["variant"].update(BLOCK_M=48))
    with pytest.raises(UsageError, match=r"row 1 of .*sent\.json: expected BLOCK_M among 16, 32, 64; got 48; nothing was imported"):
        run("import", sent, "--db", tmp_path / "own.db")
    assert not (tmp_path / "own.db").exists()
    result = run("import", sent, "--db", tmp_path / "own.db", "--partial")
    assert "2 trials added" in result.stdout
    assert "1 refused" in result.stdout
    found = json.loads(run("import", sent, "--db", tmp_path / "own.db", "--partial", "--json").stdout)
    assert (found["added"], found["known"], len(found["refused"]), found["winners"]["same"]) == (0, 2, 1, 1)
    assert "left out row 1" in result.stderr


def test_a_variant_that_is_not_legal_on_its_gpu(path: Path, tmp_path: Path) -> None:
    large = {"d": 128, "variant": {"BLOCK_M": 64, "BLOCK_K": 128, "precision": "tf32"}}
    sent = edited(path, tmp_path, lambda row: row.update(large))
    with pytest.raises(UsageError, match=r"row 1 of .*: expected a variant that is legal on a100; got .*: too large for a toy"):
        run("import", sent, "--db", tmp_path / "own.db")


def test_a_negative_zero_is_the_zero_that_is_read_back(path: Path, tmp_path: Path) -> None:
    sent = edited(path, tmp_path, lambda row: row.update(render_ms=-0.0))
    for count in (3, 0):
        assert f"{count} trials added" in run("import", sent, "--db", tmp_path / "own.db").stdout


def test_a_number_too_large_for_a_float_is_not_finite(path: Path, tmp_path: Path) -> None:
    sent = edited(path, tmp_path, lambda row: None)
    sent.write_text(sent.read_text().replace('"us": 11.5', '"us": 1e999'))
    with pytest.raises(UsageError, match=r"expected us as a number from 0 to 1e\+300; got inf"):
        run("import", sent, "--db", tmp_path / "own.db")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(("a100", "toy", "ok")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
ROW = {
    "created_at": "2026-01-02T03:04:05.678Z",
    "environment": dict.fromkeys(ENVIRONMENT, "1"),
    **{"family": "toy", "gpu": "a100", "n": 1024, "m": 2048, "d": 64, "dtype": "fp32"},
    **{"flags": {"schedule": "symmetric", "width": 2}, "variant": dict(variant()), "template_hash": HASH},
    **{"status": "ok", "message": "", "seed": 1, **dict.fromkeys(PHASES, 1.5)},
    "compile": {"key": "k", "source_hash": "s", "registers": 1, "spills": 0, "shared_bytes": 2, "instructions": {"mufu": 0.5}},
    "prediction": {"us": 1.5, "terms": {"issue": 0.1}},
    "measurement": {
        **{"protocol": "p", "median_us": 2.0, "p20_us": 1.0, "p80_us": 3.0, "samples_us": [1.0, 2.0], "default_us": 9.0},
        **dict.fromkeys(SENSORS, 1.0),
    },
    "accuracy": [{"metric": "out", "value": None, "budget": 0.5}],
}
PLACES = [(name,) for name in ROW] + [(name, inner) for name, part in ROW.items() if isinstance(part, dict) for inner in part]


@given(place=st.sampled_from(PLACES), value=ANYTHING)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_stands_in_a_field_is_a_fact_or_a_sentence(place: tuple[str, ...], value: object) -> None:
    row = json.loads(json.dumps(ROW))
    folder = row
    for name in place[:-1]:
        folder = folder[name]
    folder[place[-1]] = value
    try:
        fact = Fact.from_json(row)
    except UsageError:
        return
    assert isinstance(misfit(fact, HASH, strangers=False), str)
    again = Fact.from_json(json.loads(json.dumps(fact.to_json())))
    assert again == fact
    assert again.identity == fact.identity


def test_the_row_of_the_test_above_is_sound() -> None:
    fact = Fact.from_json(ROW)
    assert misfit(fact, HASH, strangers=False) == ""
    assert fact.to_json() == ROW
