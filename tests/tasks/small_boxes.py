"""Small annotated images in COCO's and Pascal VOC's forms, and random objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tasks.small_data import write_image

# Three images a part: of two objects (one a crowd, or difficult), of one, and of none.
SIZES = ((40, 30), (21, 55), (13, 9))
BOXES = {0: [(2.0, 3.0, 20.0, 12.0), (10.0, 5.0, 40.0, 30.0)], 1: [(0.0, 10.5, 21.0, 55.0)], 2: []}


def coco_content(part: str) -> dict[str, Any]:
    """What a part's JSON file says: categories 7 (dog) and 3 (cat), and a crowd."""
    annotations = [
        {
            "id": 10 * image + number,
            "image_id": 100 + image,
            "category_id": 7 if number == 0 else 3,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "iscrowd": int(number == 1),
        }
        for image, boxes in BOXES.items()
        for number, box in enumerate(boxes)
    ]
    images = [
        {"id": 100 + image, "file_name": f"{part}{image}.png", "width": size[0], "height": size[1]}
        for image, size in enumerate(SIZES)
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, **content: Any) -> Path:
    """Both parts; `train` or `val` in place of the usual content."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        said = content.get(part, coco_content(part))
        text = said if isinstance(said, str) else json.dumps(said)
        (root / "annotations" / f"instances_{part}2017.json").write_text(text)
        for image, size in enumerate(SIZES):
            write_image(root / f"{part}2017" / f"{part}{image}.png", "RGB", size)
    return root


def voc_xml(image: int) -> str:
    """An image's XML: the first object is a dog, the second a difficult cat."""
    width, height = SIZES[image]
    objects = "".join(
        f"<object><name>{'cat' if number else 'dog'}</name><difficult>{number}</difficult>"
        f"<bndbox><xmin>{box[0] + 1:g}</xmin><ymin>{box[1] + 1:g}</ymin>"
        f"<xmax>{box[2]:g}</xmax><ymax>{box[3]:g}</ymax></bndbox>"
        "<part><name>head</name></part></object>"
        for number, box in enumerate(BOXES[image])
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation><filename>{image}.jpg</filename>{size}{objects}</annotation>"


def write_voc(root: Path) -> Path:
    """The three images, all in both parts."""
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("0\n1\n\n2\n")
    for image, size in enumerate(SIZES):
        (root / "Annotations" / f"{image}.xml").write_text(voc_xml(image))
        write_image(root / "JPEGImages" / f"{image}.jpg", "RGB", size)
    return root


def random_boxes(count: int, generator: torch.Generator, size: float = 48.0) -> Tensor:
    """Boxes inside an image, float32 [count, 4]."""
    corner = torch.rand(count, 2, generator=generator) * size * 0.6
    sides = 3 + torch.rand(count, 2, generator=generator) * (size * 0.4 - 3)
    return torch.cat((corner, corner + sides), 1)


def target(boxes: Tensor, labels: list[int], ignored: list[int] | None = None) -> dict[str, Tensor]:
    """A target; `ignored` are numbers of objects."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[ignored or []] = True
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "ignored": mask}
