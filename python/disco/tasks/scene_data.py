"""Generated scenes as a task's data: ``scenes``, ``scenes:train=2000,val=5000``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from disco.errors import InputError
from disco.images import Preprocessing
from disco.tasks.data import DataOptions, mixed
from disco.tasks.photographs import read_photographs
from disco.tasks.scenes import Scenes, scenes

SCENE_SIZE = 48
_COUNTS = {"train": 2000, "val": 2000}


@dataclass(frozen=True)
class SceneData:
    """Scenes over the training photographs, and scenes over the others.

    Attributes:
        train, val: of `preprocessing.size` pixels.
        preprocessing: how an image file of a scene becomes an input.
        text: one line on where they come from.
    """

    train: Scenes
    val: Scenes
    preprocessing: Preprocessing
    text: str


def load_scenes(place: str, options: DataOptions) -> SceneData:
    """Make the scenes that the data ``scenes:PLACE`` stand for.

    Args:
        place: how many of each part, ``train=2000,val=5000``; either or both may be left out.
        options: of which the size and `split_seed`, from which all are made, count.

    Raises:
        InputError: counts of another form, a size that does not do, photographs not installed.
    """
    counts = _counts(place)
    usual = Preprocessing(SCENE_SIZE, SCENE_SIZE, (0.45, 0.45, 0.45), (0.25, 0.25, 0.25))
    preprocessing = options.preprocessing_or(usual)
    made = {
        part: _made(count, preprocessing.size, mixed(options.split_seed, number), part == "train")
        for number, (part, count) in enumerate(counts.items())
    }
    text = (
        f"scenes of {preprocessing.size} pixels: {counts['train']} for training, {counts['val']} "
        f"for validation, over other photographs, made by seed {options.split_seed}"
    )
    return SceneData(made["train"], made["val"], preprocessing, text)


@lru_cache(maxsize=4)
def _made(count: int, size: int, seed: int, training: bool) -> Scenes:
    """Kept: a run and what is measured of it ask for the same ones again, and they take seconds.

    Callers share the arrays, so they may not be written to.
    """
    return scenes(count, size, seed, read_photographs(training=training))


def _counts(place: str) -> dict[str, int]:
    counts = dict(_COUNTS)
    for pair in place.split(",") if place else []:
        part, _, text = pair.partition("=")
        if part not in counts or not text.isdecimal() or int(text) < 1:
            raise InputError(
                f"the scenes {place!r} were asked for: give scenes, or how many, for example "
                "scenes:train=2000,val=5000"
            )
        counts[part] = int(text)
    return counts
