"""The photographs that Python packages ship, for training and for testing.

They are read as files: the packages are not imported, because some bring a second OpenMP into the
process.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from disco.errors import InputError
from disco.images import read_rgb

Pixels = NDArray[np.uint8]

# By package and path below it. The two parts share no photograph, and no scene or subject.
TRAINING = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
TESTING = (
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/moon.png"),
    ("skimage", "data/retina.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
)
_DISTRIBUTIONS = {
    "matplotlib": "matplotlib",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def photograph_files(training: bool) -> list[Path]:
    """The files for training, or those for testing.

    Raises InputError, which says what to install, if one is not there.
    """
    return [_found(package, place) for package, place in (TRAINING if training else TESTING)]


def read_photographs(training: bool) -> list[Pixels]:
    """Their pixels, uint8 [height, width, 3] each, of 300 to 1411 pixels a side.

    Raises InputError as `photograph_files` and `read_rgb` do.
    """
    return [np.array(read_rgb(path)) for path in photograph_files(training)]


def _found(package: str, place: str) -> Path:
    # Of the package itself alone: looking for its parts would import it.
    spec = importlib.util.find_spec(package)
    name = _DISTRIBUTIONS[package]
    if spec is None or spec.origin is None:
        everything = " ".join(sorted(_DISTRIBUTIONS.values()))
        raise InputError(
            f"the photographs are files of other packages, of which {name} is not installed: "
            f"`pip install {everything}`"
        )
    path = Path(spec.origin).parent / place
    if not path.is_file():
        raise InputError(
            f"the installed {name} has no {path}: `pip install --force-reinstall {name}`, at its "
            "newest version"
        )
    return path
