"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships, read as a file.

scikit-learn itself is not imported: it would bring a second OpenMP into the process. The data are
the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin, Kaynak).
"""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from disco.errors import InputError
from disco.images import Preprocessing, normalised
from disco.tasks.data import DataOptions, Example, Subset, TaskData, split_by_class

_SIDE, _LEVELS, _CLASSES = 8, 16, 10
# The mean and deviation of the shipped digits, with 16 levels as 1: 0.3053 and 0.3760.
USUAL = Preprocessing(_SIDE, _SIDE, (0.305, 0.305, 0.305), (0.376, 0.376, 0.376))


def load_digits(path: Path | None, options: DataOptions) -> TaskData:
    """The digits, each class divided by seed into training and validation.

    Args:
        path: a file in the shipped one's form (CSV, 64 levels from 0 to 16 and the digit a row,
            gzipped if it ends in .gz); None for the one of the installed scikit-learn.
        options: augmentation moves a digit by at most one pixel.

    Raises:
        InputError: no such file, or one that does not have this form.
    """
    found = _installed() if path is None else path
    levels, labels = _read(found)
    classes = tuple(str(digit) for digit in range(_CLASSES))
    preprocessing = options.preprocessing_or(USUAL)
    # Rounded to what an image file holds: a digit saved as PNG is the same input.
    pixels = (levels * 255.0 / _LEVELS).round().to(torch.uint8).reshape(-1, _SIDE, _SIDE)
    digits = Digits(pixels, labels, preprocessing, options.augment)
    train, val = split_by_class(labels, classes, options.val_share, options.split_seed)
    return TaskData(
        train=Subset(digits, train),
        val=Subset(digits, val),
        classes=classes,
        preprocessing=preprocessing,
        text=f"digits ({found}): {len(train)} for training, {len(val)} for validation, "
        f"{options.val_share:g} of each class by seed {options.split_seed}",
    )


@dataclass(frozen=True)
class Digits:
    """Digits in memory: `pixels` uint8 [n, 8, 8], `labels` int64 [n]."""

    pixels: Tensor
    labels: Tensor
    preprocessing: Preprocessing
    augment: bool

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, seed: int | None) -> Example:
        """Float32 [3, size, size], the three colours alike, and the digit, int64 []."""
        image = self.pixels[index]
        if seed is not None and self.augment:
            image = _moved(image, seed)
        size = self.preprocessing.size
        if size != _SIDE:
            # As `load_image` scales a file.
            scaled = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
            image = torch.from_numpy(np.array(scaled))
        rgb = image[:, :, None].expand(-1, -1, 3)
        return normalised(rgb, self.preprocessing)[0], self.labels[index]


def _moved(image: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(image, (1, 1, 1, 1))[down : down + _SIDE, right : right + _SIDE]


def _installed() -> Path:
    spec = importlib.util.find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return path
    raise InputError(
        "the digits are a file of scikit-learn, which is not installed: `pip install "
        "scikit-learn`, or name the file with --data digits:/path/to/digits.csv.gz"
    )


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Levels, float32 [n, 64], and labels, int64 [n]."""
    what = f"the digits file {path}"
    if not path.is_file():
        raise InputError(f"there is no digits file {path}: give the digits.csv.gz of scikit-learn")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("ascii")
        table = np.array([line.split(",") for line in text.splitlines() if line], dtype=np.float32)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{what} is damaged or no CSV of numbers ({error}): copy it again") from (
            error
        )
    if table.ndim != 2 or table.shape[1] != _SIDE**2 + 1 or not len(table):
        raise InputError(f"{what} has no rows of {_SIDE**2} levels and a digit: give another file")
    levels, labels = table[:, :-1], table[:, -1]
    good_levels = ((levels >= 0) & (levels <= _LEVELS)).all()
    if not good_levels or not np.isin(labels, np.arange(_CLASSES)).all():
        raise InputError(f"{what} has levels outside 0 to {_LEVELS} or digits outside 0 to 9")
    return torch.from_numpy(levels.copy()), torch.from_numpy(labels.astype(np.int64))
