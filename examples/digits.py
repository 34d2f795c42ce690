"""Transport between two halves of scikit-learn's handwritten digits, 64 pixels each, and what becomes of the labels.

    python examples/digits.py

Each image of the first half is carried to the second by the barycentric map, and takes the label of the image nearest to where it
arrives. Transport knows no labels: how often the label is right says how much of the classes its plan respects. The baseline is the
label of the nearest image without transport.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits

import otgen


def nearest_labels(points: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The label of the image nearest to each point."""
    return labels[torch.cdist(points, images).argmin(1)]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the marginal error, and the label agreement with and without transport, in [0, 1]."""
    parser = argparse.ArgumentParser(description="Transport one half of the digits to the other.")
    parser.add_argument("--reg", type=float, default=0.05, help="entropic regularisation, as a fraction of the mean cost")
    parser.add_argument("--tol", type=float, default=1e-3, help="L1 marginal error to stop at")
    options = parser.parse_args(argv)

    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    source, target = images[0::2], images[1::2]
    source_labels, target_labels = labels[0::2], labels[1::2]

    mean_cost = float(torch.cdist(source, target).square().mean())
    result = otgen.solve_sample(source, target, reg=options.reg * mean_cost, tol=options.tol)
    print(result)

    agreement = nearest_labels(result.a_to_b, target, target_labels).eq(source_labels).double().mean().item()
    baseline = nearest_labels(source, target, target_labels).eq(source_labels).double().mean().item()
    print(f"marginal error    {result.marginal_error:.1e}")
    print(f"label agreement   {agreement:.1%} after transport")
    print(f"                  {baseline:.1%} by nearest neighbour alone")
    return {"marginal_error": result.marginal_error, "agreement": agreement, "baseline": baseline}


if __name__ == "__main__":
    main()
