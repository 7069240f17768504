"""Class folders: how they are found and divided, odd files, and what is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from disco.errors import InputError
from disco.images import load_image
from disco.tasks import Classification, DataOptions, TaskData
from tests.tasks.small_data import labels_of, write_folder, write_image

SMALL = DataOptions(image_size=16)


def load(path: Path, options: DataOptions = SMALL) -> TaskData:
    return Classification().load_data(f"folder:{path}", options)


def test_one_set_of_class_folders_is_divided_by_seed(tmp_path: Path) -> None:
    write_folder(tmp_path, ("b", "a", "c"), count=10)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("no class")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = load(tmp_path)
    assert data.classes == ("a", "b", "c")
    assert labels_of(data.train).bincount().tolist() == [8, 8, 8]
    assert labels_of(data.val).bincount().tolist() == [2, 2, 2]
    assert "0.2 of each class by seed 0" in data.text
    assert data.preprocessing.size == 16


def test_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", count=4)
    write_folder(tmp_path / "val", count=1)
    data = load(tmp_path)
    assert (len(data.train), len(data.val)) == (8, 2)
    assert labels_of(data.val).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [
        ("gray.png", "L", (31, 8)),
        ("one.png", "RGB", (1, 1)),
        ("long.png", "RGB", (3, 400)),
        ("alpha.png", "RGBA", (20, 20)),
        ("cmyk.jpg", "CMYK", (40, 30)),
        ("upper.JPEG", "L", (16, 16)),
        ("small.gif", "L", (5, 7)),
        ("print.tiff", "CMYK", (11, 13)),
        ("web.webp", "RGB", (64, 48)),
        ("deeper/inside.bmp", "RGB", (17, 19)),
    ],
)
def test_formats_modes_and_sizes(
    tmp_path: Path, name: str, mode: str, size: tuple[int, int]
) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=1)
    shutil.rmtree(tmp_path / "val" / "dog")
    path = write_image(tmp_path / "val" / "dog" / name, mode, size)
    shutil.rmtree(tmp_path / "train" / "cat")
    write_image(tmp_path / "train" / "cat" / name, mode, size)
    data = load(tmp_path)
    assert labels_of(data.val).tolist() == [0, 1]
    assert torch.equal(data.val.load(1, None)[0], load_image(path, data.preprocessing)[0])
    for seed in range(20):
        image = data.train.load(0, seed)[0]
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32
        assert image.isfinite().all() and image.is_contiguous()
        assert torch.equal(image, data.train.load(0, seed)[0])


def test_augmentation_cuts_and_mirrors_and_can_be_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for number in range(5):
        write_image(tmp_path / "cat" / f"{number}.png", "RGB", (40, 30))
    data, plain = load(tmp_path), load(tmp_path, DataOptions(image_size=16, augment=False))
    images = {tuple(data.train.load(0, seed)[0].flatten().tolist()) for seed in range(30)}
    assert len(images) == 30
    assert torch.equal(plain.train.load(0, 7)[0], data.train.load(0, None)[0])


def test_a_damaged_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=2)
    broken = tmp_path / "val" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = load(tmp_path)
    with pytest.raises(InputError, match=r"val/cat/0\.png"):
        data.val.load(0, None)
    data.val.load(1, None)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        load(tmp_path / "absent")
    write_folder(tmp_path / "one", ("cat",))
    with pytest.raises(InputError, match="has 1 class folders, and at least 2"):
        load(tmp_path / "one")
    write_folder(tmp_path / "empty")
    (tmp_path / "empty" / "emu").mkdir()
    (tmp_path / "empty" / "emu" / "readme.txt").write_text("none yet")
    with pytest.raises(InputError, match="the class 'emu' has no image"):
        load(tmp_path / "empty")
    write_folder(tmp_path / "single", count=2)
    (tmp_path / "single" / "dog" / "1.png").unlink()
    with pytest.raises(InputError, match="the class 'dog' has 1 images"):
        load(tmp_path / "single")
    write_folder(tmp_path / "half" / "train")
    with pytest.raises(InputError, match=r"half/train is there and .*half/val is not"):
        load(tmp_path / "half")
    write_folder(tmp_path / "odd" / "train", ("cat", "dog"))
    write_folder(tmp_path / "odd" / "val", ("cat", "cow"))
    with pytest.raises(InputError, match="different classes: cow, dog"):
        load(tmp_path / "odd")


@pytest.mark.parametrize("data", ["", "mnist", "folder", "folder:", "digit"])
def test_other_data_are_refused(data: str) -> None:
    with pytest.raises(InputError, match="are unknown: give digits"):
        Classification().load_data(data, DataOptions())
