"""Where images and their masks lie: PASCAL VOC's folders, and pairs of folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from disco.errors import InputError
from disco.images import IMAGE_SUFFIXES, Preprocessing, find_images
from disco.tasks.data import DataOptions, TaskData, mixed
from disco.tasks.masks import MaskedFiles

VOC_CLASSES = (
    "background",
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
CLASSES_FILE = "classes.txt"
# The whole shorter side, since a segmenter looks at borders, too.
_USUAL = Preprocessing(size=224, resize=224)


def load_voc(path: Path, options: DataOptions) -> TaskData:
    """PASCAL VOC's images with masks (Everingham et al., IJCV 2010).

    Args:
        path: a folder like VOCdevkit/VOC2012: `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png`,
            and the names, one a line, in `ImageSets/Segmentation/train.txt` and `val.txt`.
        options: augmentation cuts out a part and mirrors it.

    Raises:
        InputError: no such folder or list. Files are opened when they are needed.
    """
    preprocessing = options.preprocessing_or(_USUAL)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        if not (path / folder).is_dir():
            raise InputError(
                f"{path} has no folder {folder}: give one like VOCdevkit/VOC2012, with "
                "JPEGImages, SegmentationClass and ImageSets/Segmentation"
            )

    def part(name: str, augment: bool) -> MaskedFiles:
        names = _names(path / "ImageSets" / "Segmentation" / f"{name}.txt")
        return MaskedFiles(
            tuple(path / "JPEGImages" / f"{name}.jpg" for name in names),
            tuple(path / "SegmentationClass" / f"{name}.png" for name in names),
            len(VOC_CLASSES),
            preprocessing,
            augment,
        )

    train, val = part("train", options.augment), part("val", augment=False)
    text = f"{path}: {len(train)} for training, {len(val)} for validation"
    return TaskData(train, val, VOC_CLASSES, preprocessing, text)


def load_mask_folders(path: Path, options: DataOptions) -> TaskData:
    """Images and masks in two folders, below `path` or below its `train` and `val`.

    Args:
        path: holds `classes.txt`, a name a line, whose first is the class 0, and `images/NAME.jpg`
            (or another format) with `masks/NAME.png`, which are divided then; or `train/` and
            `val/`, each with `images/` and `masks/`.
        options: augmentation cuts out a part and mirrors it.

    Raises:
        InputError: no such folder or file, fewer than two classes or images, an image without a
            mask.
    """
    if not path.is_dir():
        raise InputError(f"there is no folder {path}: give one with images/ and masks/")
    preprocessing = options.preprocessing_or(_USUAL)
    classes = tuple(_names(path / CLASSES_FILE))
    if not 2 <= len(classes) <= 255 or len(set(classes)) < len(classes):
        raise InputError(
            f"{path / CLASSES_FILE} has {len(classes)} names; 2 to 255 different ones are allowed, "
            "one a line"
        )

    def files(pairs: Sequence[tuple[Path, Path]], augment: bool) -> MaskedFiles:
        images, masks = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        return MaskedFiles(images, masks, len(classes), preprocessing, augment)

    if (path / "train").is_dir() or (path / "val").is_dir():
        parts = _pairs(path / "train"), _pairs(path / "val")
        divided = ""
    else:
        parts = _divided(_pairs(path), path, options)
        divided = f"; {options.val_share:g} of them by seed {options.split_seed}"
    text = f"{path}: {len(parts[0])} for training, {len(parts[1])} for validation{divided}"
    train, val = files(parts[0], options.augment), files(parts[1], augment=False)
    return TaskData(train, val, classes, preprocessing, f"{text}, {len(classes)} classes")


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"there is no file {path}: write one, with a name a line")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}): give a name a line") from error
    found = [name for name in names if name]
    if not found:
        raise InputError(f"{path} names nothing: give a name a line")
    return found


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    for folder in ("images", "masks"):
        if not (path / folder).is_dir():
            raise InputError(f"{path} has no folder {folder}: images/ and masks/ are needed")
    masks = {mask.stem: mask for mask in find_images(path / "masks")}
    images = find_images(path / "images")
    lone = [image for image in images if image.stem not in masks]
    if lone:
        raise InputError(
            f"{len(lone)} images have no mask, {lone[0]} for one: add {path / 'masks'}/"
            f"{lone[0].stem}.png or another of {', '.join(IMAGE_SUFFIXES)}"
        )
    return [(image, masks[image.stem]) for image in images]


def _divided(
    pairs: Sequence[tuple[Path, Path]], path: Path, options: DataOptions
) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    if not 0 < options.val_share < 1 or len(pairs) < 2:
        raise InputError(
            f"the {len(pairs)} images of {path} cannot be divided with a validation share of "
            f"{options.val_share!r}: two images and a share between 0 and 1 are needed"
        )
    generator = torch.Generator().manual_seed(mixed(options.split_seed, 4) >> 1)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    count = min(max(1, round(options.val_share * len(pairs))), len(pairs) - 1)
    return [pairs[i] for i in sorted(order[count:])], [pairs[i] for i in sorted(order[:count])]
