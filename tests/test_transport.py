"""The transport family: linear in its values, adjoint under a swap of sides, the gradient of the dual objective."""

from __future__ import annotations

import pytest
import torch

from otgen.families import family, tiles, transport
from otgen.problem import Problem
from otgen.render import load
from otgen.verify import call_arguments

KIND = family("transport")


def run(problem: Problem, given: dict[str, torch.Tensor], **axes: int | str) -> torch.Tensor:
    variant = KIND.default(problem).with_(BLOCK_M=32, BLOCK_N=16, **axes)
    call = call_arguments(problem, given, "cpu")
    load(problem, variant).launch(**call)
    return call["out"].double()


@pytest.mark.parametrize("stabiliser", ["running", "shifted"])
def test_transposed_product_is_the_adjoint(stabiliser: str) -> None:
    """<U, P V> = <Pᵀ U, V>, with Pᵀ the same launch, sides swapped."""
    problem, swapped = KIND.problem(70, 45, 5), KIND.problem(45, 70, 5)
    given = transport.inputs(problem, 0)
    probe = torch.randn(70, dtype=torch.float64)
    mirrored = {**given, **{p: given[q] for p, q in zip("xyuvab", "yxvuba")}, "values": probe}
    forward = (probe.float().double() * run(problem, given, stabiliser=stabiliser)).sum()
    backward = (run(swapped, mirrored, stabiliser=stabiliser) * given["values"]).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("width", [1, 2, 16, 33, 100])
def test_any_width_is_columns_of_vectors(width: int) -> None:
    matrix, vector = KIND.problem(40, 30, 3, output="matrix", width=width), KIND.problem(40, 30, 3)
    given = transport.inputs(matrix, 1)
    found = run(matrix, given)
    for k in (0, width - 1):
        column = run(vector, {**given, "values": given["values"][:, k]})
        torch.testing.assert_close(found[:, k], column, rtol=1e-5, atol=1e-7)


def test_zero_weights_give_exact_zeros() -> None:
    problem = KIND.problem(70, 45, 5, output="matrix", width=45)
    given = {**transport.inputs(problem, 2), "values": torch.eye(45, dtype=torch.float64)}
    plan = run(problem, given, stabiliser="shifted")
    assert (given["a"] == 0).any()
    assert (given["b"] == 0).any()
    assert torch.equal(plan == 0, (given["a"] == 0)[:, None] | (given["b"] == 0))
    assert plan.isfinite().all()


def test_gradient_of_the_dual_objective() -> None:
    """∂/∂x of −eps·Σ P at fixed potentials is 2s(r x − P y): automatic differentiation, in natural units."""
    problem = KIND.problem(40, 30, 4, output="gradient")
    given = transport.inputs(problem, 3)
    x = given["x"].clone().requires_grad_()
    f = (given["u"] + given["scale"] / 2 * (given["x"] ** 2).sum(1)) / given["kappa"]
    g = (given["v"] + given["scale"] / 2 * (given["y"] ** 2).sum(1)) / given["kappa"]
    cost = given["cost"] * ((x[:, None] - given["y"]) ** 2).sum(2)
    heavy = given["b"] > 0
    exponent = ((f[:, None] + g - cost) / given["eps"])[:, heavy]
    objective = -given["eps"] * (given["a"][:, None] * given["b"][heavy] * exponent.exp()).sum()
    (expected,) = torch.autograd.grad(objective, x)
    torch.testing.assert_close(run(problem, given, stabiliser="shifted"), expected, rtol=1e-4, atol=1e-6)


def test_an_overflowing_shift_is_redone() -> None:
    """Entries that overflow 2^S but not P: a tiny weight takes them back, if the kernel looks at the maximum first."""
    problem = KIND.problem(20, 17, 2)
    given = transport.inputs(problem, 4)
    given["a"][3] = 1e-30
    given["u"][3] += 150.0
    expected = (tiles.plan({**given, "a": given["a"].float().double()}) @ given["values"])[3]
    found = run(problem, given, stabiliser="shifted")[3]
    assert found.isfinite()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
