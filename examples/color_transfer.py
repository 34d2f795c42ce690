"""Give one photograph the colours of another: scikit-learn's china.jpg the palette of its flower.jpg.

    python examples/color_transfer.py --out recoloured.png

Both images become weighted palettes (a cube of bins, each occupied bin its mean colour), transported in RGB. The map found on the
palette is then evaluated at every colour of the image: points of zero weight take no part in the transport, but the barycentric map
is defined for them too. Warm-started from the palette's potentials, that second solve is over after one iteration.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

import otgen

Palette = tuple[np.ndarray, np.ndarray]


def palette(pixels: np.ndarray, colours: int) -> Palette:
    """Mean colours (k, 3) and weights (k,) of the occupied bins, k ≤ `colours`, of the finest cube of bins that has so few.

    pixels  (N, 3) float32 in [0, 1]
    """
    for bins in range(256, 0, -1):
        cell = np.minimum((pixels * bins).astype(np.int64), bins - 1) @ (bins**2, bins, 1)
        _, index, counts = np.unique(cell, return_inverse=True, return_counts=True)
        if len(counts) <= colours:
            break
    sums = np.stack([np.bincount(index, pixels[:, channel]) for channel in range(3)], 1)
    weights = counts / counts.sum()
    return (sums / counts[:, None]).astype(np.float32), weights.astype(np.float32)


def transfer(found: otgen.OTResult, source: Palette, target: Palette, pixels: np.ndarray) -> np.ndarray:
    """The barycentric map of the solved palettes at `pixels` (N, 3), (N, 3)."""
    colours, index = np.unique(pixels, axis=0, return_inverse=True)
    nothing = np.zeros(len(colours), np.float32)
    f, g = found.potentials
    everywhere = otgen.solve_sample(
        np.concatenate((source[0], colours)),
        target[0],
        np.concatenate((source[1], nothing)),
        target[1],
        reg=found.reg,
        tol=2 * found.marginal_error,
        potentials_init=(np.concatenate((f, nothing)), g),
    )
    return everywhere.a_to_b[len(f) :][index.reshape(-1)]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the marginal error, and how far the mean colour is from the target's before and after."""
    parser = argparse.ArgumentParser(description="Recolour china.jpg with the palette of flower.jpg.")
    parser.add_argument("--out", default="color_transfer.png", help="the PNG to write: before, palette's owner, after")
    parser.add_argument("--colours", type=int, default=3000, help="largest number of colours in a palette")
    parser.add_argument("--reg", type=float, default=0.02, help="entropic regularisation, for RGB in [0, 1]")
    options = parser.parse_args(argv)

    image, model = (load_sample_image(name) for name in ("china.jpg", "flower.jpg"))
    pixels, model_pixels = (picture.reshape(-1, 3).astype(np.float32) / 255.0 for picture in (image, model))
    source, target = palette(pixels, options.colours), palette(model_pixels, options.colours)
    found = otgen.solve_sample(source[0], target[0], source[1], target[1], reg=options.reg, tol=1e-2)
    print(found)

    mapped = transfer(found, source, target, pixels)
    recoloured = (mapped.clip(0.0, 1.0) * 255.0).round().astype(np.uint8).reshape(image.shape)
    Image.fromarray(np.concatenate((image, model, recoloured), 1)).save(options.out)
    before, after = (float(np.linalg.norm(p.mean(0) - model_pixels.mean(0))) for p in (pixels, mapped))
    print(f"palettes        {len(source[1])} and {len(target[1])} colours, marginal error {found.marginal_error:.1e}")
    print(f"mean colour     {before:.3f} from the model's before, {after:.3f} after")
    print(f"written         {options.out}")
    return {"marginal_error": found.marginal_error, "before": before, "after": after, "colours": float(len(source[1]))}


if __name__ == "__main__":
    main()
