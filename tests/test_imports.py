"""What importing costs, each in a fresh process: the arrows between modules point one way, and nothing heavy comes uninvited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "triton", "jinja2", "optuna", "sqlite_utils", "sqlalchemy", "click", "rich", "numpy")


def loaded_by(code: str) -> set[str]:
    """Which of `HEAVY` are loaded after `code` ran in a new interpreter."""
    script = f"{code}\nimport sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_otgen_loads_nothing() -> None:
    assert loaded_by("import otgen") == set()


def test_help_needs_click_alone() -> None:
    code = "from otgen.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert loaded_by(code) == {"click"}


@pytest.mark.parametrize(
    "module", ["problem", "errors", "gpus", "precision", "resources", "families", "model", "workload", "isa", "dispatch"]
)
def test_leaves_are_light(module: str) -> None:
    assert loaded_by(f"import otgen.{module}") == set()


def test_solving_on_the_cpu_loads_torch_alone() -> None:
    solve = "import torch, otgen; otgen.solve_sample(torch.rand(9, 2), torch.rand(8, 2), reg=1.0)"
    assert loaded_by(f"import os; os.environ.pop('TRITON_INTERPRET', None); {solve}") <= {"torch", "numpy"}


def test_the_solver_touches_no_gpu_at_import() -> None:
    code = "import otgen\notgen.solve_sample\nimport torch\nassert not torch.cuda.is_initialized()"
    assert "torch" in loaded_by(code)


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("jinja2", {"render.py"}),
        ("optuna", {"search.py"}),
        ("sqlite_utils", {"store/schema.py", "store/connect.py"}),
        ("click", set()),
    ],
)
def test_each_library_has_one_room(package: str, home: set[str]) -> None:
    root = Path(__file__).parents[1] / "otgen"
    users = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(line.strip().startswith((f"import {package}", f"from {package}")) for line in path.read_text().splitlines())
    }
    assert {user for user in users if not user.startswith("cli/")} <= home


def test_imports_point_one_way() -> None:
    """Leaves know nothing of those above them; solvers reach kernels through ops alone."""
    forbidden = {
        "problem": ("families", "render", "store", "dispatch", "solvers", "ops", "cli"),
        "families/sinkhorn": ("render", "store", "dispatch", "solvers", "ops", "cli", "compile", "search"),
        "model": ("families", "store", "search", "compile", "render", "cli"),
        "store/database": ("dispatch", "search", "tuner", "cli", "solvers"),
        "dispatch": ("search", "tuner", "cli", "solvers", "compile", "measure"),
        "ops": ("solvers", "cli", "search", "tuner", "render"),
        "solvers/sinkhorn": ("render", "store", "chunked", "cli", "search", "tuner", "families"),
    }
    root = Path(__file__).parents[1] / "otgen"
    for module, names in forbidden.items():
        lines = (root / f"{module}.py").read_text().splitlines()
        imports = [line.strip() for line in lines if line.strip().startswith(("from otgen", "import otgen"))]
        for name in names:
            assert not [line for line in imports if f"otgen.{name}" in line or f"otgen import {name}" in line], (module, name)
