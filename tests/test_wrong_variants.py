"""A template that is wrong for one value of an axis: what it renders there is refused, however fast, and a right variant wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from otgen.families import family
from otgen.gpus import gpu
from otgen.store import Store
from otgen.tuner import Settings, tune
from otgen.verify import failures, interpret

SINKHORN = family("sinkhorn")
PROBLEM = SINKHORN.problem(4096, 4096, 16, "bf16")
"""Its coordinates have one precision mode."""

START, SUMS = "    u = tl.load(u_ptr + rows, mask=rows < n, other=0.0)\n", "    log_rho = tl.log2(rho)\n"
"""Places in the update of a block of rows: its beginning, and where a shifted sweep has its sums."""

FAULTS = {
    "forgets the last column": (START, "m = m - 1"),
    "forgets the last row": (START, "n = n - 1"),
    "is off by a thousandth": (START, "scale = 1.001 * scale"),
    "stops after two tiles": (START, "m = tl.minimum(m, 2 * BLOCK_N)"),
    "is off by a hundredth in later rows of a block": (SUMS, "rho = tl.where(tl.arange(0, BLOCK_M) < 8, rho, 1.01 * rho)"),
}
"""Fault → its place and its line."""


def plant(edit: Callable[..., None], fault: str, condition: str) -> None:
    """Where `condition` holds, the update of a block of rows has the fault."""
    place, line = FAULTS[fault]
    edit(f"    #: if {condition}\n    {line}\n    #: endif\n", ahead_of=place)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_tells_a_wrong_value_from_the_right_ones(fault: str, edit: Callable[..., None]) -> None:
    plant(edit, fault, "BLOCK_N == 64")
    right, wrong = (SINKHORN.default(PROBLEM).with_(stabiliser="shifted", BLOCK_N=size) for size in (32, 64))
    assert not list(failures(interpret(PROBLEM, right)))
    assert list(failures(interpret(PROBLEM, wrong)))


def test_a_wrong_variant_is_refused_by_the_tuner_however_fast(tmp_path: Path, edit: Callable[..., None]) -> None:
    """Every stage is the real one, in worker processes too. All shifted variants are wrong, and predicted to be the fastest."""
    plant(edit, "forgets the last column", 'stabiliser == "shifted"')
    with Store.open(tmp_path / "tuning.db") as store:
        (summary,) = tune([PROBLEM], gpu("a100"), store, Settings(max_trials=4, jobs=1), lambda progress: None)
    (winner,) = summary.winners
    assert winner.variant["stabiliser"] == "running"
    checked = [trial for trial in summary.trials if trial.error is not None]
    assert {trial.status for trial in checked if trial.variant["stabiliser"] == "shifted"} == {"wrong_result"}
    wrong = [trial for trial in checked if trial.status == "wrong_result"]
    assert {trial.variant["stabiliser"] for trial in wrong} == {"shifted"}
    assert min(trial.predicted_us for trial in wrong) < winner.predicted_us
