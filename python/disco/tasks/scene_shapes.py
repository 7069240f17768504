"""The shapes of generated scenes, each as a distance in its own coordinates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SHAPES = ("disc", "rectangle", "triangle", "cross", "ring", "star")
# The radius of a star's inner corners: that of the pentagram is 0.38.
_STAR_INNER = 0.45


def distance(shape: str, x: Floats, y: Floats, radius: Floats, detail: Floats) -> Floats:
    """How far points are out of a shape: 0 on its outline, negative within.

    Exact where the nearest point of the outline lies on a straight or round piece, and short
    beyond corners, which is enough to tell in from out and to draw an edge.

    Args:
        shape: one of `SHAPES`.
        x, y: of the points, from the shape's centre; arrays that broadcast with the others.
        radius: half the shape's extent, in the same units.
        detail: 0 to 1: how wide a rectangle, a cross's bars or a ring's band are.
    """
    if shape == "disc":
        return np.hypot(x, y) - radius
    if shape == "ring":
        half_band = radius * (0.15 + 0.1 * detail)
        return np.abs(np.hypot(x, y) - (radius - half_band)) - half_band
    if shape == "rectangle":
        return _box(x, y, 0.85 * radius, (0.5 + 0.35 * detail) * radius)
    if shape == "cross":
        bar = (0.2 + 0.15 * detail) * radius
        return np.minimum(_box(x, y, radius, bar), _box(x, y, bar, radius))
    if shape == "triangle":
        # Three sides at half the radius from the centre.
        slanted = np.abs(x) * np.float32(np.sqrt(0.75)) - y / 2
        return np.maximum(y, slanted) - radius / 2
    if shape == "star":
        return _star(x, y, radius)
    raise ValueError(f"no shape {shape!r}")


def _box(x: Floats, y: Floats, half_width: Floats, half_height: Floats) -> Floats:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _star(x: Floats, y: Floats, radius: Floats) -> Floats:
    """Five points. The plane is folded into the tenth of it that holds one edge."""
    tenth = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, y), 2 * tenth) - tenth)
    far = np.hypot(x, y)
    # From the outer corner, at angle 0, to the inner one, at angle `tenth`, for a radius of 1.
    edge = np.array([_STAR_INNER * np.cos(tenth) - 1, _STAR_INNER * np.sin(tenth)])
    edge /= np.hypot(*edge)
    normal_x, normal_y = np.float32(edge[1]), np.float32(-edge[0])
    out: Floats = (far * np.cos(angle) - radius) * normal_x + far * np.sin(angle) * normal_y
    return out
