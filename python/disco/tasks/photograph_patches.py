"""Photographs, those that packages ship or a folder's, as patches of two resolutions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from disco.errors import InputError
from disco.images import IMAGE_SUFFIXES, Preprocessing, read_rgb
from disco.tasks.data import DataOptions, TaskData, split_by_class
from disco.tasks.patches import Pair, Patches, grid_places, pair_of, training_places
from disco.tasks.photographs import photograph_files

CLASSES = ("red", "green", "blue")
# Inputs stay in [0, 1], as outputs are.
USUAL = Preprocessing(24, 24, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SCALES = (2, 3, 4)
# SSIM's window of 11 pixels has to fit into the smallest high-resolution patch without its border.
_SMALLEST = 8
_READERS = 4


@dataclass(frozen=True)
class PatchOptions:
    """Of data, in their name: ``photographs:scale=3,train=4000``.

    Attributes:
        scale: high resolution over low: 2, 3 or 4.
        train: patches an epoch.
        val: at most so many patches for validation.
    """

    scale: int = 2
    train: int = 2000
    val: int = 2000


def patch_options(text: str) -> PatchOptions:
    """Read ``name=number`` separated by commas, or nothing. Raises InputError."""
    names = [f.name for f in fields(PatchOptions)]
    given: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in names or not re.fullmatch(r"[0-9]{1,9}", number):
            raise InputError(
                f"the option {part!r} of the data is none of {', '.join(names)} with a whole "
                "number, for example scale=2,train=2000"
            )
        given[name] = int(number)
    options = replace(PatchOptions(), **given)
    if options.scale not in SCALES:
        raise InputError(
            f"a scale of {options.scale} was given; it is one of {', '.join(map(str, SCALES))}"
        )
    if min(options.train, options.val) < 1:
        raise InputError(f"{text} asks for no patches: give at least 1 each for train and val")
    return options


def load_shipped(patches: PatchOptions, options: DataOptions) -> TaskData:
    """Of the photographs that packages ship, see `disco.tasks.photographs`. Raises InputError."""
    files = [photograph_files(training) for training in (True, False)]
    return _loaded("photographs", files[0], files[1], patches, options)


def load_photos(path: Path, patches: PatchOptions, options: DataOptions) -> TaskData:
    """Of a folder's photographs, however deep they lie.

    Args:
        path: with `train/` and `val/`, or photographs that are divided then: whole ones, so that no
            photograph gives patches to both parts.
        patches, options: of the data. Photographs are read at once and stay in memory.

    Raises:
        InputError: no such folder, no photographs, or not one that can be used.
    """
    if not path.is_dir():
        raise InputError(f"there is no folder {path}: give one with photographs")
    parts = [path / part for part in ("train", "val")]
    present = [part for part in parts if part.is_dir()]
    if len(present) == 1:
        missing = next(part for part in parts if part not in present)
        raise InputError(
            f"{present[0]} is there and {missing} is not: make both, or put the photographs into "
            f"{path} to have them divided"
        )
    if present:
        return _loaded(str(path), _files(parts[0]), _files(parts[1]), patches, options)
    files = _files(path)
    if len(files) < 2:
        raise InputError(
            f"{path} has one photograph, and at least 2 are needed to divide them into training "
            "and validation"
        )
    numbers = split_by_class(
        torch.zeros(len(files), dtype=torch.int64),
        ("photographs",),
        options.val_share,
        options.split_seed,
    )
    train, val = ([files[number] for number in part.tolist()] for part in numbers)
    data = _loaded(str(path), train, val, patches, options)
    return replace(data, text=f"{data.text}; {options.val_share:g} by seed {options.split_seed}")


def _files(path: Path) -> list[Path]:
    try:
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: allow reading it") from error
    if not found:
        raise InputError(
            f"{path} has no photograph: add some that end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return found


def _loaded(
    name: str,
    train_files: Sequence[Path],
    val_files: Sequence[Path],
    patches: PatchOptions,
    options: DataOptions,
) -> TaskData:
    preprocessing = options.preprocessing_or(USUAL)
    size = preprocessing.size
    if size < _SMALLEST:
        raise InputError(
            f"an image size of {size} pixels was given; patches have at least {_SMALLEST}"
        )
    (train, train_bad), (val, val_bad) = (
        _pairs(name, files, patches.scale, size) for files in (train_files, val_files)
    )
    places = training_places(train, size, patches.train), grid_places(val, size, patches.val)
    return TaskData(
        Patches(train, places[0], train_bad, patches.scale, preprocessing, options.augment),
        Patches(val, places[1], val_bad, patches.scale, preprocessing, augment=False),
        CLASSES,
        preprocessing,
        f"{name}: {len(places[0])} patches of {len(train)} photographs for training, "
        f"{len(places[1])} of {len(val)} for validation; {size} x {size} pixels by Pillow's "
        f"bicubic filter, x{patches.scale}",
    )


def _pairs(
    name: str, files: Sequence[Path], scale: int, size: int
) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    """Those that can be used, and why the others cannot."""

    def read(path: Path) -> Pair | str:
        try:
            pixels = np.array(read_rgb(path))
        except InputError as error:
            return str(error)
        except MemoryError:
            return (
                f"the photographs up to {path} do not fit into memory: give fewer or smaller ones"
            )
        try:
            return pair_of(pixels, scale, size)
        except InputError as error:
            return f"the photograph {path} cannot be used: {error}"

    # Decoding leaves Python's lock; the order is that of the files.
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(read, files))
    pairs = tuple(pair for pair in found if isinstance(pair, Pair))
    refused = tuple(reason for reason in found if isinstance(reason, str))
    if not pairs:
        raise InputError(f"{name}: none of {len(files)} photographs can be used. {refused[0]}")
    return pairs, refused
