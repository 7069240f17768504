"""Images with boxes around their objects, scaled to square inputs, mirrored in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from disco.errors import InputError
from disco.images import Preprocessing, normalised, read_rgb
from disco.tasks.data import DataOptions, Example, Examples, TaskData
from disco.tasks.scenes import Scenes

# SSD's sizes are 300 and 512; this one every model takes whose grids are multiples of 8.
USUAL = Preprocessing(320, 320)


class Annotation(NamedTuple):
    """An object: its corners x1, y1, x2, y2 in pixels of the file, its class, and if it is one that
    is not learnt and whose detections do not count (a crowd, a difficult one)."""

    box: tuple[float, float, float, float]
    label: int
    ignored: bool


class Annotated(NamedTuple):
    """An image file, its width and height as annotated, its objects; or why it cannot be used."""

    path: Path
    size: tuple[int, int]
    objects: Sequence[Annotation]
    problem: str = ""


@dataclass(frozen=True)
class Boxes:
    """The objects of many images.

    Attributes:
        boxes: float32 [objects, 4], x1, y1, x2, y2 in pixels.
        labels: int64 [objects].
        ignored: bool [objects].
        ends: for each image where its objects begin, and one more, [images + 1].
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    ends: Tensor

    def of(self, index: int) -> dict[str, Tensor]:
        """An image's objects, the target of an example."""
        part = slice(int(self.ends[index]), int(self.ends[index + 1]))
        return {
            "boxes": self.boxes[part],
            "labels": self.labels[part],
            "ignored": self.ignored[part],
        }

    @property
    def counted(self) -> int:
        """Objects that are learnt and measured."""
        return int((~self.ignored).sum())


def boxes_of(images: Sequence[Sequence[Annotation]]) -> Boxes:
    """The objects of images as tensors."""
    flat = [found for objects in images for found in objects]
    return Boxes(
        torch.tensor([f.box for f in flat], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([f.label for f in flat], dtype=torch.int64),
        torch.tensor([f.ignored for f in flat], dtype=torch.bool),
        torch.tensor([0, *(len(objects) for objects in images)]).cumsum(0),
    )


def within(annotated: Annotated) -> tuple[Annotated, int]:
    """With boxes cut to the image, and without those that have no area then; how many these are."""
    width, height = annotated.size
    kept = []
    for found in annotated.objects:
        x1, y1, x2, y2 = found.box
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        # Not a number is no area.
        if box[2] - box[0] > 0 and box[3] - box[1] > 0:
            kept.append(found._replace(box=box))
    return annotated._replace(objects=kept), len(annotated.objects) - len(kept)


@dataclass(frozen=True)
class AnnotatedFiles:
    """Image files with objects; files are opened when they are needed."""

    files: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    objects: Boxes
    problems: Mapping[int, str]
    preprocessing: Preprocessing
    augment: bool

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, seed: int | None) -> Example:
        """Float32 [3, size, size], all of the image scaled to a square, and its objects in it.

        Raises:
            InputError: an image or annotation that cannot be read, or an image of another size
                than was annotated.
        """
        if index in self.problems:
            raise InputError(self.problems[index])
        path, (width, height) = self.files[index], self.sizes[index]
        image = read_rgb(path)
        if image.size != (width, height):
            raise InputError(
                f"the image {path} has {image.width} x {image.height} pixels, and its boxes are of "
                f"{width} x {height}: give the image that was annotated"
            )
        size = self.preprocessing.size
        scaled = image.resize((size, size), Image.Resampling.BILINEAR)
        inputs = normalised(torch.from_numpy(np.array(scaled)), self.preprocessing)[0]
        target = self.objects.of(index)
        scale = torch.tensor([size / width, size / height] * 2)
        target["boxes"] = target["boxes"] * scale
        return mirrored(inputs, target, size, seed if self.augment else None)


@dataclass(frozen=True)
class SceneBoxes:
    """Generated scenes: `pixels` uint8 [n, size, size, 3], and their objects."""

    pixels: Tensor
    objects: Boxes
    preprocessing: Preprocessing
    augment: bool

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int, seed: int | None) -> Example:
        """Float32 [3, size, size], and the scene's objects."""
        inputs = normalised(self.pixels[index], self.preprocessing)[0]
        target = self.objects.of(index)
        return mirrored(inputs, target, len(inputs[0]), seed if self.augment else None)


def scene_boxes(made: Scenes, preprocessing: Preprocessing, augment: bool) -> SceneBoxes:
    """Scenes as examples; classes are those of the scenes without the background."""
    objects = [
        [Annotation(tuple(box), label - 1, False) for box, label in zip(b, n, strict=True)]
        for b, n in zip((b.tolist() for b in made.boxes), made.labels, strict=True)
    ]
    return SceneBoxes(torch.from_numpy(made.images), boxes_of(objects), preprocessing, augment)


def mirrored(
    inputs: Tensor, target: dict[str, Tensor], size: int, seed: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Image and boxes, left and right exchanged for half of the seeds; None changes nothing."""
    # Seeds are drawn evenly (`disco.tasks.data.mixed`), so a bit is a fair coin.
    if seed is None or seed & 1:
        return inputs, target
    boxes = target["boxes"]
    turned = torch.stack((size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]), 1)
    return inputs.flip(2), {**target, "boxes": turned}


def annotated_data(
    parts: Mapping[str, Sequence[Annotated]],
    classes: Sequence[str],
    path: Path,
    options: DataOptions,
) -> TaskData:
    """The data of a training and a validation part.

    Args:
        parts: "train" and "val".
        classes: their names.
        path: of the data, for messages.
        options: augmentation mirrors training images.

    Raises:
        InputError: a part without images, or without an object.
    """
    preprocessing = options.preprocessing_or(USUAL)
    made: dict[str, Examples] = {}
    words, dropped = [], 0
    for part, images in parts.items():
        found = [within(image) for image in images]
        dropped += sum(count for _, count in found)
        objects = boxes_of([image.objects for image, _ in found])
        if not objects.counted:
            raise InputError(
                f"the {part} part of {path} has {len(images)} images and no object with a box in "
                "them: give annotated images"
            )
        made[part] = AnnotatedFiles(
            tuple(image.path for image in images),
            tuple(image.size for image in images),
            objects,
            {number: image.problem for number, image in enumerate(images) if image.problem},
            preprocessing,
            options.augment and part == "train",
        )
        words.append(f"{len(images)} images with {objects.counted} objects")
    text = f"{path}: {words[0]} for training, {words[1]} for validation, {len(classes)} classes"
    if dropped:
        text += f"; {dropped} boxes without area left out"
    return TaskData(made["train"], made["val"], tuple(classes), preprocessing, text)
