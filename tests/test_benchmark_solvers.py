"""benchmarks/solvers.py: every contender's potentials are read in its own convention, and the error is that of the plan."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.usefixtures("streamed")


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def solvers():
    yield from benchmark("solvers")


@pytest.fixture(scope="module")
def second_order():
    yield from benchmark("second_order")


@pytest.mark.parametrize("name", ["otgen", "GeomLoss tensorized", "POT sinkhorn_log", "POT lazy", "OTT-JAX"])
def test_a_contender_reaches_the_target_at_some_effort(solvers, name):
    module, run, efforts = solvers.CONTENDERS[name]
    pytest.importorskip(module)
    x, y, eps = solvers.clouds(80, 3, 0.1)
    errors = [solvers.true_error(x, y, eps, *run(x, y, eps, effort)) for effort in efforts(80)]
    assert min(errors) <= solvers.TARGET
    assert errors[-1] <= errors[0]


def test_the_error_is_that_of_the_plan(solvers):
    """Of the product coupling none; of twice the plan the whole mass on either side."""
    x, y, eps = solvers.clouds(700, 2, 1e6)
    zero = torch.zeros(700)
    assert solvers.true_error(x, y, eps, zero, zero) == pytest.approx(0.0, abs=1e-5)
    assert solvers.true_error(x, y, eps, zero + eps * math.log(2.0), zero) == pytest.approx(2.0, abs=1e-5)


def test_the_best_peer_counts_and_a_peer_out_of_time_counts_as_having_taken_it(solvers):
    setting = (10, 2, 0.1)
    rows = [
        solvers.Row(*setting, "otgen", 1e-3, 2.0, 3, 9e-4),
        solvers.Row(*setting, "fast and wrong", 1.0, 0.1, 3, 0.2),
        solvers.Row(*setting, "slow", 0.5, 3.0, 3, 0.2),
        solvers.Row(*setting, "slow", 0.9, 8.0, 3, 8e-4),
        solvers.Row(*setting, "slower", 0.9, 60.0, 0, math.nan, "over the limit"),
    ]
    assert solvers.best_ratios(rows) == [4.0]
    assert solvers.best_ratios([rows[0], rows[-1]]) == [30.0]


@pytest.mark.parametrize("name", ["otgen", "unrolled"])
def test_hessian_vector_products_are_compared_on_the_same_problem(second_order, name, monkeypatch):
    """Both find the product that is solved to the end."""
    monkeypatch.setattr(second_order.torch, "set_num_threads", lambda threads: None)
    row = second_order.attempt(name, 40)
    assert row["error"] < 1e-6
    assert row["updates"] > 0
    assert row["seconds"] > 0
