"""Patches of photographs: both resolutions show the same place, in every turn; what is left out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from disco.errors import InputError
from disco.images import load_image, normalised
from disco.tasks import DataOptions, SuperResolution, TaskData
from disco.tasks.patches import Patches, grid_places, pair_of, training_places
from tests.tasks.small_data import write_image
from tests.tasks.small_photos import photo, write_photos

SMALL = DataOptions(image_size=8)


def load(data: str, options: DataOptions = SMALL) -> TaskData:
    return SuperResolution().load_data(data, options)


def patches_of(data: TaskData, part: str = "train") -> Patches:
    found = getattr(data, part)
    assert isinstance(found, Patches)
    return found


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_small_photograph_is_pillows_of_the_largest_multiple(scale: int) -> None:
    image = photo(1, (71, 53))
    pair = pair_of(np.array(image), scale, 8)
    width, height = 71 // scale, 53 // scale
    cut = image.crop((0, 0, width * scale, height * scale))
    small = cut.resize((width, height), Image.Resampling.BICUBIC)
    assert np.array_equal(pair.high.transpose(1, 2, 0), np.array(cut))
    assert np.array_equal(pair.low.transpose(1, 2, 0), np.array(small))


@pytest.mark.parametrize("scale", [2, 3])
def test_both_resolutions_are_cut_and_turned_alike(tmp_path: Path, scale: int) -> None:
    """Of every training patch the place and the turn are found again, once, in both."""
    write_photos(tmp_path, 3)
    train = patches_of(load(f"photos:{tmp_path}:scale={scale},train=5", DataOptions(image_size=8)))
    seen = set()
    for seed in range(40):
        low, target = train.load(2, seed)
        assert torch.equal(low, train.load(2, seed)[0])
        pair = train.pairs[int(target.photograph)]
        whole = normalised(
            torch.from_numpy(pair.low.transpose(1, 2, 0).copy()), train.preprocessing
        )[0]
        high = torch.from_numpy(pair.high).float() / 255.0
        found = [
            (top, left, turn)
            for turn, plain in enumerate(_turns(low))
            for top in range(whole.shape[1] - 7)
            for left in range(whole.shape[2] - 7)
            if torch.equal(whole[:, top : top + 8, left : left + 8], plain)
        ]
        assert len(found) == 1
        top, left, turn = found[0]
        rows, columns = (slice(scale * at, scale * (at + 8)) for at in (top, left))
        assert torch.equal(high[:, rows, columns], _turns(target.high)[turn])
        seen.add(found[0])
    assert len({turn for _, _, turn in seen}) == 8
    assert len(seen) > 35


def _turns(image: Tensor) -> list[Tensor]:
    """All turns and reflections."""
    turned = [image.rot90(times, (1, 2)) for times in range(4)]
    return [*turned, *(t.flip(2) for t in turned)]


def test_without_augmentation_an_example_is_the_same_patch(tmp_path: Path) -> None:
    write_photos(tmp_path)
    data = load(f"photos:{tmp_path}:train=9")
    still = load(f"photos:{tmp_path}:train=9", DataOptions(image_size=8, augment=False))
    for index in range(9):
        plain = data.train.load(index, None)[0]
        assert plain.shape == (3, 8, 8) and plain.dtype == torch.float32 and plain.is_contiguous()
        assert torch.equal(plain, still.train.load(index, 77)[0])
        assert float(plain.min()) >= 0 and float(plain.max()) <= 1
    assert any(
        not torch.equal(data.train.load(0, s)[0], data.train.load(0, None)[0]) for s in (1, 2)
    )


def test_training_places_follow_the_areas() -> None:
    pairs = [
        pair_of(np.zeros((h, w, 3), np.uint8), 2, 8) for h, w in ((16, 16), (80, 40), (60, 70))
    ]
    places = training_places(pairs, 8, 1000)
    counts = np.bincount(places[:, 0], minlength=3)
    areas = np.array([1, 33 * 13, 23 * 28])
    # Shares of 1,000 are rounded at both ends.
    assert np.abs(counts - 1000 * areas / areas.sum()).max() <= 1
    for number, top, left in places:
        assert 0 <= top <= pairs[number].low.shape[1] - 8
        assert 0 <= left <= pairs[number].low.shape[2] - 8


def test_the_grid_covers_without_overlap_and_is_thinned_evenly() -> None:
    pairs = [pair_of(np.zeros((h, w, 3), np.uint8), 2, 8) for h, w in ((16, 16), (85, 51))]
    places = grid_places(pairs, 8, 1000)
    assert np.bincount(places[:, 0]).tolist() == [1, 5 * 3]
    seen = np.zeros((42, 25), int)
    for _, top, left in places[1:]:
        seen[top : top + 8, left : left + 8] += 1
    assert seen.max() == 1 and seen.sum() == 15 * 64
    thin = grid_places(pairs, 8, 8)
    assert np.bincount(thin[:, 0]).tolist() == [1, 4]
    assert {tuple(p) for p in thin.tolist()} <= {tuple(p) for p in places.tolist()}
    assert len(grid_places(pairs, 8, 1)) == 2  # one a photograph is the least


def test_a_folder_is_divided_by_photograph_and_by_its_seed(tmp_path: Path) -> None:
    write_photos(tmp_path / "deep" / "er", 10)

    def parts(seed: int) -> tuple[set[bytes], set[bytes]]:
        data = load(f"photos:{tmp_path}", DataOptions(image_size=8, split_seed=seed))
        assert f"0.2 by seed {seed}" in data.text
        train, val = (
            {pair.high.tobytes() for pair in patches_of(data, part).pairs}
            for part in ("train", "val")
        )
        assert (len(train), len(val)) == (8, 2) and not train & val
        return train, val

    assert parts(0) == parts(0)
    assert len({frozenset(parts(seed)[1]) for seed in range(5)}) > 1


def test_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    write_photos(tmp_path / "train", 3)
    write_photos(tmp_path / "val", 1)
    data = load(f"photos:{tmp_path}:scale=4,train=20")
    assert (len(data.train), len(data.val)) == (20, 2)
    assert data.classes == ("red", "green", "blue")
    low, target = data.val.load(0, None)
    assert low.shape == (3, 8, 8) and target.high.shape == (3, 32, 32) and target.scale == 4


@pytest.mark.parametrize(
    ("name", "mode"),
    [("gray.png", "L"), ("cmyk.jpg", "CMYK"), ("alpha.png", "RGBA"), ("upper.JPEG", "RGB")],
)
def test_modes(tmp_path: Path, name: str, mode: str) -> None:
    write_photos(tmp_path / "train", 1)
    path = write_image(tmp_path / "val" / name, mode, (33, 35))
    data = load(f"photos:{tmp_path}")
    assert len(data.val) == 4
    _, target = data.val.load(0, None)
    # The grid's first patch begins where that of the whole, read as an input, does.
    whole = pair_of(np.array(Image.open(path).convert("RGB")), 2, 8)
    assert np.array_equal(patches_of(data, "val").pairs[0].high, whole.high)
    assert target.high.shape == (3, 16, 16)


def test_an_input_is_what_an_image_file_of_it_gives(tmp_path: Path) -> None:
    """So `disco run` gives a small image the answer that was measured."""
    write_photos(tmp_path, 2)
    data = load(f"photos:{tmp_path}")
    low = data.val.load(1, None)[0]
    pixels = (low * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "low.png")
    assert torch.equal(load_image(tmp_path / "low.png", data.preprocessing)[0], low)


def test_what_cannot_be_used_is_named_once_and_left_out(tmp_path: Path) -> None:
    write_photos(tmp_path / "train", 2)
    write_photos(tmp_path / "val", 1)
    broken = tmp_path / "train" / "2.png"
    broken.write_bytes((tmp_path / "train" / "0.png").read_bytes()[:200])
    (tmp_path / "train" / "3.jpg").write_text("no image")
    photo(9, (70, 15)).save(tmp_path / "train" / "4.png")
    data = load(f"photos:{tmp_path}:train=12")
    assert len(data.train) == 15 and "12 patches of 2 photographs" in data.text
    for index, message in (
        (12, r"train/2\.png cannot be read"),
        (13, r"train/3\.jpg is not an image"),
        (14, r"train/4\.png cannot be used: it has 70 x 15 pixels, and patches have 16 x 16"),
    ):
        with pytest.raises(InputError, match=message):
            data.train.load(index, 1)
    for index in range(12):
        data.train.load(index, 1)
    for number in range(2):
        (tmp_path / "train" / f"{number}.png").unlink()
    with pytest.raises(InputError, match="none of 3 photographs can be used"):
        load(f"photos:{tmp_path}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("scenes", "are unknown: give photographs"),
        ("photos", "are unknown"),
        ("photos:", "are unknown"),
        ("photos::scale=2", "are unknown"),
        ("photographs:scale=5", "a scale of 5 was given; it is one of 2, 3, 4"),
        ("photographs:scale", "the option 'scale' of the data is none of scale, train, val"),
        ("photographs:scale=two", "the option 'scale=two'"),
        ("photographs:color=2", "the option 'color=2'"),
        ("photographs:train=0", "asks for no patches"),
        ("photos:/absent/folder:scale=2", "there is no folder /absent/folder"),
    ],
)
def test_what_is_refused(data: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(data)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no photograph"):
        load(f"photos:{tmp_path}")
    write_photos(tmp_path / "one", 1)
    with pytest.raises(InputError, match="has one photograph, and at least 2"):
        load(f"photos:{tmp_path / 'one'}")
    write_photos(tmp_path / "half" / "train")
    with pytest.raises(InputError, match=r"half/train is there and .*half/val is not"):
        load(f"photos:{tmp_path / 'half'}")
    with pytest.raises(InputError, match="patches have at least 8"):
        load(f"photos:{tmp_path / 'half' / 'train'}:scale=2", DataOptions(image_size=7))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("skimage", "sklearn", "matplotlib")),
    reason="scikit-image, scikit-learn or matplotlib is not installed",
)
def test_the_shipped_photographs() -> None:
    data = load("photographs:train=100,val=70", DataOptions())
    assert data.preprocessing.size == 24
    assert (len(data.train), len(data.val)) == (100, 70)
    assert "of 10 photographs for training, 70 of 7 for validation" in data.text
