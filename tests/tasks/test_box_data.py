"""Objects out of COCO's and VOC's files, scaled and mirrored with their images; what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from disco.errors import InputError
from disco.images import normalised, read_rgb
from disco.tasks import DataOptions, Detection, TaskData
from tests.tasks.small_boxes import BOXES, SIZES, coco_content, voc_xml, write_coco, write_voc
from tests.tasks.small_data import write_image

WRITE = {"coco": write_coco, "voc": write_voc}
SIZE = 16


def load(kind: str, path: Path, **options: Any) -> TaskData:
    return Detection().load_data(f"{kind}:{path}", DataOptions(image_size=SIZE, **options))


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_both_forms_say_the_same(tmp_path: Path, kind: str) -> None:
    data = load(kind, WRITE[kind](tmp_path))
    assert data.classes == ("cat", "dog")
    assert "3 images with 2 objects for training, 3 images with 2 objects" in data.text
    assert (data.preprocessing.size, data.preprocessing.resize) == (SIZE, SIZE)
    for part in (data.train, data.val):
        assert len(part) == 3
        for index, (width, height) in enumerate(SIZES):
            image, target = part.load(index, None)
            assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32
            scale = torch.tensor([SIZE / width, SIZE / height] * 2)
            expected = torch.tensor(BOXES[index]).reshape(-1, 4) * scale
            assert torch.equal(target["boxes"], expected)
            assert target["labels"].tolist() == [1, 0][: len(expected)]
            assert target["ignored"].tolist() == [False, True][: len(expected)]


def test_an_image_is_scaled_as_a_whole_and_mirrored_with_its_boxes(tmp_path: Path) -> None:
    data = load("coco", write_coco(tmp_path))
    plain, target = data.train.load(0, None)
    whole = read_rgb(tmp_path / "train2017" / "train0.png").resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR
    )
    assert torch.equal(plain, normalised(torch.from_numpy(np.array(whole)), data.preprocessing)[0])
    seen = set()
    for seed in range(20):
        image, moved = data.train.load(0, seed)
        assert torch.equal(moved["labels"], target["labels"])
        x1, y1, x2, y2 = target["boxes"].T
        turned = torch.stack((SIZE - x2, y1, SIZE - x1, y2), 1)
        mirrored = not torch.equal(image, plain)
        assert torch.equal(image, plain.flip(2) if mirrored else plain)
        assert torch.equal(moved["boxes"], turned if mirrored else target["boxes"])
        seen.add(mirrored)
    assert seen == {False, True}
    still = load("coco", tmp_path, augment=False)
    assert all(torch.equal(still.train.load(0, seed)[0], plain) for seed in range(4))
    assert torch.equal(data.val.load(0, 2)[0], data.val.load(0, None)[0])


def test_scenes_are_data_too() -> None:
    data = Detection().load_data("scenes:train=12,val=6", DataOptions(image_size=32))
    assert (len(data.train), len(data.val)) == (12, 6) and len(data.classes) == 6
    for index in range(12):
        image, target = data.train.load(index, None)
        assert image.shape == (3, 32, 32)
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert not target["ignored"].any()
        assert bool((target["labels"] >= 0).all()) and bool((target["labels"] < 6).all())
        x1, y1, x2, y2 = target["boxes"].T
        assert bool((x1 >= 0).all() and (x1 < x2).all() and (y1 < y2).all() and (y2 <= 32).all())
        turned = data.train.load(index, 2)[1]["boxes"]
        assert torch.equal(turned, torch.stack((32 - x2, y1, 32 - x1, y2), 1))


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "L"), ("b.jpg", "CMYK"), ("c.png", "RGBA"), ("d.webp", "RGB")]
)
def test_modes_and_formats(tmp_path: Path, name: str, mode: str) -> None:
    content = coco_content("train")
    content["images"][1]["file_name"] = f"below/{name}"
    write_coco(tmp_path, train=content)
    path = write_image(tmp_path / "train2017" / "below" / name, mode, SIZES[1])
    image, target = load("coco", tmp_path).train.load(1, None)
    assert image.shape == (3, SIZE, SIZE) and image.isfinite().all()
    assert path.is_file() and len(target["boxes"]) == 1


def test_boxes_are_cut_to_the_image_and_those_without_area_counted(tmp_path: Path) -> None:
    content = coco_content("train")
    nan = float("nan")
    for number, box in enumerate(
        ([-5, -5, 10, 60], [40, 3, 5, 5], [3, 3, 0, 5], [3, 3, 5, -1], [nan, 0, 3, 3])
    ):
        content["annotations"].append(
            {"id": 90 + number, "image_id": 102, "category_id": 3, "bbox": box}
        )
    data = load("coco", write_coco(tmp_path, train=content))
    assert "4 boxes without area left out" in data.text
    width, height = SIZES[2]
    boxes = data.train.load(2, None)[1]["boxes"]
    assert torch.equal(boxes, torch.tensor([[0, 0, 5 * SIZE / width, SIZE / height * height]]))


def test_other_names_of_files(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for part in ("train", "val"):
        annotations = tmp_path / "annotations"
        (annotations / f"instances_{part}2017.json").rename(annotations / f"instances_{part}s.json")
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"{part}2017").rename(tmp_path / "images" / f"{part}s")
    assert len(load("coco", tmp_path).train) == 3
    (tmp_path / "annotations" / "instances_train2.json").write_text("{}")
    with pytest.raises(InputError, match=r"has 2 files instances_train\*.json, and one is needed"):
        load("coco", tmp_path)


def _without(**changed: Any) -> dict[str, Any]:
    return {**coco_content("train"), **changed}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "no JSON"),
        ("[]", "not in COCO's form at its beginning"),
        (_without(categories=[{"id": 1}]), "form at its beginning .*'name' is not there"),
        (_without(categories=[]), "at the annotation 0 .*7 is not there"),
        (_without(categories=[{"id": i, "name": "a"} for i in (3, 7)]), "two of the same name"),
        (_without(images=[]), "at the annotation 0 .*100 is not there"),
        (_without(images=[], annotations=[]), "have no images"),
        (_without(images=coco_content("x")["images"] * 2), "image 100 .*occurs twice"),
        (
            _without(images=[{"id": 1, "file_name": "a", "width": 0, "height": 1}]),
            "image 1 .*a size of 0 x 1",
        ),
        (
            _without(annotations=[{"id": 5, "image_id": 100, "category_id": 3, "bbox": [1, 2]}]),
            "annotation 5 .*not enough values",
        ),
        (_without(annotations=[]), "train part .* no object with a box"),
        (_without(categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "cow"}]), "'cow', 'dog'"),
    ],
)
def test_coco_files_that_are_refused(tmp_path: Path, said: Any, message: str) -> None:
    write_coco(tmp_path, train=said)
    with pytest.raises(InputError, match=message):
        load("coco", tmp_path)


def test_what_else_is_refused(tmp_path: Path) -> None:
    for data in ("", "digits", "coco", "voc:", "folder:x", "scenes:many"):
        with pytest.raises(InputError, match="give scenes"):
            Detection().load_data(data, DataOptions())
    for kind in ("coco", "voc"):
        with pytest.raises(InputError, match="give .*folder"):
            load(kind, tmp_path / "absent")
    write_coco(tmp_path)
    shutil.rmtree(tmp_path / "val2017")
    with pytest.raises(InputError, match=r"put them into .*val2017"):
        load("coco", tmp_path)
    write_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"val.txt is empty"):
        load("voc", tmp_path)


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_images_that_cannot_be_used_are_found_in_their_turn(tmp_path: Path, kind: str) -> None:
    WRITE[kind](tmp_path)
    folder, ending = ("train2017/train", "png") if kind == "coco" else ("JPEGImages/", "jpg")
    damaged, absent, other = (tmp_path / f"{folder}{number}.{ending}" for number in range(3))
    damaged.write_bytes(damaged.read_bytes()[:70])
    absent.unlink()
    write_image(other, "RGB", (9, 13))
    data = load(kind, tmp_path)
    for index, message in enumerate(("cannot be read|not an image", "there is no file", "9 x 13")):
        with pytest.raises(InputError, match=message):
            data.train.load(index, None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda xml: xml[:-30], "cannot be used .*no element found|mismatched|unclosed"),
        (lambda xml: xml.replace("<xmin>", "<xmid>").replace("</xmin>", "</xmid>"), "no bndbox/xm"),
        (lambda xml: xml.replace("<xmin>3", "<xmin>inf"), "xmin is inf"),
        (lambda xml: xml.replace("<xmin>3", "<xmin>x"), "could not convert"),
        (lambda xml: xml.replace("<width>40", "<width>0"), "a size of 0 x 30"),
        (lambda xml: xml.replace("<size>", "<sizes>").replace("</size>", "</sizes>"), "no size/w"),
        (lambda xml: xml.replace("<name>dog</name>", ""), "an object without a name"),
    ],
)
def test_voc_files_that_are_left_out(
    tmp_path: Path, spoil: Callable[[str], str], message: str
) -> None:
    write_voc(tmp_path)
    file = tmp_path / "Annotations" / "0.xml"
    file.write_text(spoil(voc_xml(0)))
    data = load("voc", tmp_path)
    assert "3 images with 1 objects" in data.text
    with pytest.raises(InputError, match=rf"annotation .*0\.xml .*{message}|{message}"):
        data.train.load(0, None)
    assert len(data.train.load(1, None)[1]["boxes"]) == 1
    file.unlink()
    with pytest.raises(InputError, match=r"0\.xml cannot be used"):
        load("voc", tmp_path).train.load(0, None)
