"""Which problems a tuning run covers, and the flags that a command needs to cover another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_family import TOY

from otgen import families
from otgen.dispatch import cure
from otgen.errors import UsageError
from otgen.families import family
from otgen.problem import Problem, Value
from otgen.standard import combinations
from otgen.tuner import standard_problems

SHAPE = 64, 32, 16


def flags(problems: list[Problem]) -> list[dict[str, Value]]:
    return [dict(problem.flags) for problem in problems]


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy family in two schedules, with a batch that is not told of when it is 1."""
    standard = ({"schedule": "alternating"}, {"schedule": "symmetric"})
    kind = replace(TOY, flags={**TOY.flags, "batch": int}, standard=lambda n, m, d: standard)
    monkeypatch.setitem(families.FAMILIES, "toy", kind)


@pytest.mark.usefixtures("batched")
def test_flags_are_set_besides_the_standard_ones() -> None:
    problems = standard_problems(["toy"], [SHAPE], ["fp32", "bf16"], {"batch": 64})
    schedules = "alternating", "symmetric"
    expected = [{"schedule": schedule, "width": 1, "batch": 64} for schedule in schedules for _ in range(2)]
    assert sorted(flags(problems), key=str) == sorted(expected, key=str)
    assert [problem.dtype for problem in problems] == ["fp32", "bf16"] * 2
    assert standard_problems(["toy"], [SHAPE], ["fp32"], {"batch": 1}) == standard_problems(["toy"], [SHAPE], ["fp32"])


@pytest.mark.usefixtures("batched")
def test_a_flag_that_the_standard_set_varies_keeps_what_has_it() -> None:
    assert flags(combinations("toy", *SHAPE, "fp32", {"schedule": "symmetric"})) == [{"schedule": "symmetric", "width": 1}]
    both = combinations("toy", *SHAPE, "fp32", {"schedule": "symmetric", "batch": 8})
    assert flags(both) == [{"schedule": "symmetric", "width": 1, "batch": 8}]


def test_the_standard_set_does_without() -> None:
    assert flags(combinations("transport", *SHAPE, "fp32", {"output": "matrix"})) == [{"output": "matrix", "width": 16}]
    assert flags(combinations("transport", *SHAPE, "fp32", {"output": "matrix", "width": 48})) == [
        {"output": "matrix", "width": 48}
    ]
    assert len(standard_problems(["sinkhorn", "hvp"], None, ["fp32"])) == (4 + 2) * 20 + 4  # lists, in three dimensions


def test_lists_are_no_batch() -> None:
    alone, together = (combinations("sinkhorn", 256, 256, 3, "fp32", {"batch": batch}) for batch in (1, 64))
    assert [problem.listed for problem in alone if problem.listed > 1] == [128]
    assert len(together) == len(alone) - 1
    assert {problem.listed for problem in together} == {1}


@pytest.mark.usefixtures("batched")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bach": 4}, r"unknown flag of toy 'bach'; known: .*Did you mean 'batch'"),
        ({"schedule": "sideways"}, r"unknown value of toy's flag schedule 'sideways'"),
        ({"batch": 0}, r"expected a positive integer for toy's flag batch; got 0"),
        ({"batch": "many"}, r"expected a positive integer for toy's flag batch; got 'many'"),
    ],
)
def test_a_flag_is_checked(given: dict[str, Value], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        standard_problems(["toy"], [SHAPE], ["fp32"], given)


@pytest.mark.usefixtures("batched")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ""),
        ({"schedule": "symmetric"}, ""),
        ({"batch": 1}, ""),
        ({"batch": 64}, " --flag batch=64"),
        ({"schedule": "symmetric", "batch": 64}, " --flag batch=64"),
        ({"width": 8, "batch": 64}, " --flag batch=64 --flag width=8"),
    ],
)
def test_the_cure_names_a_flag_that_the_standard_set_lacks(given: dict[str, Value], words: str) -> None:
    problem = families.family("toy").problem(*SHAPE, **given)
    assert cure(problem, "a100") == f"otgen tune --gpu a100 --family toy --shape 64x32x16{words}"
    told = dict(word.split("=") for word in words.split() if "=" in word)
    covered = combinations("toy", *SHAPE, "fp32", {name: int(value) for name, value in told.items()})
    assert problem in covered


def test_the_cure_names_all_flags_where_one_alone_would_join_others() -> None:
    problem = family("transport").problem(*SHAPE, "bf16", output="matrix", width=48)
    assert cure(problem, "l4").endswith("--shape 64x32x16 --dtype bf16 --flag output=matrix --flag width=48")
    assert combinations("transport", *SHAPE, "bf16", dict(problem.flags)) == [problem]
    narrow = family("transport").problem(*SHAPE, output="matrix")
    assert cure(narrow, "l4").endswith("--flag output=matrix --flag width=1")
    assert combinations("transport", *SHAPE, "fp32", dict(narrow.flags)) == [narrow]
