"""Images with a class for every pixel: as files, and in memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from disco.errors import InputError
from disco.images import Preprocessing, load_image, normalised, read_rgb
from disco.tasks.data import Example
from disco.tasks.image_folder import drawn_part

# Of pixels that do not count, as in the masks of PASCAL VOC.
IGNORED = 255
_BILINEAR, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


@dataclass(frozen=True)
class MaskedImages:
    """Images in memory: `images` uint8 [n, size, size, 3], `masks` uint8 [n, size, size]."""

    images: Tensor
    masks: Tensor
    preprocessing: Preprocessing
    augment: bool

    def __len__(self) -> int:
        return len(self.masks)

    def load(self, index: int, seed: int | None) -> Example:
        """Float32 [3, size, size] and the mask, uint8 [size, size]: moved and mirrored alike."""
        image, mask = self.images[index], self.masks[index]
        if seed is not None and self.augment:
            image, mask = _moved(image, mask, seed)
        return normalised(image, self.preprocessing)[0], mask


@dataclass(frozen=True)
class MaskedFiles:
    """Image files and the files of their masks.

    Attributes:
        images, masks: in the same order.
        num_classes: masks hold numbers below it, and `IGNORED`.
        preprocessing: of images; masks are scaled and cut alike, without mixing neighbours.
        augment: cut out a part and mirror it.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    num_classes: int
    preprocessing: Preprocessing
    augment: bool

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, seed: int | None) -> Example:
        """Float32 [3, size, size] and the mask, uint8 [size, size].

        Raises InputError if a file cannot be read, if the mask is of another size than the image,
        or if it holds a number that is no class.
        """
        path, mask_path = self.images[index], self.masks[index]
        mask = read_mask(mask_path, self.num_classes)
        image = read_rgb(path)
        if image.size != mask.size:
            raise InputError(
                f"the image {path} has {image.width} x {image.height} pixels and its mask "
                f"{mask_path} {mask.width} x {mask.height}: make them alike"
            )
        size = self.preprocessing.size
        if seed is None or not self.augment:
            box, mirrored = _centre(image.width, image.height, self.preprocessing), False
            found = load_image(path, self.preprocessing)[0]
        else:
            box, mirrored = drawn_part(image.width, image.height, seed)
            image = image.resize((size, size), _BILINEAR, box=box)
            if mirrored:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            found = normalised(torch.from_numpy(np.array(image)), self.preprocessing)[0]
        mask = mask.resize((size, size), _NEAREST, box=box)
        labels = torch.from_numpy(np.array(mask))
        return found, labels.flip(1) if mirrored else labels


def _moved(image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """By at most an eighth, what comes in repeats the border; half of them are mirrored."""
    height, width = mask.shape
    # The seed is a hash: its bits serve as they are.
    down, right = (seed >> 1) % (height // 4 + 1), (seed >> 20) % (width // 4 + 1)
    # By numpy, whose calls take a fifth of torch's time on arrays of this size.
    rows = (np.arange(height) + (down - height // 8)).clip(0, height - 1)[:, None]
    columns = (np.arange(width) + (right - width // 8)).clip(0, width - 1)
    if seed & 1:
        columns = columns[::-1]
    return (
        torch.from_numpy(image.numpy()[rows, columns]),
        torch.from_numpy(mask.numpy()[rows, columns]),
    )


def read_mask(path: Path, num_classes: int) -> Image.Image:
    """A mask's numbers as an image of mode L: a palette's indices, or levels of gray.

    Raises InputError for a file that is none, and for numbers from `num_classes` to 254.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                mode, numbers = opened.mode, np.array(opened)
    except FileNotFoundError as error:
        raise InputError(f"there is no mask {path}: give one of the image's name") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"the mask {path} cannot be read: {error}. Give a whole file") from error
    if mode not in ("P", "L", "1"):
        raise InputError(
            f"the mask {path} has pixels of the kind {mode}; a number a pixel is needed: save it "
            "with a palette or in 8-bit gray"
        )
    labels: NDArray[np.uint8] = numbers.astype(np.uint8)
    found = np.bincount(labels.ravel(), minlength=IGNORED + 1)
    odd = found[num_classes:IGNORED].nonzero()[0]
    if len(odd):
        raise InputError(
            f"the mask {path} has the class {odd[0] + num_classes}, and there are {num_classes}, "
            f"from 0 ({IGNORED} is ignored): correct it, or name more classes"
        )
    return Image.fromarray(labels)


def _centre(
    width: int, height: int, preprocessing: Preprocessing
) -> tuple[float, float, float, float]:
    """The part of an image that `load_image` shows."""
    shown = min(width, height) * preprocessing.size / preprocessing.resize
    left, top = (width - shown) / 2, (height - shown) / 2
    return left, top, left + shown, top + shown
