"""The HVP family: the assembly is the derivative of the gradient, the product is symmetric, a translation is an eigenvector."""

from __future__ import annotations

import pytest
import torch

from otgen.families import family, hvp
from otgen.problem import Problem
from otgen.render import load

ASSEMBLY = family("hvp").problem(30, 25, 3, product="assembly")
EPS, COST = 0.3, 1.0
LOG2_E = 1.4426950408889634


def solved(problem: Problem) -> dict[str, torch.Tensor]:
    """Clouds with converged potentials (float64, dense Sinkhorn), non-uniform weights, and a random direction."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, problem.d, generator=generator, dtype=torch.float64) * 0.5 for size in (problem.n, problem.m))
    a, b = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.2 for size in (problem.n, problem.m))
    a, b = a / a.sum(), b / b.sum()
    f, g = potentials(x, y, a, b)
    kappa = LOG2_E / EPS
    scale = 2 * COST * kappa
    direction = torch.randn(problem.n, problem.d, generator=generator, dtype=torch.float64)
    return {
        "x": x, "y": y, "a": a, "b": b, "u": kappa * f - scale / 2 * (x * x).sum(1), "v": kappa * g - scale / 2 * (y * y).sum(1),
        "marginal": a, "direction": direction, "scale": scale, "cost": COST, "inverse_eps": 1 / EPS,
    }  # fmt: skip


def potentials(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cost = COST * torch.cdist(x, y) ** 2
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(500):
        f = -EPS * torch.logsumexp((g - cost) / EPS + b.log(), 1)
        g = -EPS * torch.logsumexp((f[:, None] - cost) / EPS + a.log()[:, None], 0)
    return f, g


def plan(given: dict[str, torch.Tensor]) -> torch.Tensor:
    s = given["u"][:, None] + given["v"] + given["scale"] * given["x"] @ given["y"].T
    return given["a"][:, None] * given["b"] * torch.exp2(s)


def with_solution(given: dict[str, torch.Tensor], direction: torch.Tensor) -> dict[str, torch.Tensor]:
    """(w_f, w_g) of [diag r, P; Pᵀ, diag c] (w_f, w_g) = (P∘dC·1, (P∘dC)ᵀ·1), by a dense pseudo-inverse."""
    p, x, y = plan(given), given["x"], given["y"]
    d_cost = 2 * COST * ((x * direction).sum(1)[:, None] - direction @ y.T)
    system = torch.cat([torch.cat([p.sum(1).diag(), p], 1), torch.cat([p.T, p.sum(0).diag()], 1)])
    right = torch.cat([(p * d_cost).sum(1), (p * d_cost).sum(0)])
    w = torch.linalg.pinv(system, hermitian=True, rtol=1e-10) @ right
    return {**given, "direction": direction, "w_f": w[: len(x)], "w_g": w[len(x) :]}


def gradient(given: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    f, g = potentials(x, given["y"], given["a"], given["b"])
    cost = COST * torch.cdist(x, given["y"]) ** 2
    p = given["a"][:, None] * given["b"] * torch.exp((f[:, None] + g - cost) / EPS)
    return 2 * COST * (p.sum(1)[:, None] * x - p @ given["y"])


def interpreted(given: dict[str, torch.Tensor], **axes: int | str) -> torch.Tensor:
    kind = family("hvp")
    variant = kind.default(ASSEMBLY).with_(BLOCK_M=32, BLOCK_N=16, **axes)
    arguments = kind.arguments(ASSEMBLY)
    call = {
        name: given[name] if isinstance(spec, float) else given[name].float() for name, spec in arguments.items() if name != "out"
    }
    out = torch.full((ASSEMBLY.n, ASSEMBLY.d), torch.nan)
    load(ASSEMBLY, variant).launch(**call, out=out)
    return out.double()


def test_assembly_is_the_derivative_of_the_gradient() -> None:
    given = solved(ASSEMBLY)
    step = 1e-5
    ahead, behind = (gradient(given, given["x"] + sign * step * given["direction"]) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    whole = with_solution(given, given["direction"])
    torch.testing.assert_close(hvp.reference(ASSEMBLY, whole)["out"], expected, rtol=1e-6, atol=1e-7)
    for stabiliser in ("running", "shifted"):
        torch.testing.assert_close(interpreted(whole, stabiliser=stabiliser), expected, rtol=1e-3, atol=1e-4)


def test_hessian_is_symmetric() -> None:
    given = solved(ASSEMBLY)
    other = torch.randn(ASSEMBLY.n, ASSEMBLY.d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    one = hvp.reference(ASSEMBLY, with_solution(given, given["direction"]))["out"]
    two = hvp.reference(ASSEMBLY, with_solution(given, other))["out"]
    torch.testing.assert_close((other * one).sum(), (given["direction"] * two).sum(), rtol=1e-9, atol=1e-9)


def test_a_translation_is_an_eigenvector() -> None:
    """A common shift A_i = t changes no plan: (H A)_i = 2s·r_i t exactly, whatever the clouds."""
    given = solved(ASSEMBLY)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    whole = with_solution(given, shift.expand(ASSEMBLY.n, -1).clone())
    expected = 2 * COST * given["a"][:, None] * shift
    torch.testing.assert_close(interpreted(whole, stabiliser="shifted"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_homogeneous_in_the_direction(size: float) -> None:
    given = solved(ASSEMBLY)
    unit = interpreted(with_solution(given, given["direction"]), stabiliser="shifted")
    scaled = interpreted(with_solution(given, size * given["direction"]), stabiliser="shifted")
    torch.testing.assert_close(scaled / size, unit, rtol=1e-4, atol=1e-5)
