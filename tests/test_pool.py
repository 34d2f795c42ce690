"""A task that hangs, crashes or raises costs itself and nothing else."""

from __future__ import annotations

import os
import time

from otgen.pool import Pool, Role


def square(x: int) -> int:
    return x * x


def hang() -> None:
    time.sleep(60)


def die() -> None:
    os._exit(7)


def refuse() -> None:
    raise ValueError("no")


def environment(name: str) -> str | None:
    return os.environ.get(name)


def unpicklable() -> object:
    return lambda: None


def test_every_task_reports_once_whatever_happens() -> None:
    tasks = {"hang": hang, "die": die, "refuse": refuse, "unpicklable": unpicklable}
    with Pool(task=Role(2, limit=4.0)) as pool:
        for key, task in tasks.items():
            pool.submit("task", key, task)
        for x in range(8):
            pool.submit("task", x, square, x)
        outcomes = {outcome.key: outcome for outcome in pool.outcomes()}
    assert {key: outcomes[key].status for key in tasks} == {
        "hang": "timeout",
        "die": "crashed",
        "refuse": "error",
        "unpicklable": "error",
    }
    assert [outcomes[x].value for x in range(8)] == [x * x for x in range(8)]
    assert outcomes["hang"].message == "took longer than 4 s"
    assert outcomes["die"].message == "worker ended with code 7"
    assert outcomes["refuse"].message == "ValueError: no"


def test_a_role_may_ask_for_a_fresh_worker_after_an_error() -> None:
    pids = {}
    for fresh in (False, True):
        with Pool(task=Role(1, limit=30.0, fresh_after_error=fresh)) as pool:
            for key, task in (("before", os.getpid), ("error", refuse), ("after", os.getpid)):
                pool.submit("task", key, task)
            outcomes = {outcome.key: outcome for outcome in pool.outcomes()}
        assert outcomes["error"].message == "ValueError: no"
        pids[fresh] = outcomes["before"].value == outcomes["after"].value
    assert pids == {False: True, True: False}


def test_each_role_has_its_own_environment() -> None:
    os.environ["OTGEN_TEST_HERE"] = "parent"
    child = Role(1, limit=30.0, environment={"OTGEN_TEST_HERE": None, "OTGEN_TEST_THERE": "child"})
    with Pool(child=child, plain=Role(1, limit=30.0)) as pool:
        for role in ("child", "plain"):
            for name in ("OTGEN_TEST_HERE", "OTGEN_TEST_THERE"):
                pool.submit(role, (role, name), environment, name)
        found = {outcome.key: outcome.value for outcome in pool.outcomes()}
    assert found == {
        ("child", "OTGEN_TEST_HERE"): None,
        ("child", "OTGEN_TEST_THERE"): "child",
        ("plain", "OTGEN_TEST_HERE"): "parent",
        ("plain", "OTGEN_TEST_THERE"): None,
    }
    assert "OTGEN_TEST_THERE" not in os.environ
