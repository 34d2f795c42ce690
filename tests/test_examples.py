"""The examples run, and what they print is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import otgen

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.usefixtures("streamed")


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_color_transfer_gives_china_the_colours_of_the_flower(tmp_path):
    out = tmp_path / "recoloured.png"
    numbers = example("color_transfer").main(["--out", str(out), "--colours", "1000", "--reg", "0.05"])
    assert 500 < numbers["colours"] <= 1000
    assert numbers["marginal_error"] <= 1e-2
    assert numbers["after"] < 0.05 * numbers["before"]
    before, model, after = np.split(np.asarray(Image.open(out), dtype=float) / 255.0, 3, axis=1)
    assert before.shape == (427, 640, 3)
    assert np.linalg.norm(after.mean((0, 1)) - model.mean((0, 1))) == pytest.approx(numbers["after"], abs=0.01)


def test_digits_keep_their_labels(capsys):
    numbers = example("digits").main([])
    printed = capsys.readouterr().out
    assert numbers["marginal_error"] <= 1e-3
    assert 0.95 < numbers["agreement"] <= numbers["baseline"] < 0.99
    assert f"{numbers['agreement']:.1%} after transport" in printed
    assert f"{numbers['baseline']:.1%} by nearest neighbour" in printed


def test_noise_flows_into_digits(tmp_path):
    out = tmp_path / "flow.png"
    numbers = example("gradient_flow").main(["--out", str(out)])
    assert numbers["before"] > 3.0
    assert numbers["after"] < 0.1 * numbers["before"]
    assert numbers["raised"] == 0
    assert numbers["share_error"] < 0.02
    assert np.asarray(Image.open(out)).shape == (6 * 9 * 4, 24 * 9 * 4)


def test_shuffled_rows_are_regressed(tmp_path, capsys):
    out = tmp_path / "curves.png"
    numbers = example("shuffled_regression").main(["--out", str(out)])
    assert numbers["negative"] > 0
    assert numbers["loss"] < 0.9 * numbers["first_loss"]
    assert numbers["evaluations"] < 0.5 * numbers["first_evaluations"]
    assert numbers["passes"] < 0.6 * numbers["first_passes"]
    assert numbers["error"] < 0.02 < 0.5 < numbers["start_error"]
    assert numbers["error"] < numbers["first_error"]
    assert numbers["error"] < 2 * numbers["known_error"]
    assert f"{numbers['error']:.1%}" in capsys.readouterr().out
    drawn = np.asarray(Image.open(out))
    assert all(any((drawn == colour).all(2).ravel()) for colour in ((192, 57, 43), (41, 128, 185), (39, 174, 96), (142, 68, 173)))


def test_products_of_the_regression_are_those_of_double_backward():
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.rand(30, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    V, W = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator)
    problem = example("shuffled_regression").Regression(X, y, 0.1, 1e-9)
    found, value, gradient = problem.at(W)
    W.requires_grad_()
    again = otgen.solve_sample(X @ W, y, reg=0.1, tol=1e-9, debias=True).value
    (slope,) = torch.autograd.grad(again, W, create_graph=True)
    (product,) = torch.autograd.grad(slope, W, V)
    assert value == pytest.approx(again.item(), rel=1e-6)
    torch.testing.assert_close(gradient, slope.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(problem.product(found, V), product, rtol=2e-2, atol=2e-3)
    assert problem.evaluations == 1
    assert problem.passes > found.passes > 0
