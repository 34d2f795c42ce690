"""Kernels are interpreted unless the caller says otherwise; nothing a test does touches the user's cache or database."""

import os
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")
_HOME = tempfile.mkdtemp(prefix="otgen-tests-")
os.environ["OTGEN_CACHE"] = os.path.join(_HOME, "cache")
os.environ["OTGEN_DB"] = os.path.join(_HOME, "tuning.db")
