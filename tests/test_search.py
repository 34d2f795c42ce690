"""The study: never the same variant twice, never an illegal one, and it finds the best of a space it cannot enumerate."""

from __future__ import annotations

import math
from itertools import product

import pytest

from otgen.errors import UsageError
from otgen.problem import Variant
from otgen.search import SAMPLERS, Study

AXES = {
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "num_warps": (2, 4, 8),
    "stabiliser": ("running", "shifted"),
}
LEGAL = [
    variant
    for values in product(*AXES.values())
    if (variant := Variant(dict(zip(AXES, values)))).int("BLOCK_M") * variant.int("BLOCK_N") <= 4096 * variant.int("num_warps")
]


def us(variant: Variant) -> float:
    """A smooth bowl with its bottom at 128×32, 4 warps, shifted."""
    off = abs(math.log2(variant.int("BLOCK_M") / 128)) + abs(math.log2(variant.int("BLOCK_N") / 32))
    return 10.0 + 5 * off + 3 * abs(variant.int("num_warps") - 4) + 4 * (variant["stabiliser"] == "running")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_study_asks_every_legal_variant_once_and_then_stops(sampler: str) -> None:
    study = Study(LEGAL[:40], [], sampler)
    asked = []
    while (variant := study.ask()) is not None:
        asked.append(variant)
        study.tell(variant, us(variant) if len(asked) % 3 else None)
    assert sorted(asked, key=repr) == sorted(LEGAL[:40], key=repr)


def test_the_first_ones_come_first_and_illegal_ones_are_skipped() -> None:
    outside = Variant(BLOCK_M=512, BLOCK_N=16, num_warps=2, stabiliser="running")
    study = Study(LEGAL, [LEGAL[7], outside, LEGAL[7], LEGAL[3]])
    assert [study.ask(), study.ask()] == [LEGAL[7], LEGAL[3]]
    assert study.ask() in LEGAL


def test_what_is_told_is_not_asked_again() -> None:
    study = Study(LEGAL, [LEGAL[0]])
    for variant in LEGAL[:-1]:
        study.tell(variant, us(variant))
    assert study.ask() == LEGAL[-1]
    assert study.ask() is None


def told(study: Study, *variants: Variant) -> None:
    for variant in variants:
        study.tell(variant, us(variant))


def steps(one: Variant, other: Variant) -> int:
    """Along axes of numbers one per value, along the others one in all."""
    places = {axis: [values.index(v[axis]) for v in (one, other)] for axis, values in AXES.items()}  # type: ignore[attr-defined]
    return sum(1 if axis == "stabiliser" and a != b else abs(a - b) for axis, (a, b) in places.items())


def test_every_other_question_is_a_neighbour_of_the_best() -> None:
    best, worse = Variant(BLOCK_M=64, BLOCK_N=64, num_warps=4, stabiliser="shifted"), LEGAL[0]
    study = Study(LEGAL, [], seed=1)
    told(study, worse, best)
    assert study.best == (us(best), best)
    for number in range(8):
        variant = study.ask()
        assert variant is not None
        assert number % 2 or steps(variant, best) == 1
        study.tell(variant, us(best) + 1)


def test_of_the_neighbours_the_lowest_score_comes_first_and_the_hopeless_never() -> None:
    best = Variant(BLOCK_M=64, BLOCK_N=64, num_warps=4, stabiliser="shifted")

    def score(variant: Variant) -> float:
        return math.inf if variant["stabiliser"] == "running" else float(variant.int("BLOCK_M"))

    study = Study(LEGAL, [], score=score)
    told(study, best)
    asked = [study.ask() for _ in range(7)][::2]
    assert asked[0] == best.with_(BLOCK_M=32)
    assert all(variant is not None and variant["stabiliser"] == "shifted" for variant in asked)


def test_a_hint_that_is_no_legal_variant_is_not_scored() -> None:
    def score(variant: Variant) -> float:
        assert variant in LEGAL
        return 1.0

    study = Study(LEGAL, [], score=score)
    assert study.ask([LEGAL[0].with_(BLOCK_M=512), LEGAL[4]]) == LEGAL[4]


def test_hints_come_after_the_first_ones() -> None:
    hint, seen = LEGAL[20], LEGAL[3]
    study = Study(LEGAL, [seen], score=lambda variant: math.inf if variant == LEGAL[21] else 1.0)
    assert study.ask([hint]) == seen
    assert study.ask([seen, LEGAL[21], hint]) == hint, "neither what was seen nor what is hopeless"


class Polish:
    """Two axes on top of LEGAL, the second of which wants the first."""

    def plain(self, variant: Variant) -> Variant:
        return variant.with_(hint=0, order="any")

    def allow(self, variant: Variant) -> bool:
        return variant["order"] == "any" or variant["hint"] == 1

    def near(self, variant: Variant) -> list[Variant]:
        others = [variant.with_(hint=1 - variant.int("hint")), variant.with_(order="fixed"), variant.with_(order="any")]
        return [other for other in others if other != variant and self.allow(other)]


def test_refinements_are_steps_from_the_best_and_go_along_with_it() -> None:
    plain = [variant.with_(hint=0, order="any") for variant in LEGAL]

    def cost(variant: Variant) -> float:
        return us(variant) - variant.int("hint") - (variant["order"] == "fixed")

    study = Study(plain, [], seed=1, score=cost, refinements=Polish())  # type: ignore[arg-type]
    asked: list[Variant] = []
    for _ in range(60):
        variant = study.ask()
        assert variant is not None
        assert variant not in asked
        assert Polish().allow(variant)
        asked.append(variant)
        study.tell(variant, cost(variant))
    bottom = Variant(BLOCK_M=128, BLOCK_N=32, num_warps=4, stabiliser="shifted", hint=1, order="fixed")
    assert study.best == (8.0, bottom)
    assert asked.index(bottom) < 50 < len(LEGAL)


def test_a_refined_variant_that_is_told_or_hinted_counts_once() -> None:
    refined = LEGAL[5].with_(hint=1, order="any")
    study = Study([v.with_(hint=0, order="any") for v in LEGAL], [refined], refinements=Polish())  # type: ignore[arg-type]
    illegal = LEGAL[5].with_(hint=0, order="fixed")
    assert study.ask([illegal]) == refined
    assert study.ask([illegal, refined]) not in (illegal, refined)


def test_tpe_finds_the_bottom_sooner_than_chance() -> None:
    """Median rank of the best of 30 trials over ten seeds: the sampler must learn from what it is told, failures included."""

    def best_of(sampler: str, seed: int) -> float:
        study = Study(LEGAL, [], sampler, seed)
        found = math.inf
        for number in range(30):
            variant = study.ask()
            assert variant is not None
            failed = variant.int("BLOCK_M") == 256 and number % 2
            study.tell(variant, None if failed else us(variant))
            found = found if failed else min(found, us(variant))
        return found

    tpe, random = (sorted(best_of(sampler, seed) for seed in range(10)) for sampler in ("tpe", "random"))
    assert tpe[5] <= random[5]
    assert tpe[5] <= 13.0


def test_same_seed_same_questions() -> None:
    def questions(seed: int) -> list[Variant | None]:
        study = Study(LEGAL, [], "tpe", seed)
        asked = []
        for _ in range(20):
            variant = study.ask()
            assert variant is not None
            study.tell(variant, us(variant))
            asked.append(variant)
        return asked

    assert questions(1) == questions(1)
    assert questions(1) != questions(2)


def test_unknown_sampler() -> None:
    with pytest.raises(UsageError, match="known: random, tpe"):
        Study(LEGAL, [], "simulated annealing")
