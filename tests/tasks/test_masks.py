"""Files of images and masks: folders, odd files, what is refused by name, one augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from disco.errors import InputError
from disco.images import load_image
from disco.tasks import DataOptions, Segmentation, TaskData
from disco.tasks.mask_folders import VOC_CLASSES
from disco.tasks.masks import IGNORED
from tests.tasks.small_data import write_image

SMALL = DataOptions(image_size=16)


def write_mask(path: Path, labels: np.ndarray, mode: str = "P") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if mode == "P":
        image.putpalette([v for k in range(256) for v in (k, 255 - k, (37 * k) % 256)])
    image.save(path)
    return path


def write_pair(root: Path, name: str, size: tuple[int, int], seed: int = 0) -> None:
    """An image whose red is 10 times the class, and its mask; blocks of 4 pixels."""
    width, height = size
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (-(-height // 4), -(-width // 4)))
    labels = labels.repeat(4, 0).repeat(4, 1)[:height, :width]
    write_mask(root / "masks" / f"{name}.png", labels)
    pixels = np.stack([labels * 80, labels * 0, labels * 0], -1).astype(np.uint8)
    (root / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / "images" / f"{name}.png")


def write_voc(root: Path, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for number, name in enumerate(names):
        write_image(root / "JPEGImages" / f"{name}.jpg", "RGB", (23 + number, 17))
        labels = np.zeros((17, 23 + number))
        labels[4:9, 5:12], labels[9, 5:12] = 15, IGNORED
        write_mask(root / "SegmentationClass" / f"{name}.png", labels)
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in names[:-1]))
    (lists / "val.txt").write_text(f"{names[-1]}\n\n")
    return root


def load(data: str, options: DataOptions = SMALL) -> TaskData:
    return Segmentation().load_data(data, options)


def test_voc(tmp_path: Path) -> None:
    data = load(f"voc:{write_voc(tmp_path)}")
    assert data.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    assert VOC_CLASSES[15] == "person"
    assert (len(data.train), len(data.val)) == (2, 1)
    image, mask = data.val.load(0, None)
    assert torch.equal(image, load_image(tmp_path / "JPEGImages" / "c.jpg", data.preprocessing)[0])
    assert (mask.dtype, mask.shape) == (torch.uint8, (16, 16))
    assert set(mask.unique().tolist()) == {0, 15, IGNORED}


@pytest.mark.parametrize("gone", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation"])
def test_voc_without_a_folder(tmp_path: Path, gone: str) -> None:
    (write_voc(tmp_path) / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"has no folder {gone}"):
        load(f"voc:{tmp_path}")


def test_voc_lists(tmp_path: Path) -> None:
    lists = write_voc(tmp_path) / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("\n")
    with pytest.raises(InputError, match=r"val.txt names nothing"):
        load(f"voc:{tmp_path}")
    (lists / "val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"cannot be read as text"):
        load(f"voc:{tmp_path}")
    (lists / "val.txt").unlink()
    with pytest.raises(InputError, match=r"there is no file .*val.txt"):
        load(f"voc:{tmp_path}")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = load(f"voc:{write_voc(tmp_path)}")
    mask, image = tmp_path / "SegmentationClass" / "a.png", tmp_path / "JPEGImages" / "a.jpg"
    whole = mask.read_bytes()

    def refused(match: str) -> None:
        for seed in (None, 1):
            with pytest.raises(InputError, match=match):
                data.train.load(0, seed)

    mask.write_bytes(whole[: len(whole) // 2])
    refused("mask .*a.png cannot be read")
    write_mask(mask, np.full((17, 23), 21))
    refused("a.png has the class 21, and there are 21")
    write_image(mask, "RGB", (23, 17))
    refused("a.png has pixels of the kind RGB")
    write_mask(mask, np.zeros((17, 22)))
    refused("has 23 x 17 pixels and its mask .* 22 x 17")
    mask.unlink()
    refused("there is no mask .*a.png")
    mask.write_bytes(whole)
    image.write_bytes(b"no image")
    refused("a.jpg is not an image")
    image.unlink()
    refused("there is no file .*a.jpg")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (3, 90), (41, 16)])
def test_odd_images(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    write_voc(tmp_path)
    write_image(tmp_path / "JPEGImages" / "a.jpg", mode, size)
    write_mask(tmp_path / "SegmentationClass" / "a.png", np.full(size[::-1], 7), "L")
    data = load(f"voc:{tmp_path}")
    for seed in (None, 0, 1, 2):
        image, mask = data.train.load(0, seed)
        assert image.shape == (3, 16, 16)
        assert mask.shape == (16, 16)
        assert bool((mask == 7).all())


@pytest.mark.parametrize("size", [(64, 64), (97, 61), (40, 120)])
def test_masks_are_scaled_and_cut_as_their_images(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "classes.txt").write_text("ground\nred\nreddest\n")
    for number in range(4):
        write_pair(tmp_path, str(number), size, number)
    data = load(f"masks:{tmp_path}", DataOptions(image_size=32))
    agree = pixels = 0
    for seed in (None, *range(20)):
        image, mask = data.train.load((seed or 0) % 3, seed)
        red = image[0] * data.preprocessing.std[0] + data.preprocessing.mean[0]
        agree += int(((red * 255 / 80).round() == mask).sum())
        pixels += mask.numel()
    # All but those at edges, which the image mixes; one block off, half would agree.
    assert agree > 0.75 * pixels


def test_pairs_of_folders_are_divided_by_seed(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for number in range(10):
        write_image(tmp_path / "images" / f"{number}.jpg", "RGB", (20, 20))
        write_mask(tmp_path / "masks" / f"{number}.png", np.full((20, 20), number % 2), "L")
    data = load(f"masks:{tmp_path}")
    assert (len(data.train), len(data.val)) == (8, 2)
    parts = [{path.stem for path in part.images} for part in (data.train, data.val)]  # type: ignore[attr-defined]
    assert parts[0] | parts[1] == {str(number) for number in range(10)}
    other = load(f"masks:{tmp_path}", DataOptions(image_size=16, split_seed=2))
    assert {path.stem for path in other.val.images} != parts[1]  # type: ignore[attr-defined]
    for part in ("train", "val"):
        write_pair(tmp_path / part, "x", (8, 8))
    data = load(f"masks:{tmp_path}")
    assert (len(data.train), len(data.val)) == (1, 1)


def test_pairs_of_folders_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        load(f"masks:{tmp_path / 'none'}")
    with pytest.raises(InputError, match=r"no file .*classes.txt"):
        load(f"masks:{tmp_path}")
    names = tmp_path / "classes.txt"
    names.write_text("a\na\n")
    with pytest.raises(InputError, match="2 to 255 different ones"):
        load(f"masks:{tmp_path}")
    names.write_text("a\nb\n")
    with pytest.raises(InputError, match="has no folder images"):
        load(f"masks:{tmp_path}")
    write_pair(tmp_path, "x", (8, 8))
    with pytest.raises(InputError, match="the 1 images of .* cannot be divided"):
        load(f"masks:{tmp_path}")
    write_image(tmp_path / "images" / "y.jpg")
    with pytest.raises(InputError, match=r"1 images have no mask, .*y.jpg"):
        load(f"masks:{tmp_path}")


@pytest.mark.parametrize("data", ["digits", "voc", "voc:", "masks:", "folder:x"])
def test_other_data_are_refused(data: str) -> None:
    with pytest.raises(InputError, match="give scenes, scenes:train=2000,val=5000, voc:PATH"):
        load(data)
