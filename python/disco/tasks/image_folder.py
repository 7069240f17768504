"""Photographs in folders, one a class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from disco.errors import InputError
from disco.images import IMAGE_SUFFIXES, Preprocessing, load_image, normalised, read_rgb
from disco.tasks.data import DataOptions, Example, Examples, Subset, TaskData, split_by_class

# Of a crop's area and of its width over its height, as Szegedy et al. (arXiv 1409.4842) drew them,
# but for the smallest area: 0.08 there, for a million images; small sets are trained with more.
_AREA = (0.35, 1.0)
_ASPECT = (3 / 4, 4 / 3)


def load_folder(path: Path, options: DataOptions) -> TaskData:
    """Class folders below `path`, or below its `train` and `val`.

    Files are opened when they are needed; one that cannot be read is an InputError then.

    Args:
        path: holds `train/` and `val/` with the same class folders, or the class folders, which are
            divided then.
        options: augmentation cuts out a part and mirrors it.

    Raises:
        InputError: no such folder, no classes, a class without images, or classes that differ.
    """
    if not path.is_dir():
        raise InputError(f"there is no folder {path}: give one with a folder of images a class")
    preprocessing = options.preprocessing_or(Preprocessing())
    parts = [path / part for part in ("train", "val")]
    present = [part for part in parts if part.is_dir()]
    if len(present) == 1:
        missing = next(part for part in parts if part not in present)
        raise InputError(
            f"{present[0]} is there and {missing} is not: make both, or put the class folders into "
            f"{path} to have them divided"
        )
    if present:
        classes, train = _scan(parts[0], preprocessing, options.augment)
        val_classes, val = _scan(parts[1], preprocessing, augment=False)
        if classes != val_classes:
            odd = sorted(set(classes) ^ set(val_classes))
            raise InputError(
                f"{parts[0]} and {parts[1]} have different classes: {', '.join(odd[:5])} "
                f"({len(odd)} in all) are in one of them only"
            )
        text = f"{path}: {len(train.files)} for training, {len(val.files)} for validation"
        return TaskData(train, val, classes, preprocessing, f"{text}, {len(classes)} classes")
    classes, whole = _scan(path, preprocessing, options.augment)
    first, second = split_by_class(whole.labels, classes, options.val_share, options.split_seed)
    text = (
        f"{path}: {len(first)} for training, {len(second)} for validation, {len(classes)} classes; "
        f"{options.val_share:g} of each class by seed {options.split_seed}"
    )
    halves: tuple[Examples, Examples] = Subset(whole, first), Subset(whole, second)
    return TaskData(*halves, classes, preprocessing, text)


@dataclass(frozen=True)
class FolderImages:
    """Image files and their classes: `labels` int64 [n]."""

    files: tuple[Path, ...]
    labels: Tensor
    preprocessing: Preprocessing
    augment: bool

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, seed: int | None) -> Example:
        """Float32 [3, size, size]; unchanged, as `load_image` reads it; and the class, int64 [].

        Raises InputError.
        """
        path = self.files[index]
        if seed is None or not self.augment:
            return load_image(path, self.preprocessing)[0], self.labels[index]
        image = _cut(read_rgb(path), self.preprocessing.size, seed)
        pixels = torch.from_numpy(np.array(image))
        return normalised(pixels, self.preprocessing)[0], self.labels[index]


def _scan(
    path: Path, preprocessing: Preprocessing, augment: bool
) -> tuple[tuple[str, ...], FolderImages]:
    try:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = [
            sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            for folder in folders
        ]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: allow reading it") from error
    if len(folders) < 2:
        raise InputError(
            f"{path} has {len(folders)} class folders, and at least 2 are needed: a folder of "
            "images a class"
        )
    for folder, files in zip(folders, found, strict=True):
        if not files:
            raise InputError(
                f"the class {folder.name!r} has no image in {folder}: add some that end in "
                f"{', '.join(IMAGE_SUFFIXES)}, or remove the folder"
            )
    labels = [label for label, files in enumerate(found) for _ in files]
    images = FolderImages(_flat(found), torch.tensor(labels), preprocessing, augment)
    return tuple(folder.name for folder in folders), images


def _flat(found: Sequence[Sequence[Path]]) -> tuple[Path, ...]:
    return tuple(path for files in found for path in files)


def _cut(image: Image.Image, size: int, seed: int) -> Image.Image:
    """A part of random size, aspect and place, scaled to a square, mirrored half of the time."""
    box, mirrored = drawn_part(image.width, image.height, seed)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def drawn_part(width: int, height: int, seed: int) -> tuple[tuple[int, int, int, int], bool]:
    """The part of an image that is shown in training: its edges, and whether it is mirrored.

    Args:
        width, height: of the image, in pixels.
        seed: which part.

    Returns:
        Left, top, right and bottom edge, at least a pixel apart.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    area = draw(*_AREA) * width * height
    aspect = math.exp(draw(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
    across = min(width, max(1, round(math.sqrt(area * aspect))))
    down = min(height, max(1, round(math.sqrt(area / aspect))))
    left = round(draw(0, width - across))
    top = round(draw(0, height - down))
    return (left, top, left + across, top + down), draw(0, 1) < 0.5
