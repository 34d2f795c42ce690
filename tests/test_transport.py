"""The transport family: linear in its values, adjoint under a swap of sides, the gradient of the dual objective."""

from __future__ import annotations

import pytest
import torch

from otgen.candidates import by_mode, favourites, legal_variants
from otgen.families import family, tiles, transport
from otgen.gpus import gpu
from otgen.problem import Problem
from otgen.render import load
from otgen.verify import call_arguments, failures, verify

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


def both(given: dict[str, torch.Tensor], problem: Problem, **axes: int | str) -> tuple[torch.Tensor, torch.Tensor]:
    """P·values and Pᵀ·values_t."""
    call = call_arguments(problem, given, "cpu")
    load(problem, KIND.default(problem).with_(BLOCK_M=32, BLOCK_N=16, stabiliser="shifted", **axes)).launch(**call)
    return call["out"].double(), call["out_t"].double()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("axes", [{}, {"fusion": "one_sweep"}, {"fusion": "one_sweep", "SPLITS": 4}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_both_products_agree_with_float64(axes: dict[str, int | str], batch: int) -> None:
    """Widths of one block of columns and of more, problems of one block of rows and of several."""
    for n, m, width in ((1, 37, 1), (37, 1, 3), (70, 45, 20), (33, 257, 5)):
        problem = KIND.problem(n, m, 3, output="both", width=width, batch=batch)
        variant = KIND.default(problem).with_(**{"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_W": 16, "stabiliser": "shifted", **axes})
        assert not list(failures(verify(problem, variant, load(problem, variant).launch, "cpu"))), (problem, variant)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_score_that_overflows_in_one_sweep_spoils_neither_product(splits: int) -> None:
    """Row 3 overflows 2^S and not P; so do sums of columns that meet it. What a point of no weight has is never looked at."""
    problem = KIND.problem(70, 130, 2, output="both", width=4)
    given = transport.inputs(problem, 4)
    given["a"][3], given["a"][5] = 1e-30, 0.0
    given["a"] = given["a"].float().double()
    given["u"][5] += 500.0
    given["u"][3] += 131.0 - tiles.scores(given)[3, given["b"] > 0].max()
    expected = transport.reference(problem, given)
    for found, name in zip(both(given, problem, fusion="one_sweep", SPLITS=splits), ("out", "out_t")):
        assert found.isfinite().all()
        assert float((found - expected[name]).abs().max()) < 1e-4 * float(expected[name].abs().max())


def test_both_products_share_their_scores() -> None:
    """In one sweep, half the tiles of two; wide outputs add too much by atomics for that."""
    narrow, wide = (KIND.problem(16384, 16384, 64, output="both", width=width) for width in (4, 256))
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "precision": "tf32", "stabiliser": "shifted"}
    one, two = (KIND.default(narrow).with_(**tile, BLOCK_W=16, fusion=fusion) for fusion in ("one_sweep", "two_launches"))
    tiles_of = [sum(sweep.programs * sweep.tiles for sweep in KIND.work(narrow, variant).launches) for variant in (one, two)]
    assert tiles_of[1] == 2 * tiles_of[0]
    assert KIND.fits(narrow, one, gpu("h100")) == ""
    assert "columns of one application are the rows" in KIND.fits(narrow, two.with_(SPLITS=2), gpu("h100"))
    assert "common shift" in KIND.fits(narrow, one.with_(stabiliser="running"), gpu("h100"))
    assert "both outputs need more" in KIND.fits(wide, one.with_(BLOCK_W=256), gpu("h100"))


@pytest.mark.parametrize("slug", ["h100", "a100"])
def test_one_block_of_256_columns_computes_each_score_once(slug: str) -> None:
    """As many tiles as a vector takes; a block of half of the columns takes twice as many. It fits, in every precision mode."""
    matrix, vector = KIND.problem(16384, 16384, 64, output="matrix", width=256), KIND.problem(16384, 16384, 64)
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 8, "stabiliser": "shifted"}
    for mode in ("tf32", "tf32x3", "bf16", "bf16x3"):
        wide, half = (KIND.default(matrix).with_(**tile, precision=mode, BLOCK_W=width) for width in (256, 128))
        assert KIND.fits(matrix, wide, gpu(slug)) == ""
        alone = KIND.default(vector).with_(**tile, precision=mode)
        scores = [
            sum(sweep.programs * sweep.tiles for sweep in KIND.work(problem, variant).launches)
            for problem, variant in ((vector, alone), (matrix, wide), (matrix, half))
        ]
        assert scores == [scores[0], scores[0], 2 * scores[0]]


@pytest.mark.parametrize("slug", ["h100", "a100"])
def test_a_search_tries_the_widest_block_first(slug: str) -> None:
    """In every precision mode one of two favourites makes all 256 columns: estimates alone would leave them to luck."""
    problem = KIND.problem(16384, 16384, 64, output="matrix", width=256)
    modes = by_mode(legal_variants(problem, gpu(slug)))
    assert {max(int(v["BLOCK_W"]) for v in favourites(problem, gpu(slug), legal, 2)) for legal in modes.values()} == {256}


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
