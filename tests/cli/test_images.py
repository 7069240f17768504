"""Photographs in: every kind of file that users have, and those that are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from disco.errors import InputError
from disco.images import Preprocessing, default_photograph, find_images, load_image


@pytest.fixture
def photo() -> Image.Image:
    with Image.open(default_photograph()) as opened:
        return opened.convert("RGB")


def test_the_default_photograph_becomes_an_input() -> None:
    x = load_image(default_photograph())
    assert x.shape == (1, 3, 224, 224)
    assert x.dtype == torch.float32 and x.is_contiguous()
    assert 0.5 < float(x.std()) < 2.0, "normalised"


def test_the_default_photograph_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from disco.images import default_photograph as f; f();"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_are_those_of_a_plain_computation(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x = load_image(tmp_path / "a.png")
    cut = torch.from_numpy(pixels[16:240, 16:240].astype(np.float64) / 255)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    expected = ((cut - mean) / std).permute(2, 0, 1)
    assert float((x[0].double() - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_other_colour_modes_are_converted(photo: Image.Image, mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    photo.convert(mode).save(path)
    x = load_image(path)
    assert x.shape == (1, 3, 224, 224)
    difference = float((x - load_image(default_photograph())).abs().mean())
    assert difference < 1.0, "the same picture"


def test_sixteen_bits_are_scaled_not_clipped(photo: Image.Image, tmp_path: Path) -> None:
    gray = np.asarray(photo.convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(gray).save(tmp_path / "plain.png")
    assert torch.equal(load_image(tmp_path / "deep.png"), load_image(tmp_path / "plain.png"))


def test_the_orientation_in_the_file_is_followed(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo.rotate(180).save(tmp_path / "turned.png", exif=exif)
    photo.save(tmp_path / "plain.png")
    assert torch.equal(load_image(tmp_path / "turned.png"), load_image(tmp_path / "plain.png"))


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (100, 700)])
def test_odd_shapes(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", Preprocessing.for_size(32)).shape == (1, 3, 32, 32)


def test_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(InputError, match=r"a\.jpg is not an image that can be read: give"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_truncated(photo: Image.Image, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    photo.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"a\.{suffix}"):
        load_image(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_image(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="there is no file or folder"):
        find_images(tmp_path / "a")


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.PNG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no image"):
        find_images(tmp_path / "empty")
