"""Renders, against golden files. After an intended change: OTGEN_UPDATE_GOLDEN=1 pytest tests/test_render.py; read the diff."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.exceptions import UndefinedError

from otgen.errors import UsageError
from otgen.families import FAMILIES, family
from otgen.problem import Problem, Variant
from otgen.render import HEADER_LINES, _environment, body_digest, file_name, kernels_digest, load, save, source
from otgen.resources import resource, template_hash

GOLDEN = Path(__file__).parent / "golden"
TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2, "precision": "tf32", "stabiliser": "shifted"}


def case(name: str, axes: dict[str, int | str], d: int = 64, **flags: int | str) -> tuple[Problem, Variant]:
    return family(name).problem(4096, 4096, d, **flags), Variant(TILE, **axes)


PACKED: dict[str, int | str] = {"fusion": "split_step", "SPLITS": 4, "bias": "wgmma", "operands": "packed", "precision": "fp16"}

KEPT: dict[str, int | str] = {"fusion": "half_step", "bias": "mma", "eviction": "last", "num_stages": 1}

LISTED: dict[str, int | str] = {"fusion": "half_step", "BLOCK_K": 16}

LOOPED: dict[str, int | str] = {"fusion": "streamed", "bias": "added", "PROGRAMS": 1}

CASES = {
    "sinkhorn_alternating": case("sinkhorn", {"fusion": "half_step"}, schedule="alternating"),
    "sinkhorn_alternating_running": case("sinkhorn", {"fusion": "half_step", "stabiliser": "running"}, schedule="alternating"),
    "sinkhorn_two_launches": case("sinkhorn", {"fusion": "two_launches", "SPLITS": 1}, schedule="symmetric"),
    "sinkhorn_one_launch": case("sinkhorn", {"fusion": "one_launch", "SPLITS": 1}, schedule="symmetric"),
    "sinkhorn_one_sweep": case("sinkhorn", {"fusion": "one_sweep", "SPLITS": 1}, schedule="symmetric"),
    "sinkhorn_one_sweep_split": case("sinkhorn", {"fusion": "one_sweep", "SPLITS": 4}, schedule="symmetric"),
    "sinkhorn_one_sweep_ordered": case("sinkhorn", {"fusion": "one_sweep", "SPLITS": 4, "sums": "ordered"}, schedule="symmetric"),
    "sinkhorn_debiased": case("sinkhorn", {"fusion": "three_sweeps", "SPLITS": 4, "sums": "ordered"}, schedule="debiased"),
    "sinkhorn_debiased_batch": case("sinkhorn", {"fusion": "three_sweeps", "SPLITS": 4}, schedule="debiased", batch=64),
    "sinkhorn_one_sweep_grouped": case("sinkhorn", {"fusion": "one_sweep", "SPLITS": 4, "GROUP": 8}, schedule="symmetric"),
    "sinkhorn_own": case("sinkhorn", {"fusion": "half_step", "SPLITS": 1}, schedule="own"),
    "sinkhorn_half_sweep": case("sinkhorn", {"fusion": "half_sweep", "SPLITS": 4}, schedule="own"),
    "sinkhorn_alternating_mma": case("sinkhorn", {"fusion": "half_step", "bias": "mma"}, schedule="alternating"),
    "sinkhorn_alternating_exp2_by_fma": case("sinkhorn", {"fusion": "half_step", "exp2_by_fma": 1}, schedule="alternating"),
    "sinkhorn_alternating_descriptor": case("sinkhorn", {"fusion": "half_step", "loads": "descriptor"}, schedule="alternating"),
    "sinkhorn_alternating_eviction": case("sinkhorn", KEPT, schedule="alternating"),
    "sinkhorn_alternating_packed": case("sinkhorn", PACKED, schedule="alternating"),
    "sinkhorn_one_sweep_wgmma": case("sinkhorn", {"fusion": "one_sweep", "SPLITS": 4, "bias": "wgmma"}, schedule="symmetric"),
    "sinkhorn_batch": case("sinkhorn", {"fusion": "half_step"}, schedule="alternating", batch=64),
    "sinkhorn_listed": case("sinkhorn", LISTED, 3, schedule="alternating", listed=128),
    "sinkhorn_listed_wgmma": case("sinkhorn", LISTED | {"bias": "wgmma"}, 3, schedule="alternating", listed=128),
    "transport_vector": case("transport", {}, output="vector"),
    "transport_matrix": case("transport", {"BLOCK_W": 32}, output="matrix", width=100),
    "transport_gradient": case("transport", {"BLOCK_W": 64}, output="gradient"),
    "transport_vector_split": case("transport", {"SPLITS": 4, "stabiliser": "running"}, output="vector"),
    "transport_matrix_split": case("transport", {"SPLITS": 4, "BLOCK_W": 32}, output="matrix", width=100),
    "transport_gradient_split_batch": case("transport", {"SPLITS": 4, "BLOCK_W": 64}, output="gradient", batch=64),
    "transport_both": case("transport", {"fusion": "two_launches", "BLOCK_W": 64}, output="both", width=64),
    "transport_both_one_sweep": case("transport", {"fusion": "one_sweep", "BLOCK_W": 16, "SPLITS": 4}, output="both", width=3),
    "hvp_matvec": case("hvp", {}, product="matvec"),
    "hvp_matvec_split": case("hvp", {"SPLITS": 4}, product="matvec"),
    "hvp_assembly": case("hvp", {"BLOCK_W": 64}, product="assembly"),
    "loop_alternating": case("loop", LOOPED | {"PROGRAMS": 64}, schedule="alternating"),
    "loop_symmetric": case("loop", LOOPED | {"bias": "wgmma", "PROGRAMS": 64}, schedule="symmetric"),
    "loop_own": case("loop", LOOPED, schedule="own"),
    "loop_resident": case("loop", LOOPED | {"fusion": "resident", "num_stages": 1}, schedule="symmetric", batch=64),
    "hvp_assembly_split": case("hvp", {"SPLITS": 4, "BLOCK_W": 64, "stabiliser": "running"}, product="assembly"),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    text = source(*CASES[name])
    path = GOLDEN / f"{name}.py"
    if os.environ.get("OTGEN_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"OTGEN_UPDATE_GOLDEN=1 pytest {__file__}"


def test_goldens_cover_every_family_fusion_and_bias_and_nothing_else() -> None:
    assert {path.stem for path in GOLDEN.glob("*.py")} == set(CASES)
    problems = {(problem.family, problem.flags[0][1]) for problem, _ in CASES.values() if problem.batch == problem.listed == 1}
    combinations = [(kind.name, flags) for kind in FAMILIES.values() for flags in kind.standard(4096, 4096, 64)]
    assert problems == {(name, next(iter(flags.values()))) for name, flags in combinations}
    for schedule in ("symmetric", "own", "debiased"):
        problem = family("sinkhorn").problem(1, 1, 1, schedule=schedule)
        fusions = {v["fusion"] for p, v in CASES.values() if (p.family, p.flags) == (problem.family, problem.flags)}
        assert fusions == set(family("sinkhorn").axes(problem)["fusion"])
    biases = {family("sinkhorn").complete(p, v)["bias"] for p, v in CASES.values() if p.family == "sinkhorn"}
    assert biases == set(family("sinkhorn").axes(problem)["bias"])
    assert {v["fusion"] for p, v in CASES.values() if p.family == "loop"} == {"streamed", "resident"}
    sums = {v.get("sums", "atomic") for p, v in CASES.values() if p.family == "sinkhorn"}
    assert sums == set(family("sinkhorn").axes(problem)["sums"])


@pytest.mark.parametrize("name", CASES)
def test_a_render_parses_lints_and_names_its_numbers(name: str) -> None:
    problem, variant = CASES[name]
    tree = ast.parse(source(problem, variant))
    assigned = {node.targets[0].id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    assert assigned["BLOCK_M"] == "tl.constexpr(128)"
    assert assigned["NUM_WARPS"] == "4"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[-1].name == "launch"
    assert all(ast.get_docstring(function) for function in functions)
    numbers = {n.value for f in functions for n in ast.walk(f) if isinstance(n, ast.Constant) and type(n.value) in (int, float)}
    assert numbers <= {0, 0.5, 1, 2}, "sizes belong to the constants at the top"


def ruff(*arguments: str) -> None:
    result = subprocess.run([sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_templates_are_formatted_python(tmp_path: Path) -> None:
    """A template is a module before rendering too, but for structural alternatives that define a name twice."""
    templates = resource("templates")
    for path in templates.glob("*.py.jinja"):
        whole = re.sub(
            r'#: include "(.+)"\n',
            lambda part: (templates / part[1]).read_text(encoding="utf-8"),
            path.read_text(encoding="utf-8"),
        )
        (tmp_path / path.name.removesuffix(".jinja")).write_text(whole, encoding="utf-8")
    ruff("format", "--check", f"--config={Path(__file__).parents[1] / 'pyproject.toml'}", "--no-cache", str(tmp_path))
    ruff("check", "--isolated", "--no-cache", "--select=E,F,B", "--ignore=E501,F811,F821,F841,B018", str(tmp_path))


def test_renders_pass_the_linter() -> None:
    ruff("check", "--isolated", "--no-cache", "--select=E,F,B", "--ignore=E501", str(GOLDEN))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_name_in_every_folder(name: str) -> None:
    root = Path(__file__).parent
    assert (resource("templates") / f"{name}.py.jinja").exists()
    assert (root / f"test_{name}.py").exists()
    assert {case.split("_")[0] for case in CASES} == set(FAMILIES)


def test_rendering_is_pure() -> None:
    """The same bytes in another process, whatever its hash seed."""
    problem, variant = CASES["sinkhorn_one_sweep"]
    script = (
        "from otgen.families import family; from otgen.problem import Variant; from otgen.render import source; import sys;"
        f"p = family('sinkhorn').problem(4096, 4096, 64, schedule='symmetric');"
        f"sys.stdout.write(source(p, Variant({dict(variant)!r})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment).stdout
    assert other == source(problem, variant)


def test_the_command_in_the_header_reproduces_the_render() -> None:
    text = source(*CASES["transport_matrix"])
    _, command = text.splitlines()[:2]
    words = command.removeprefix("# ").split()
    assert words[0] == "otgen"
    again = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True).stdout
    assert again == text


def test_a_render_runs_where_otgen_is_not_installed(tmp_path: Path) -> None:
    """Copied elsewhere, with nothing but triton and torch, it computes its formula."""
    problem, variant = CASES["sinkhorn_alternating"]
    shutil.copy(save(problem, variant, tmp_path), tmp_path / "kernel.py")
    script = """
import sys
sys.modules["otgen"] = None
import torch, kernel
x, y = torch.randn(5, 64) / 8, torch.randn(7, 64) / 8
u, v, b, zero = torch.randn(5), torch.randn(7), torch.full((7,), 1 / 7), torch.zeros(5)
out, rho = torch.empty(5), torch.empty(5)
kernel.launch(x, y, u, v, b, zero, out, rho, 1.5, 1.0, 1.0)
expected = (b * torch.exp2(u[:, None] + v + 1.5 * x @ y.T)).sum(1)
assert torch.allclose(rho, expected, rtol=1e-5), (rho, expected)
assert torch.allclose(out, u - expected.log2(), rtol=1e-5, atol=1e-5)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)


def test_blocks_are_written_into_a_render_once_each() -> None:
    found: set[str] = set()
    for path in GOLDEN.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        own = re.findall(r"^(?:def )?(\w+)(?= = (?!with_)|\()", text, re.MULTILINE)
        assert len(own) == len(set(own))
        assert "otgen" not in text.split("\n", HEADER_LINES)[HEADER_LINES]
        found |= set(own)
    assert {"product", "score", "row_dots", "not_finite", "LARGEST_SUM"} <= found


def test_sizes_do_not_change_the_body() -> None:
    problem, variant = CASES["sinkhorn_one_sweep"]
    other = family("sinkhorn").problem(1000, 17, 50, schedule="symmetric")
    one, two = source(problem, variant), source(other, variant)
    assert one != two
    assert body_digest(one) == body_digest(two)
    assert file_name(problem, variant, one) == file_name(other, variant, two)
    looped = source(problem, variant.with_(BLOCK_K=32))
    assert body_digest(looped) != body_digest(one)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("row_blocks, column_blocks = ceil(n / BLOCK_M.value)", "row_blocks, column_blocks = -(-n // BLOCK_M.value)", True),
        ("def launch(", "def aside():\n    return 1\n\n\ndef launch(", True),
        ('"num_warps": NUM_WARPS', '"num_warps": 8', False),
        ('"enable_fp_fusion": True', '"enable_fp_fusion": False', False),
        ("BLOCK_N = tl.constexpr(64)", "BLOCK_N = tl.constexpr(32)", False),
        ("rho += tl.sum(b[None, :] * p, 1)", "rho += tl.sum(p * b[None, :], 1)", False),
    ],
)
def test_the_digest_of_kernels_is_of_what_a_compiler_sees(old: str, new: str, same: bool) -> None:
    text = source(*CASES["sinkhorn_one_sweep_split"])
    assert old in text

    assert (kernels_digest(text.replace(old, new)) == kernels_digest(text)) == same


def test_a_render_is_written_once_and_imported_once(tmp_path: Path) -> None:
    problem, variant = CASES["hvp_matvec"]
    path = save(problem, variant, tmp_path)
    before = path.stat().st_mtime_ns
    assert save(problem, variant, tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load(problem, variant, tmp_path) is load(problem, variant, tmp_path)


def test_an_unknown_name_in_a_template_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        _environment().from_string("{{ missing }}").render()


def test_nothing_outside_the_space_reaches_a_template() -> None:
    problem, variant = CASES["hvp_matvec"]
    with pytest.raises(UsageError, match="expected precision among"):
        source(problem, variant.with_(precision='tf32")\nimport os  # '))


def test_template_hash_follows_the_template_and_the_blocks() -> None:
    assert len({template_hash(name) for name in FAMILIES}) == len(FAMILIES)
    assert template_hash("sinkhorn") in source(*CASES["sinkhorn_one_sweep"]).splitlines()[0]
