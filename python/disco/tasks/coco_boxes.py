"""Objects in COCO's form: a JSON file a part, and a folder of its images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disco.errors import InputError
from disco.tasks.annotated import Annotated, Annotation, annotated_data
from disco.tasks.data import DataOptions, TaskData


def load_coco(path: Path, options: DataOptions) -> TaskData:
    """Images and objects of ``annotations/instances_train*.json`` and ``instances_val*.json``.

    Categories become classes in order of their numbers. Crowds are not learnt, and what is found in
    them does not count, as COCO evaluates. Images without objects are kept.

    Args:
        path: holds `annotations/`, and the images in `train2017/` or `images/train2017/`, as the
            file is called after ``instances_``; likewise for validation.
        options: see `annotated_data`.

    Raises:
        InputError: files that are not there, damaged, or say things that do not fit together.
    """
    parts, names = {}, {}
    for part in ("train", "val"):
        file = _annotation_file(path, part)
        names[part], parts[part] = _read(file, _image_folder(path, file))
    if names["train"] != names["val"]:
        odd = sorted(set(names["train"]) ^ set(names["val"]))
        raise InputError(
            f"the training and validation parts of {path} have different categories: "
            f"{', '.join(map(repr, odd[:5]))} ({len(odd)} in all) are in one of them only, or "
            "their numbers differ: give both parts the same"
        )
    return annotated_data(parts, names["train"], path, options)


def _annotation_file(path: Path, part: str) -> Path:
    folder = path / "annotations"
    usual = folder / f"instances_{part}2017.json"
    if usual.is_file():
        return usual
    found = sorted(folder.glob(f"instances_{part}*.json"))
    if len(found) != 1:
        raise InputError(
            f"{folder} has {len(found)} files instances_{part}*.json, and one is needed, for "
            f"example {usual.name}: give the folder that holds annotations/ and the images"
        )
    return found[0]


def _image_folder(path: Path, file: Path) -> Path:
    name = file.stem.removeprefix("instances_")
    places = (path / name, path / "images" / name)
    for place in places:
        if place.is_dir():
            return place
    raise InputError(f"the images of {file} are not there: put them into {places[0]}")


def _read(file: Path, folder: Path) -> tuple[list[str], list[Annotated]]:
    """The names of the categories and the images with their objects."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"the annotations {file} cannot be read or are no JSON ({error}): copy them again"
        ) from error
    where = "its beginning"
    try:
        names = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        numbers = {number: label for label, number in enumerate(sorted(names))}
        images: dict[int, Annotated] = {}
        for image in content["images"]:
            where = f"the image {image['id']!r}"
            if int(image["id"]) in images:
                raise ValueError("its number occurs twice")
            images[int(image["id"])] = _image(image, folder)
        objects: dict[int, list[Annotation]] = {number: [] for number in images}
        for found in content["annotations"]:
            where = f"the annotation {found.get('id')!r}"
            objects[int(found["image_id"])].append(_annotation(found, numbers))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        reason = f"{error} is not there" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"the annotations {file} are not in COCO's form at {where} ({reason}): repair them"
        ) from error
    if not names or len(set(names.values())) != len(names):
        raise InputError(f"the annotations {file} have no categories, or two of the same name")
    if not images:
        raise InputError(f"the annotations {file} have no images: give others")
    found_images = [images[number]._replace(objects=objects[number]) for number in images]
    return [names[number] for number in numbers], found_images


def _image(plain: Mapping[str, Any], folder: Path) -> Annotated:
    width, height = int(plain["width"]), int(plain["height"])
    if width < 1 or height < 1:
        raise ValueError(f"a size of {width} x {height}")
    return Annotated(folder / str(plain["file_name"]), (width, height), ())


def _annotation(plain: Mapping[str, Any], numbers: Mapping[int, int]) -> Annotation:
    x, y, width, height = (float(value) for value in plain["bbox"])
    label = numbers[int(plain["category_id"])]
    return Annotation((x, y, x + width, y + height), label, bool(plain.get("iscrowd", 0)))
