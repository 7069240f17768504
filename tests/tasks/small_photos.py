"""Photographs that are made for tests, of random but smooth content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(root: Path, count: int = 4, size: tuple[int, int] = (70, 53)) -> Path:
    """`count` pictures `0.png`, `1.png`, ... of `size` (width, height), all different."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photo(number, size).save(root / f"{number}.png")
    return root


def photo(seed: int, size: tuple[int, int] = (70, 53)) -> Image.Image:
    """Sharp rectangles of random colours, softly shaded."""
    rng = np.random.default_rng(seed)
    coarse, fine = (
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(size, kind)
        for kind in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
    )
    return Image.blend(coarse, fine, 0.3)
