"""Photographs in: files to normalised float32 tensors, as ImageNet models expect them."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from disco.errors import InputError

# Of an image scaled for the model, which only very long ones or very large models exceed. As many
# as Pillow reads of a file without a warning: 268 MB in RGB.
MOST_PIXELS = 89_478_485
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a model's input.

    Attributes:
        size: side of the square input in pixels.
        resize: length in pixels to which the shorter side is scaled before the centre is cut out.
        mean, std: per channel (red, green, blue), for values in 0..1.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def for_size(cls, size: int) -> Preprocessing:
        """ImageNet's usual preparation for square inputs of `size` pixels (224 of 256)."""
        if size < 1:
            raise InputError(f"an image size of {size} was given; it must be at least 1")
        return cls(size=size, resize=round(size * 256 / 224))

    def to_json(self) -> dict[str, Any]:
        """A plain dict for a manifest."""
        return {
            "size": self.size,
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_json`. Raises InputError if a field is missing or unknown."""
        try:
            mean = (float(data["mean"][0]), float(data["mean"][1]), float(data["mean"][2]))
            std = (float(data["std"][0]), float(data["std"][1]), float(data["std"][2]))
            made = cls(int(data["size"]), int(data["resize"]), mean, std)
            if not 0 < made.size <= made.resize or not all(map(math.isfinite, mean + std)):
                raise ValueError(f"{data!r}")
            if min(std) <= 0:
                raise ValueError(f"std {list(std)!r}")
            return made
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise InputError(
                f"the manifest's description of the input is not usable ({error!r}): "
                "partition the model again"
            ) from error


def load_image(path: str | Path, preprocessing: Preprocessing | None = None) -> Tensor:
    """Read one photograph.

    Args:
        path: a file that Pillow can read. Grayscale, palette, CMYK and 16-bit images are converted
            to RGB, the orientation in the file is followed, of an animation the first frame counts.
            Pixels that are floating-point numbers lie from 0 to 1.
        preprocessing: None is ImageNet's for 224 pixels.

    Returns:
        float32 [1, 3, size, size], contiguous.

    Raises:
        InputError: there is no such file, it is no image, it is damaged, has more than
            `MOST_PIXELS` pixels, or pixels that are NaN, infinite or out of range.
    """
    path = Path(path)
    preprocessing = preprocessing or Preprocessing()
    try:
        image = _centre(path, read_rgb(path), preprocessing)
    except MemoryError as error:
        raise InputError(f"the image {path} does not fit into memory: scale it down") from error
    return normalised(torch.from_numpy(np.array(image)), preprocessing)


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [height, width, 3] to float32 [1, 3, height, width], contiguous."""
    mean, std = _constants(preprocessing)
    return ((pixels.float() / 255.0 - mean) / std).permute(2, 0, 1).unsqueeze(0).contiguous()


@lru_cache
def _constants(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    return torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)


def find_images(path: str | Path) -> list[Path]:
    """The image files that `path` stands for: itself, or those of a folder in order of name.

    A folder's files with other suffixes than `IMAGE_SUFFIXES` are left out. Raises InputError if
    nothing is there or the folder has no image.
    """
    path = Path(path)
    try:
        return _find(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: allow reading it") from error


def _find(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise InputError(
                f"the folder {path} has no image: "
                f"give a folder with files that end in {_listed(IMAGE_SUFFIXES)}"
            )
        return found
    if not path.exists():
        raise InputError(f"there is no file or folder {path}: give an image, or a folder of images")
    return [path]


def default_photograph() -> Path:
    """The photograph that is classified if the user names none.

    It is matplotlib's sample photograph of Grace Hopper (by James S. Davis, US Navy, in the public
    domain). It is found as a file; matplotlib is not imported. Raises InputError if it is absent.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
        if path.is_file():
            return path
    raise InputError(
        "no image was given, and the default photograph, which matplotlib ships, is not installed: "
        "give one with --image FILE, or `pip install 'disco-kernels[demo]'`"
    )


def read_rgb(path: Path) -> Image.Image:
    """A file's pixels, converted to 8-bit RGB as `load_image` says, which raises the same."""
    try:
        _check_file(path)
        with warnings.catch_warnings():
            # Pillow only warns at its limit, and refuses at twice that.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return _to_rgb(path, ImageOps.exif_transpose(opened))
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"the image {path} has too many pixels; at most {Image.MAX_IMAGE_PIXELS} are read: "
            f"scale it down"
        ) from error
    except PermissionError as error:
        raise InputError(f"the image {path} may not be read: allow reading it") from error
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: give an image file") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path} is not an image that can be read: give a JPEG, PNG or another format of Pillow"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # SyntaxError is what Pillow raises for broken PNG chunks.
        raise InputError(f"the image {path} cannot be read: {error}. Give a whole file") from error


def _check_file(path: Path) -> None:
    """A pipe would be waited for, and a device may have no end."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: give one image file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a pipe or a device: give an image file")


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit values at 255.
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        # Pillow would clip at 0 and 255, and make any number of NaN.
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise InputError(f"the image {path} has pixels that are NaN or infinite: repair it")
        if pixels.min() < 0 or pixels.max() > 1:
            raise InputError(
                f"the image {path} has floating-point pixels from {pixels.min():g} to "
                f"{pixels.max():g}; they may lie from 0 to 1: scale them, or save 8-bit pixels"
            )
        image = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    return image.convert("RGB")


def _centre(path: Path, image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    width, height = image.size
    scale = preprocessing.resize / min(width, height)
    scaled = (
        max(preprocessing.resize, round(width * scale)),
        max(preprocessing.resize, round(height * scale)),
    )
    if scaled[0] * scaled[1] > MOST_PIXELS:
        raise InputError(
            f"the image {path} of {width} x {height} pixels would be scaled to {scaled[0]} x "
            f"{scaled[1]}, and at most {MOST_PIXELS} pixels are allowed: cut it to the part that "
            f"matters, or take a smaller image size"
        )
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    left = (scaled[0] - preprocessing.size) // 2
    top = (scaled[1] - preprocessing.size) // 2
    return image.crop((left, top, left + preprocessing.size, top + preprocessing.size))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]
