"""Objects in Pascal VOC's form: an XML file an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from disco.errors import InputError
from disco.tasks.annotated import Annotated, Annotation, annotated_data
from disco.tasks.data import DataOptions, TaskData

_Object = tuple[str, tuple[float, float, float, float], bool]


def load_voc(path: Path, options: DataOptions) -> TaskData:
    """Images and objects of a folder such as VOCdevkit/VOC2012.

    Classes are those of the objects of both parts, in order of name. Difficult objects are not
    learnt, and what is found there does not count. Parts of objects (hands, heads) are not
    objects. An image whose XML cannot be used is left out when it is its turn.

    Args:
        path: holds `Annotations/ID.xml`, `JPEGImages/` and `ImageSets/Main/train.txt` and
            `val.txt`, a line an ID.
        options: see `annotated_data`.

    Raises:
        InputError: a list that is not there or empty, or no objects.
    """
    raw = {part: [_read(path, name) for name in _names(path, part)] for part in ("train", "val")}
    classes = sorted({name for part in raw.values() for _, found in part for name, _, _ in found})
    numbers = {name: label for label, name in enumerate(classes)}
    parts = {
        part: [image._replace(objects=_labelled(found, numbers)) for image, found in images]
        for part, images in raw.items()
    }
    return annotated_data(parts, classes, path, options)


def _labelled(found: list[_Object], numbers: Mapping[str, int]) -> list[Annotation]:
    return [Annotation(box, numbers[name], difficult) for name, box, difficult in found]


def _names(path: Path, part: str) -> list[str]:
    file = path / "ImageSets" / "Main" / f"{part}.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"the list {file} cannot be read ({error}): give a folder such as VOCdevkit/VOC2012, "
            "with the numbers of images in it"
        ) from error
    names = [line.split()[0] for line in lines if line.split()]
    if not names:
        raise InputError(f"the list {file} is empty: write the name of an image on each line")
    return names


def _read(path: Path, name: str) -> tuple[Annotated, list[_Object]]:
    """An image and its objects, or an image with a problem."""
    file = path / "Annotations" / f"{name}.xml"
    image = path / "JPEGImages" / f"{name}.jpg"
    try:
        root = ElementTree.parse(file).getroot()
        given = PurePosixPath(root.findtext("filename", "")).name
        if given:
            image = image.parent / given
        size = (_number(root, "size/width"), _number(root, "size/height"))
        if min(size) < 1:
            raise ValueError(f"a size of {size[0]:g} x {size[1]:g}")
        objects = [_object(element) for element in root.findall("object")]
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        problem = f"the annotation {file} cannot be used ({error}): repair it"
        return Annotated(image, (1, 1), (), problem), []
    return Annotated(image, (int(size[0]), int(size[1])), ()), objects


def _object(element: ElementTree.Element) -> _Object:
    name = element.findtext("name", "").strip()
    if not name:
        raise ValueError("an object without a name")
    # Pixels are counted from 1 there, and the last ones belong to the box.
    first = [_number(element, f"bndbox/{edge}") - 1 for edge in ("xmin", "ymin")]
    last = [_number(element, f"bndbox/{edge}") for edge in ("xmax", "ymax")]
    difficult = element.findtext("difficult", "0").strip() not in ("", "0")
    return name, (first[0], first[1], last[0], last[1]), difficult


def _number(element: ElementTree.Element, place: str) -> float:
    text = element.findtext(place)
    if text is None:
        raise ValueError(f"no {place}")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{place} is {text}")
    return value
