"""`disco run --outputs`: what nodes answer, as files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from disco import api
from disco.answers import answers_folder, write_answer
from disco.errors import InputError
from disco.images import Preprocessing, load_image
from tests.cli.conftest import Command


def test_answers_are_those_of_the_partition(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "a b.jpg"):
        shutil.copy(photo, photos / name)
    (photos / "bad.jpg").write_bytes(b"no image")
    out = tmp_path / "new" / "answers"
    done = disco("run", partitioned, "--input", photos, "--outputs", out)
    assert done.code == 1 and "bad.jpg" in done.out
    assert sorted(path.name for path in out.iterdir()) == [
        "a b.jpg.safetensors",
        "a.jpg.safetensors",
    ]
    assert f"-> {out / 'a.jpg.safetensors'}" in done.out
    found = load_file(out / "a.jpg.safetensors")
    image = load_image(photos / "a.jpg", Preprocessing.for_size(32))
    assert set(found) == {"output"}
    torch.testing.assert_close(found["output"], api.load(partitioned)(image))


def test_names_of_what_is_nested(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    answer = {"out": x.T, "boxes": (x, [x[:1], None, 3]), "same": x}
    path = write_answer(tmp_path, Path("photos/a.png"), answer)
    assert path == tmp_path / "a.png.safetensors"
    expected: dict[str, Tensor] = {"out": x.T, "boxes.0": x, "boxes.1.0": x[:1], "same": x}
    found = load_file(path)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    write_answer(tmp_path, Path("a.png"), x)
    assert set(load_file(path)) == {"output"}
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_be_written(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    done = disco("run", partitioned, "--input", photo, "--outputs", file)
    assert done.code == 2 and done.err.startswith("disco: error: answers cannot be written into")
    folder = answers_folder(tmp_path / "answers")
    (folder / "a.png.safetensors").mkdir()
    with pytest.raises(InputError, match=r"a\.png\.safetensors cannot be written"):
        write_answer(folder, Path("a.png"), torch.zeros(1))
    assert [path.name for path in folder.iterdir()] == ["a.png.safetensors"]
