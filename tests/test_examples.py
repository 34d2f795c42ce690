"""The examples run, and what they print is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
