"""The digits file: read as it is, divided, moved by a pixel, and refused where it is none."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from disco.errors import InputError
from disco.images import load_image
from disco.tasks import Classification, DataOptions
from tests.tasks.small_data import labels_of, write_digits

load = Classification().load_data


@pytest.mark.parametrize("name", ["digits.csv", "digits.csv.gz"])
def test_plain_and_gzipped_files_give_every_digit_once(tmp_path: Path, name: str) -> None:
    path = write_digits(tmp_path / name, per_class=10)
    data = load(f"digits:{path}", DataOptions())
    assert (len(data.train), len(data.val)) == (80, 20)
    assert data.classes == tuple("0123456789")
    assert torch.equal(labels_of(data.val).bincount(), torch.full((10,), 2))
    assert str(path) in data.text and "80 for training, 20 for validation" in data.text


def test_an_input_is_that_of_the_digit_saved_as_an_image(tmp_path: Path) -> None:
    path = write_digits(tmp_path / "digits.csv", per_class=2)
    levels = np.loadtxt(path, delimiter=",")[:, :64]
    for size in (8, 16, 11):
        data = load(f"digits:{path}", DataOptions(image_size=size))
        for index in range(len(data.val)):
            row = levels[int(data.val.indices[index])]  # type: ignore[attr-defined]
            pixels = (row.reshape(8, 8) * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "digit.png")
            expected = load_image(tmp_path / "digit.png", data.preprocessing)[0]
            assert torch.equal(data.val.load(index, None)[0], expected)


def test_augmentation_moves_by_at_most_a_pixel_and_repeats(tmp_path: Path) -> None:
    path = write_digits(tmp_path / "digits.csv", per_class=2)
    data = load(f"digits:{path}", DataOptions())
    plain = data.train.load(0, None)[0]
    moved = torch.nn.functional.pad(plain, (1, 1, 1, 1), value=float("nan"))
    places = set()
    for seed in range(200):
        image = data.train.load(0, seed)[0]
        assert torch.equal(image, data.train.load(0, seed)[0])
        matching = []
        for down in range(3):
            for right in range(3):
                shifted = moved[:, down : down + 8, right : right + 8]
                known = ~shifted.isnan()
                if torch.equal(shifted[known], image[known]):
                    matching.append((down, right))
        assert len(matching) == 1
        places.update(matching)
    assert len(places) == 9
    still = load(f"digits:{path}", DataOptions(augment=False))
    assert torch.equal(still.train.load(0, 5)[0], plain)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "there is no digits file"),
        (lambda p: p.write_bytes(b"\x1f\x8b half"), "damaged or no CSV"),
        (lambda p: p.write_bytes(gzip.compress(b"1,2\n" * 9)[:-9]), "damaged or no CSV"),
        (lambda p: p.write_bytes(gzip.compress(b"1,2,x\n")), "damaged or no CSV"),
        (lambda p: p.write_bytes(gzip.compress(b"1,2\n1,2,3\n")), "damaged or no CSV"),
        (lambda p: p.write_bytes(gzip.compress(b"1,2,3\n")), "has no rows of 64 levels"),
        (lambda p: p.write_bytes(gzip.compress(b"")), "has no rows of 64 levels"),
        (lambda p: p.write_bytes(gzip.compress(b"17," * 64 + b"1\n")), "levels outside 0 to 16"),
        (lambda p: p.write_bytes(gzip.compress(b"nan," * 64 + b"1\n")), "levels outside 0 to 16"),
        (lambda p: p.write_bytes(gzip.compress(b"1," * 64 + b"10\n")), "digits outside 0 to 9"),
        (lambda p: p.write_bytes(gzip.compress(b"1," * 64 + b"1\n")), "the class '0' has 0 images"),
    ],
)
def test_files_that_are_none_are_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "digits.csv.gz"
    write(path)
    with pytest.raises(InputError, match=message):
        load(f"digits:{path}", DataOptions())


def test_without_scikit_learn_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install scikit-learn.*--data digits:/path"):
        load("digits", DataOptions())


@pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed"
)
def test_the_installed_digits() -> None:
    data = load("digits", DataOptions())
    assert len(data.train) + len(data.val) == 1797
    inputs = torch.stack([data.train.load(index, None)[0] for index in range(1400)])
    assert abs(float(inputs.mean())) < 0.02 and abs(float(inputs.std()) - 1) < 0.02
