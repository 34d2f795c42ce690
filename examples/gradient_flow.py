"""Let noise flow into handwritten digits: each of 300 points descends the Sinkhorn divergence to scikit-learn's digits.

    python examples/gradient_flow.py --out flow.png

The divergence is zero only when the clouds are equal, so the flow x' = −n·∇S(x, y) does not collapse onto the mean, as it would
under transport cost with a bias: the points spread over all ten digits in the proportions of the data. With equal weights 1/n the
velocity of a point is where its transport goes less where its own cloud's does, T_xy(x) − T_xx(x), so a step of 1 is a jump there.
Potentials of one step are a warm start for the next.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import otgen

SHOWN, PIXELS = 24, 4
"""Points of the picture, and the side of a digit's pixel in it."""


def picture(states: Sequence[torch.Tensor]) -> np.ndarray:
    """A row of images for each state, (rows · 9 · PIXELS, SHOWN · 9 · PIXELS) uint8."""
    sheet = np.zeros((len(states), 9, SHOWN, 9))
    for row, state in enumerate(states):
        sheet[row, :8, :, :8] = state[:SHOWN].reshape(SHOWN, 8, 8).permute(1, 0, 2).clamp(0.0, 1.0).numpy()
    return (255 * sheet.reshape(len(states) * 9, SHOWN * 9)).astype(np.uint8).repeat(PIXELS, 0).repeat(PIXELS, 1)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the divergence before and after, the number of steps that raised it, and the largest error of a digit's share."""
    parser = argparse.ArgumentParser(description="Let noise flow into scikit-learn's digits.")
    parser.add_argument("--out", default="gradient_flow.png", help="the PNG to write: the cloud at six times, top to bottom")
    parser.add_argument("--points", type=int, default=300)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--blur", type=float, default=0.4, help="GeomLoss's, for pixels in [0, 1]")
    options = parser.parse_args(argv)

    digits = load_digits()
    y, labels = torch.from_numpy(digits.data / 16.0).float(), torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    x = (y.mean(0) + 0.3 * torch.randn(options.points, 64, generator=generator)).requires_grad_()
    divergence = otgen.SamplesLoss(blur=options.blur, tol=1e-2, warm_start=True)
    values, states = [], []
    for step in range(options.steps + 1):
        value = divergence(x, y)
        values.append(value.item())
        if step * 5 % options.steps == 0:
            states.append(x.detach().clone())
        (gradient,) = torch.autograd.grad(value, x)
        with torch.no_grad():
            x -= 0.2 * options.points * gradient

    nearest = labels[torch.cdist(x.detach(), y).argmin(1)]
    shares, wanted = (torch.bincount(k, minlength=10) / len(k) for k in (nearest, labels))
    Image.fromarray(picture(states)).save(options.out)
    raised = sum(later > earlier for earlier, later in pairwise(values))
    print(divergence.last_result)
    print(f"divergence      {values[0]:.4f} before, {values[-1]:.4f} after {options.steps} steps, {raised} of which raised it")
    print(f"digits' shares  {shares.min():.1%} to {shares.max():.1%}; in the data {wanted.min():.1%} to {wanted.max():.1%}")
    print(f"written         {options.out}")
    return {"before": values[0], "after": values[-1], "raised": raised, "share_error": float((shares - wanted).abs().max())}


if __name__ == "__main__":
    main()
