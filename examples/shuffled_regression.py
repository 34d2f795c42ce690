"""Regression whose rows were shuffled: y = X W + noise, but nobody knows which y belongs to which row of X.

    python examples/shuffled_regression.py --out curves.png

The clouds X W and y are alike only for the right map, so W minimises their Sinkhorn divergence. That is no convex problem: at the
start, half the identity, its Hessian has negative eigenvalues, and from far away there are other minima. Newton's method goes by
steps of conjugate gradients that end at a trust region (`otgen.solvers.trust.steihaug`); the first-order descents that it is
compared with get twice its sweeps over the pairs. Each evaluation starts from the potentials of the last one, and products with the
Hessian count as sweeps too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import otgen
from otgen.solvers.trust import steihaug

Curve = list[tuple[int, float]]

WIDTH, HEIGHT, MARGIN = 640, 420, 50
"""Of the picture, in pixels; the curves keep the margin."""

COLOURS = ("#c0392b", "#2980b9", "#27ae60", "#8e44ad")


class Regression:
    """The divergence of X W (n, d) from y (n, d) as a function of W (d, d), and what it has cost so far.

    passes  sweeps over the pairs;  evaluations  of the divergence with its gradient
    """

    def __init__(self, X: Tensor, y: Tensor, reg: float, tol: float) -> None:
        self.X, self.y, self.options = X, y, {"reg": reg, "tol": tol, "debias": True}
        self.passes, self.evaluations, self.potentials = 0, 0, None

    def at(self, W: Tensor) -> tuple[otgen.OTResult, float, Tensor]:
        """The solved problem, its value, and the gradient (d, d)."""
        W = W.detach().requires_grad_()
        found = otgen.solve_sample(self.X @ W, self.y, potentials_init=self.potentials, **self.options)
        (gradient,) = torch.autograd.grad(found.value, W)
        self.potentials = tuple(f.detach() for f in found.potentials)
        self.passes, self.evaluations = self.passes + found.passes, self.evaluations + 1
        return found, found.value.item(), gradient

    def product(self, found: otgen.OTResult, V: Tensor) -> Tensor:
        """The Hessian in W times V (d, d). Double backward of the value gives the same; `hvp` says how many sweeps it took."""
        moved, log = found.hvp(self.X @ V, tol=1e-3, log=True)
        self.passes += log["passes"]
        return self.X.T @ moved


def newton(problem: Regression, W: Tensor, most: int = 50) -> tuple[Tensor, Curve, list[str]]:
    """W (d, d), the values that it had, each with the sweeps so far, and how each step ended.

    It is over when the gradient is a ten-thousandth of the first, or after `most` evaluations.
    """
    radius = 0.5
    found, value, gradient = problem.at(W)
    curve, ended, first = [(problem.passes, value)], [], float(gradient.norm())
    while (share := float(gradient.norm()) / first) > 1e-4 and problem.evaluations < most:
        step = steihaug(lambda V, at=found: problem.product(at, V), gradient, radius, tol=min(0.3, share))
        tried = problem.at(W + step.step)
        ratio, length = (value - tried[1]) / step.predicted, float(step.step.norm())
        if ratio < 0.25:
            radius = 0.25 * length
        elif ratio > 0.75:
            radius = max(radius, 2.0 * length)
        if ratio > 1e-4:
            W, (found, value, gradient) = W + step.step, tried
        curve.append((problem.passes, value))
        ended.append(step.ended)
        print(f"{problem.evaluations:11} {value:11.3e} {step.iterations:9}  {step.ended:18} {length:6.2f} {ratio:6.2f}")
    return W, curve, ended


def descent(problem: Regression, W: Tensor, optimiser: Callable[..., torch.optim.Optimizer], passes: int) -> tuple[Tensor, Curve]:
    """W and its values after so many sweeps of first-order descent."""
    W, curve = W.clone(), []
    steps = optimiser([W])
    while problem.passes < passes:
        _, value, W.grad = problem.at(W)
        curve.append((problem.passes, value))
        last = W.clone()
        steps.step()
    return last, curve


def picture(curves: dict[str, Curve]) -> Image.Image:
    """The values, on a scale of powers of ten, over the sweeps."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    most = max(passes for curve in curves.values() for passes, _ in curve)
    logs = [np.log10(value) for curve in curves.values() for _, value in curve]
    low, high = int(np.floor(min(logs))), int(np.ceil(max(logs)))

    def place(passes: float, log: float) -> tuple[float, float]:
        right = MARGIN + (WIDTH - 2 * MARGIN) * passes / most
        return right, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (log - low) / (high - low)

    for power in range(low, high + 1):
        draw.line([place(0, power), place(most, power)], fill="#dddddd")
        draw.text((5, place(0, power)[1] - 6), f"1e{power}", fill="black")
    draw.text((WIDTH // 2 - 90, HEIGHT - MARGIN + 12), f"sweeps over the pairs, 0 to {most}", fill="black")
    draw.text((MARGIN, MARGIN - 25), "Sinkhorn divergence", fill="black")
    for row, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS)):
        draw.line([place(passes, np.log10(value)) for passes, value in curve], fill=colour, width=2)
        draw.text((WIDTH - MARGIN - 150, MARGIN + 15 * row), name, fill=colour)
    return image


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns loss, evaluations, sweeps and error of the map, by Newton's method and by the best of the others ("first_…").

    Also the errors of the start and of least squares with the rows in order, and the steps that ended at a negative curvature.
    """
    parser = argparse.ArgumentParser(description="Find a linear map from shuffled rows.")
    parser.add_argument("--out", default="shuffled_regression.png", help="the PNG to write: values over sweeps")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--reg", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args(argv)

    generator = torch.Generator().manual_seed(options.seed)
    n, d, kind = options.points, 4, {"dtype": torch.float64, "generator": generator}
    X, identity = torch.rand(n, d, **kind) ** 2, torch.eye(d, dtype=torch.float64)
    start, true = 0.5 * identity, identity + 0.4 * torch.randn(d, d, **kind)
    ordered = X @ true + options.noise * torch.randn(n, d, **kind)
    y = ordered[torch.randperm(n, generator=generator)]

    def error(W: Tensor) -> float:
        return float((W - true).norm() / true.norm())

    print("evaluations       value  products  step ended at       length  ratio")
    problem = Regression(X, y, options.reg, 1e-6)
    W, curve, ended = newton(problem, start)
    curves = {"Newton, Steihaug": curve}
    numbers = {"loss": curve[-1][1], "evaluations": problem.evaluations, "passes": problem.passes, "error": error(W)}

    slowest = 0.5 / float(torch.linalg.eigvalsh(X.T @ X / n)[-1])
    optimisers = {
        "Adam, 0.1": lambda W: torch.optim.Adam(W, lr=0.1),
        "Adam, 0.3": lambda W: torch.optim.Adam(W, lr=0.3),
        f"descent, {slowest:.2f}": lambda W: torch.optim.SGD(W, lr=slowest),
    }
    rivals = []
    for name, optimiser in optimisers.items():
        other = Regression(X, y, options.reg, 1e-6)
        at, curves[name] = descent(other, start, optimiser, 2 * problem.passes)
        rivals.append((curves[name][-1][1], other.evaluations, other.passes, error(at)))
    best = min(rivals)
    numbers |= dict(zip(("first_loss", "first_evaluations", "first_passes", "first_error"), best))
    known = torch.linalg.lstsq(X, ordered).solution
    numbers |= {"start_error": error(start), "known_error": error(known), "negative": ended.count("negative curvature")}
    picture(curves).save(options.out)

    print(f"\n{'':20} {'value':>10} {'evaluations':>12} {'sweeps':>7} {'error of W':>11}")
    rows = [(numbers["loss"], problem.evaluations, problem.passes, numbers["error"]), *rivals]
    for name, (loss, evaluations, passes, missed) in zip(curves, rows):
        print(f"{name:20} {loss:10.3e} {evaluations:12} {passes:7} {missed:11.1%}")
    print(f"the start's error is {error(start):.0%}, that of least squares with the rows in order {error(known):.1%}")
    print(f"written              {options.out}")
    return numbers


if __name__ == "__main__":
    main()
