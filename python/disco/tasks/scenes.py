"""Generated scenes: shapes composed over parts of photographs, with exact labels.

A scene is a part of a photograph, over which one to four shapes lie, one before the other. A shape
has a colour near its class's hue, perhaps with a part of another photograph in it, is unevenly lit,
and of random size, place, proportions, rotation and opacity; the whole is then blurred or not, and
noisy. Labels are those of the geometry: a pixel belongs to the foremost shape that covers its
centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from disco.errors import InputError
from disco.tasks.photographs import Pixels
from disco.tasks.scene_shapes import SHAPES, Floats, distance

CLASSES = ("background", *SHAPES)
# Scenes made at a time. The first n of a seed do not depend on how many are asked for.
_CHUNK = 32
_MOST_OBJECTS = 4
# Of a shape, as shares of the scene's side: half its extent, drawn log-uniformly.
_RADIUS = (0.15, 0.36)
# Deviation of a hue, of a whole circle of hues.
_HUE_SPREAD = 0.11
# To either side, in radians: some 30 degrees.
_TURN = 0.5
# A shape is not placed if less of it would be seen: of its pixels in the scene, and of the scene.
_SEEN, _SEEN_OF_SCENE = 0.4, 1 / 200


class Scenes(NamedTuple):
    """Scenes and their labels.

    Attributes:
        images: uint8 [n, size, size, 3].
        masks: uint8 [n, size, size], numbers of `CLASSES`; 0 is the background.
        boxes: of each scene's shapes, the hindmost first: float32 [shapes, 4], left, top, right and
            bottom edge of the part that is seen, in pixels. Now and then there is no shape.
        labels: int64 [shapes], numbers of `CLASSES`, from 1.
    """

    images: Pixels
    masks: Pixels
    boxes: list[Floats]
    labels: list[NDArray[np.int64]]


def scenes(count: int, size: int, seed: int, photographs: Sequence[Pixels]) -> Scenes:
    """Make scenes; the same arguments give the same ones.

    Args:
        count: how many.
        size: their side in pixels, 16 or more.
        seed: 0 or more. The first n scenes of a seed are the same for every count.
        photographs: uint8 [height, width, 3], of `size` pixels a side at least.

    Raises:
        InputError: a size or photographs that do not do.
    """
    if size < 16:
        raise InputError(f"scenes of {size} pixels were asked for: ask for 16 or more")
    if not photographs or min(min(p.shape[:2]) for p in photographs) < size:
        raise InputError(
            f"scenes of {size} pixels need photographs of {size} pixels a side or more: ask for "
            "smaller scenes"
        )
    pyramids = [_pyramid(photograph, size) for photograph in photographs]
    parts = [
        _chunk(np.random.default_rng((seed, first)), size, pyramids)
        for first in range(0, count, _CHUNK)
    ]
    return Scenes(
        np.concatenate([p.images for p in parts])[:count] if parts else _empty(size, 3),
        np.concatenate([p.masks for p in parts])[:count] if parts else _empty(size),
        [box for p in parts for box in p.boxes][:count],
        [label for p in parts for label in p.labels][:count],
    )


def _empty(size: int, *more: int) -> Pixels:
    return np.zeros((0, size, size, *more), np.uint8)


def _chunk(
    rng: np.random.Generator, size: int, pyramids: Sequence[Sequence[Image.Image]]
) -> Scenes:
    shape = (_CHUNK, _MOST_OBJECTS)
    # Slots are places in depth, the last one foremost; 0 is an empty one.
    wanted = np.arange(_MOST_OBJECTS)[::-1] < rng.integers(1, _MOST_OBJECTS + 1, (_CHUNK, 1))
    classes = wanted * rng.integers(1, len(CLASSES), shape)
    distances = _distances(rng, classes, size)
    owner, placed = _placed(distances <= 0)
    canvas = _jittered(rng, _parts(rng, _CHUNK, size, pyramids))
    for slot in range(_MOST_OBJECTS):
        chosen = placed[:, slot].nonzero()[0]
        fill = _fill(rng, classes[chosen, slot], size, pyramids)
        opacity = rng.uniform(0.8, 1, (len(chosen), 1, 1)).astype(np.float32)
        # An edge that is a pixel wide, as an antialiased one is.
        alpha = (opacity * np.clip(0.5 - distances[chosen, slot], 0, 1))[..., None]
        canvas[chosen] += alpha * (fill - canvas[chosen])
    labels = np.concatenate([np.zeros_like(classes[:, :1]), classes], 1)
    masks = np.take_along_axis(labels, owner.reshape(_CHUNK, -1), 1).astype(np.uint8)
    boxes = _boxes(owner)
    return Scenes(
        _photographed(rng, canvas),
        masks.reshape(owner.shape),
        [b[p] for b, p in zip(boxes, placed, strict=True)],
        [c[p].astype(np.int64) for c, p in zip(classes, placed, strict=True)],
    )


def _distances(rng: np.random.Generator, classes: NDArray[np.int64], size: int) -> Floats:
    """How far pixels' centres are out of shapes, in pixels: [chunk, slots, size, size].

    Infinite for the class 0.
    """
    low, high = np.log(_RADIUS)
    radius = size * np.exp(rng.uniform(low, high, classes.shape))
    angle = rng.uniform(-_TURN, _TURN, classes.shape)
    stretch = np.exp(rng.uniform(-0.2, 0.2, classes.shape))
    centre = rng.uniform(0.08, 0.92, (2, *classes.shape)) * size
    detail = rng.random(classes.shape)
    out = np.full((*classes.shape, size, size), np.inf, np.float32)
    pixel = np.arange(size, dtype=np.float32) + np.float32(0.5)
    for number in range(1, len(CLASSES)):
        where = classes == number

        def of(values: NDArray[np.floating], where: NDArray[np.bool_] = where) -> Floats:
            return values[where].astype(np.float32)[:, None, None]

        x, y = pixel[None, None, :] - of(centre[0]), pixel[None, :, None] - of(centre[1])
        cos, sin = of(np.cos(angle)), of(np.sin(angle))
        across, down = (cos * x + sin * y) / of(stretch), (cos * y - sin * x) * of(stretch)
        out[where] = distance(SHAPES[number - 1], across, down, of(radius), of(detail))
    return out


def _placed(covered: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Each pixel's slot from 1, 0 for none: [chunk, size, size]; which slots are used.

    From the front to the back, so that what is left out hides nothing.
    """
    count, slots, size, _ = covered.shape
    owner = np.zeros((count, size, size), np.int64)
    placed = np.zeros((count, slots), np.bool_)
    for slot in reversed(range(slots)):
        seen = covered[:, slot] & (owner == 0)
        pixels, whole = seen.sum((1, 2)), covered[:, slot].sum((1, 2))
        least = np.maximum(_SEEN * whole, max(1, _SEEN_OF_SCENE * size * size))
        placed[:, slot] = pixels >= least
        owner[seen & placed[:, slot, None, None]] = slot + 1
    return owner, placed


def _boxes(owner: NDArray[np.int64]) -> Floats:
    """Edges of what is seen of each slot: [chunk, slots, 4]; of unused ones without meaning."""
    size = owner.shape[-1]
    seen = owner[:, None] == np.arange(1, _MOST_OBJECTS + 1)[:, None, None]
    columns, rows = seen.any(2), seen.any(3)
    edges = (
        columns.argmax(-1),
        rows.argmax(-1),
        size - columns[..., ::-1].argmax(-1),
        size - rows[..., ::-1].argmax(-1),
    )
    return np.stack(edges, -1).astype(np.float32)


def _fill(
    rng: np.random.Generator,
    classes: NDArray[np.int64],
    size: int,
    pyramids: Sequence[Sequence[Image.Image]],
) -> Floats:
    """What shapes are filled with: [count, size, size, 3] in 0..1, about."""
    count = len(classes)
    fill = np.broadcast_to(_colours(rng, classes)[:, None, None], (count, size, size, 3)).copy()
    # Half of them are a colour, half a photograph of two fifths.
    share = rng.integers(0, 2, count).astype(np.float32) * np.float32(0.4)
    mixed = share.nonzero()[0]
    texture = _jittered(rng, _parts(rng, len(mixed), size, pyramids))
    fill[mixed] += share[mixed, None, None, None] * (texture - fill[mixed])
    angle = rng.uniform(0, 2 * np.pi, (2, count, 1, 1))
    along = np.linspace(-0.5, 0.5, size)
    light = np.cos(angle[0]) * along + np.sin(angle[0]) * along[:, None]
    strength = rng.uniform(0, 0.6, (count, 1, 1))
    fill *= (1 + strength * light).astype(np.float32)[..., None]
    return fill


def _colours(rng: np.random.Generator, classes: NDArray[np.int64]) -> Floats:
    """Strong ones, float32 [count, 3]. A class has its hue, which spreads to the next's."""
    count = len(classes)
    hue = classes[:, None] / len(SHAPES) + rng.normal(0, _HUE_SPREAD, (count, 1))
    hue = hue + np.array([0, 1 / 3, 2 / 3])
    pure = np.clip(np.abs(6 * (hue % 1) - 3) - 1, 0, 1)
    saturation, value = rng.uniform(0.5, 1, (2, count, 1))
    return (value * (1 - saturation * (1 - pure))).astype(np.float32)


def _jittered(rng: np.random.Generator, parts: Pixels) -> Floats:
    """Of other contrast, brightness and colour: float32 in 0..1, about."""
    count = len(parts)
    contrast = rng.uniform(0.6, 1.3, (count, 1, 1, 1)).astype(np.float32) / 255
    tint = rng.uniform(0.8, 1.2, (count, 1, 1, 3)).astype(np.float32)
    shift = rng.uniform(-0.15, 0.15, (count, 1, 1, 1)).astype(np.float32)
    scaled = parts.astype(np.float32) * (contrast * tint)
    return scaled + (shift + np.float32(0.5) - np.float32(127.5) * contrast)


def _photographed(rng: np.random.Generator, canvas: Floats) -> Pixels:
    """Blurred, half of them, noisy, and rounded to 8 bits."""
    for dim in (1, 2):
        blur = rng.choice(np.array([0, 0.2], np.float32), (len(canvas), 1, 1, 1))
        neighbours = np.roll(canvas, 1, dim) + np.roll(canvas, -1, dim) - 2 * canvas
        # Rolled pixels come from the other side: the border keeps its own.
        border = [slice(None)] * 4
        border[dim] = slice(0, None, canvas.shape[dim] - 1)
        neighbours[tuple(border)] = 0
        canvas = canvas + blur * neighbours
    noise = rng.standard_normal(canvas.shape, np.float32)
    noise *= rng.uniform(0, 0.05, (len(canvas), 1, 1, 1)).astype(np.float32)
    return np.rint((canvas + noise).clip(0, 1) * 255).astype(np.uint8)


def _pyramid(photograph: Pixels, size: int) -> list[Image.Image]:
    """The photograph at full, half, quarter resolution and so on, not below `size`."""
    levels = [Image.fromarray(photograph)]
    while min(levels[-1].size) >= 2 * size:
        levels.append(levels[-1].reduce(2))
    return levels


def _parts(
    rng: np.random.Generator, count: int, size: int, pyramids: Sequence[Sequence[Image.Image]]
) -> Pixels:
    """Square parts of photographs, of any size, mirrored or not: [count, size, size, 3]."""
    out = np.empty((count, size, size, 3), np.uint8)
    chosen = rng.integers(0, len(pyramids), count)
    place = rng.random((count, 3))
    for index in range(count):
        levels = pyramids[chosen[index]]
        shorter = min(levels[0].size)
        side = size * (shorter / size) ** place[index, 0]
        level = min(int(np.log2(side / size)), len(levels) - 1)
        image = levels[level]
        side = min(side / 2**level, *image.size)
        left, top = (image.width - side) * place[index, 1], (image.height - side) * place[index, 2]
        box = (left, top, left + side, top + side)
        out[index] = image.resize((size, size), Image.Resampling.BILINEAR, box)
    mirrored = rng.random(count) < 0.5
    out[mirrored] = out[mirrored, :, ::-1]
    return out
