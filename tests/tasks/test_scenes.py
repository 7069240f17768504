"""Generated scenes: what their labels say is what was drawn."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from disco.errors import InputError
from disco.tasks import photographs
from disco.tasks.data import DataOptions
from disco.tasks.photographs import photograph_files, read_photographs
from disco.tasks.scene_data import load_scenes
from disco.tasks.scene_shapes import SHAPES, distance
from disco.tasks.scenes import CLASSES, scenes


def _photographs(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (70 + k, 91, 3), dtype=np.uint8) for k in range(count)]


def test_photographs_are_read_without_their_packages() -> None:
    loaded = {"skimage", "sklearn"} & set(sys.modules)
    training, testing = photograph_files(True), photograph_files(False)
    assert not set(training) & set(testing)
    assert (len(training), len(testing)) == (10, 7)
    for pixels in read_photographs(False):
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert min(pixels.shape[:2]) >= 300
    assert {"skimage", "sklearn"} & set(sys.modules) == loaded


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "TESTING", (("skimage", "data/none.png"),))
    with pytest.raises(InputError, match="none.png: `pip install --force-reinstall scikit-image`"):
        photograph_files(False)
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="`pip install matplotlib scikit-image scikit-learn`"):
        photograph_files(False)


def test_scenes_are_a_function_of_the_seed() -> None:
    given = _photographs()
    made, fewer = scenes(70, 32, 5, given), scenes(33, 32, 5, given)
    assert np.array_equal(made.images[:33], fewer.images)
    assert np.array_equal(made.masks[:33], fewer.masks)
    assert len(fewer.boxes) == len(fewer.labels) == 33
    for a, b in zip(made.boxes, fewer.boxes, strict=False):
        assert np.array_equal(a, b)
    assert not np.array_equal(made.images, scenes(70, 32, 6, given).images)
    assert scenes(0, 32, 5, given).images.shape == (0, 32, 32, 3)


@pytest.mark.parametrize("size", [17, 48])
def test_labels_agree_with_each_other(size: int) -> None:
    made = scenes(200, size, 1, _photographs())
    assert made.images.shape == (200, size, size, 3)
    assert made.images.dtype == made.masks.dtype == np.uint8
    assert set(np.unique(made.masks)) == set(range(len(CLASSES)))
    shapes = 0
    for mask, boxes, labels in zip(made.masks, made.boxes, made.labels, strict=True):
        assert boxes.dtype == np.float32
        assert boxes.shape == (len(labels), 4)
        assert set(labels) == set(np.unique(mask)) - {0}
        inside = np.zeros_like(mask, dtype=bool)
        for (left, top, right, bottom), label in zip(boxes.astype(int), labels, strict=True):
            part = mask[top:bottom, left:right] == label
            # Other shapes may hide nothing of the rim: a box is that of what is seen.
            assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
            inside[top:bottom, left:right] = True
        assert not mask[~inside].any()
        shapes += len(labels)
    assert shapes > 400


def test_what_is_labelled_is_drawn() -> None:
    # On one grey photograph, most shapes' pixels differ from those of the background.
    grey = [np.full((48, 48, 3), 128, dtype=np.uint8)]
    made = scenes(200, 48, 3, grey)
    labelled = found = missed = 0
    for image, mask in zip(made.images.astype(float), made.masks, strict=True):
        rest = image[mask == 0]
        usual = np.median(rest, 0)
        spread = np.abs(rest - usual).mean() + 1
        differs = np.abs(image - usual).mean(-1) > 2 * spread
        labelled += (mask > 0).sum()
        found += (differs & (mask > 0)).sum()
        missed += (differs & (mask == 0)).sum()
    assert found > 0.5 * labelled
    assert missed < 0.1 * labelled


def test_shapes_have_the_areas_of_geometry() -> None:
    y, x = np.mgrid[-1:1:800j, -1:1:800j].astype(np.float32)
    one, detail = np.float32(0.9), np.float32(0.5)
    pixels = {shape: (distance(shape, x, y, one, detail) <= 0).mean() * 4 for shape in SHAPES}
    r, bar = 0.9, 0.275 * 0.9
    star = 10 * 0.5 * r * 0.45 * r * np.sin(np.pi / 5)
    expected = {
        "disc": np.pi * r**2,
        "rectangle": 4 * 0.85 * r * 0.675 * r,
        "triangle": 0.75 * np.sqrt(3) * r**2,
        "cross": 8 * bar * r - 4 * bar**2,
        "ring": np.pi * (r**2 - (0.6 * r) ** 2),
        "star": star,
    }
    assert pixels == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(InputError, match="16 or more"):
        scenes(1, 15, 0, _photographs())
    with pytest.raises(InputError, match="smaller scenes"):
        scenes(1, 71, 0, _photographs())
    with pytest.raises(InputError, match="smaller scenes"):
        scenes(1, 48, 0, [])


def test_scenes_as_data() -> None:
    data = load_scenes("val=5,train=7", DataOptions(image_size=20, split_seed=3))
    assert data.train.images.shape == (7, 20, 20, 3)
    assert data.val.masks.shape == (5, 20, 20)
    assert data.preprocessing.size == data.preprocessing.resize == 20
    assert "7 for training, 5 for validation" in data.text
    other = load_scenes("val=5,train=7", DataOptions(image_size=20, split_seed=4))
    assert not np.array_equal(data.val.images, other.val.images)
    assert not np.array_equal(data.train.images[:5], data.val.images)


@pytest.mark.parametrize("place", ["2000", "train=0", "train=-1", "test=5", "train=5,", "train=x"])
def test_other_scenes_are_refused(place: str) -> None:
    with pytest.raises(InputError, match="for example scenes:train=2000,val=5000"):
        load_scenes(place, DataOptions())
