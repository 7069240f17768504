"""Every kind of file that is no usable image: one line each, and the others go on."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disco.errors import InputError
from disco.images import MOST_PIXELS, Preprocessing, default_photograph, find_images, load_image
from tests.cli.conftest import Command

SMALL = Preprocessing.for_size(32)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def floats(path: Path, *values: float) -> None:
    pixels = np.full((40, 40), 0.5, np.float32)
    pixels[5, : len(values)] = values
    Image.fromarray(pixels).save(path)


def _truncated(path: Path) -> None:
    path.write_bytes(default_photograph().read_bytes()[:20000])


def _no_pixels(path: Path) -> None:
    Image.new("RGB", (50, 50)).save(path)
    path.write_bytes(path.read_bytes()[:60])


# Name of the file, how to make it, what its line says.
BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("text.jpg", lambda p: p.write_text("hello"), "is not an image that can be read: give"),
    ("empty.png", lambda p: p.touch(), "is not an image that can be read: give"),
    ("truncated.jpg", _truncated, r"cannot be read: .*\. Give a whole file"),
    ("no-pixels.png", _no_pixels, "cannot be read|is not an image"),
    ("folder.jpg", lambda p: p.mkdir(), "is a folder: give one image file"),
    ("dangling.jpg", lambda p: p.symlink_to("nothing"), "there is no file"),
    ("loop.jpg", lambda p: p.symlink_to(p), "cannot be read|there is no file"),
    ("pipe.jpg", os.mkfifo, "is a pipe or a device: give an image file"),
    ("device.png", lambda p: p.symlink_to("/dev/zero"), "is a pipe or a device"),
    ("huge.png", lambda p: p.write_bytes(png_header(2**31 - 1, 2**31 - 1)), "too many pixels"),
    ("large.png", lambda p: p.write_bytes(png_header(12000, 10000)), "too many pixels; at most"),
    ("long.png", lambda p: Image.new("L", (90000, 1)).save(p), "would be scaled to .* at most"),
    ("nan.tiff", lambda p: floats(p, float("nan")), "pixels that are NaN or infinite"),
    ("inf.tiff", lambda p: floats(p, 0.1, float("-inf")), "pixels that are NaN or infinite"),
    ("range.tiff", lambda p: floats(p, 255.0, -1.0), "pixels from -1 to 255; they may lie from 0"),
]


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, make, _ in BAD:
        make(folder / name)
    return folder


def test_each_is_one_line_and_the_others_go_on(
    disco: Command, partitioned: Path, bad: Path, tmp_path: Path
) -> None:
    for name in ("a-good.jpg", "z-good.jpg"):
        shutil.copy(default_photograph(), bad / name)
    result = tmp_path / "run.json"
    done = disco("run", partitioned, "--input", bad, "--json", result)
    assert done.code == 1, done.err
    assert not done.err, "warnings"
    for name, _, why in BAD:
        lines = [line for line in done.out.splitlines() if line.startswith(f"{bad / name}: ")]
        assert len(lines) == 1 and re.search(why, lines[0]), (name, lines)
    assert f"{len(BAD)} of {len(BAD) + 2} images could not be used" in done.out
    used = json.loads(result.read_text())["images"]
    assert [Path(u["image"]).name for u in used] == ["a-good.jpg", "z-good.jpg"]
    assert used[0]["top"] == used[1]["top"]


def test_nothing_but_bad_ones(disco: Command, partitioned: Path, bad: Path) -> None:
    done = disco("run", partitioned, "--input", bad)
    assert done.code == 2
    assert f"none of the {len(BAD)} images in {bad} could be used" in done.err
    assert len(done.err.splitlines()) == 1
    assert len(done.out.splitlines()) == len(BAD), "nothing was started"


@pytest.mark.parametrize(("name", "why"), [(name, why) for name, _, why in BAD])
def test_the_message_names_the_file(bad: Path, name: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        load_image(bad / name)
    assert str(bad / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may read nothing")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    shutil.copy(default_photograph(), folder / "a.jpg")
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match=r"a\.jpg may not be read: allow reading it"):
            load_image(folder / "a.jpg")
        with pytest.raises(InputError, match="cannot be read: Permission denied: allow reading it"):
            find_images(folder)
    finally:
        os.seteuid(0)


def test_floating_point_pixels_from_0_to_1_are_the_8_bit_ones(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    gray[0, :2] = (0, 255)
    Image.fromarray(gray).save(tmp_path / "a.png")
    Image.fromarray(gray.astype(np.float32) / 255).save(tmp_path / "a.tiff")
    assert load_image(tmp_path / "a.png").equal(load_image(tmp_path / "a.tiff"))


def test_the_largest_scaled_size(tmp_path: Path) -> None:
    longest = MOST_PIXELS // SMALL.resize // SMALL.resize
    Image.new("L", (longest, 1)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", SMALL).shape == (1, 3, 32, 32)
    Image.new("L", (longest + 1, 1)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"image .* of {longest + 1} x 1 pixels would be scaled"):
        load_image(tmp_path / "a.png", SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"std": [0.2, 0.0, 0.2]},
        {"mean": [0.2, float("nan"), 0.2]},
        {"mean": [1]},
        {"size": 0},
        {"size": 300},
        {"resize": -1},
        {"resize": float("inf")},
    ],
)
def test_a_preprocessing_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="description of the input is not usable"):
        Preprocessing.from_json({**Preprocessing().to_json(), **change})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_changed_bytes_are_an_image_or_an_input_error(
    kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """150 times some bytes of a file, mostly of its beginning, are others."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(default_photograph()) as photo, io.BytesIO() as file:
        more = {} if kind in ("GIF", "BMP") else {"exif": exif}
        photo.convert("RGB").resize((24, 32)).save(file, kind, **more)
        good = file.getvalue()
    path = tmp_path / "a.jpg"
    read = 0
    for seed in range(150):
        chance = random.Random(seed)
        content = bytearray(good)
        for _ in range(chance.choice((1, 2, 20))):
            end = min(len(content), 300) if chance.random() < 0.7 else len(content)
            content[chance.randrange(end)] = chance.randrange(256)
        path.write_bytes(content[: chance.randrange(len(content))] if seed % 5 == 4 else content)
        try:
            x = load_image(path, SMALL)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        assert x.shape == (1, 3, 32, 32) and bool(x.isfinite().all())
        read += 1
    assert 0 < read < 150, "both happen"
