"""Kernels are interpreted unless the caller says otherwise; nothing a test does touches the user's cache or database.

Tests marked gpu are skipped where torch sees no CUDA device, those marked slow without --wide.
torch is imported here only for tests that need it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_family import TOY, install

from otgen import render, resources
from otgen.problem import Problem

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads, here and in processes that tests start: tests run side by side
_HOME = tempfile.mkdtemp(prefix="otgen-tests-")
os.environ["OTGEN_CACHE"] = os.path.join(_HOME, "cache")
os.environ["OTGEN_DB"] = os.path.join(_HOME, "tuning.db")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wide", action="store_true", help="run what is marked slow too: all of what else is sampled")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--wide"):
        pytest.skip("takes minutes; --wide runs it")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The PyTorch path, on one thread: tests may run side by side.

    Triton comes in while its interpreter is on: imported without, it could not have it later.
    """
    import torch
    import triton  # noqa: F401

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy family is known."""
    install(monkeypatch)


@pytest.fixture
def problem() -> Problem:
    """One of the toy family."""
    return TOY.problem(1024, 2048, 64)


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Inserts text into a copy of sinkhorn's template, at its end or `ahead_of` the one place in its parts that reads so.

    The copy is the present template from then on, in worker processes too: they import otgen from a link beside it.
    """
    templates = shutil.copytree(resources.resource("templates"), tmp_path / "templates")
    whole = templates / "sinkhorn.py.jinja"
    (tmp_path / "otgen").symlink_to(resources.PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    for module in (resources, render):
        monkeypatch.setattr(module, "resource", lambda folder: tmp_path / folder)
    caches = (resources.template_hash, render._environment)

    def insert(text: str, ahead_of: str = "") -> None:
        parts = {path: path.read_text(encoding="utf-8") for path in (whole, *(templates / "sinkhorn").glob("*.jinja"))}
        (path,) = (path for path, before in parts.items() if before.count(ahead_of) == 1) if ahead_of else [whole]
        place = parts[path].index(ahead_of) if ahead_of else len(parts[path])
        path.write_text(parts[path][:place] + text + parts[path][place:], encoding="utf-8")
        for cache in caches:
            cache.cache_clear()

    insert("")
    yield insert
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a tuning database may be made: neither it nor its folder is there yet."""
    return tmp_path / "folder" / "tuning.db"


SWEEPS = (
    "sinkhorn_half_step",
    "sinkhorn_own_step",
    "sinkhorn_debiased_step",
    "sinkhorn_symmetric_step",
    "apply_plan",
    "apply_plan_both",
    "plan_gradient",
    "hvp_matvec",
    "hvp_assemble",
)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each launch of `otgen.ops` is made; every one of these is a sweep."""
    from otgen import ops

    count: Counter[str] = Counter()

    def counted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            count[name] += 1
            return launch(*arguments, **options)

        return wrapped

    for name in SWEEPS:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return count


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a share nobody wrote spoils its sum."""
    import torch

    whole = torch.Tensor.new_empty

    def new_empty(self: Any, *args: Any, **options: Any) -> Any:
        new = whole(self, *args, **options)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
