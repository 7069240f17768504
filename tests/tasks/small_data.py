"""Tiny data that are made for tests: digits in the shipped file's form, images in class folders."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from disco.tasks.data import Examples, Subset


def write_digits(path: Path, per_class: int = 30, noise: float = 3.0) -> Path:
    """Ten random 8 x 8 figures, `per_class` times each with noise; gzipped if named so."""
    rng = np.random.default_rng(0)
    figures = rng.integers(0, 17, (10, 64))
    labels = np.tile(np.arange(10), per_class)
    levels = figures[labels] + rng.normal(0, noise, (len(labels), 64))
    table = np.column_stack([levels.round().clip(0, 16), labels]).astype(int)
    text = "\n".join(",".join(map(str, row)) for row in table) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (13, 9)) -> Path:
    """An image of random pixels, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) + {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return path


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 5) -> Path:
    """`count` images a class of odd sizes; a class's images have their colour."""
    for label, name in enumerate(classes):
        for number in range(count):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((17 + number, 23, 3), 40, dtype=np.uint8)
            pixels[:, :, label % 3] = 200 + number
            Image.fromarray(pixels).save(path)
    return root


def labels_of(examples: Examples) -> Tensor:
    """The labels of examples to classify, int64 [n], without reading an image."""
    if isinstance(examples, Subset):
        return labels_of(examples.whole)[examples.indices]
    labels: Tensor = getattr(examples, "labels")  # noqa: B009  # a protocol has none
    return labels
