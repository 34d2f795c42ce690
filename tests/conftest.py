"""Kernels are interpreted unless the caller says otherwise; nothing a test does touches the user's cache or database.

Tests marked gpu are skipped where torch sees no CUDA device; torch is imported for that only when such a test is about to run.
"""

from __future__ import annotations

import os
import tempfile

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads, here and in processes that tests start: tests run side by side
_HOME = tempfile.mkdtemp(prefix="otgen-tests-")
os.environ["OTGEN_CACHE"] = os.path.join(_HOME, "cache")
os.environ["OTGEN_DB"] = os.path.join(_HOME, "tuning.db")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
