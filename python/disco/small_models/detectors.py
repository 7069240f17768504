"""Small single-shot detectors (SSD, Liu et al., arXiv 1512.02325) on the small backbones.

They end where a network ends: class logits and box offsets of every anchor, and the anchors. What
depends on the data (matching, suppression) belongs to the task, so the models can be partitioned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from disco.small_models.backbones import DeiTBackbone, ResNetBackbone

# Class logits [B, A, 1 + classes], the background first; offsets [B, A, 4]; anchors [A, 4].
DetectorOutputs = tuple[Tensor, Tensor, Tensor]
# Width over height of an anchor of a cell's own scale; a larger square comes on top, as in section
# 2.2 of the paper.
_ASPECTS = (1.0, 2.0, 0.5)
PER_CELL = len(_ASPECTS) + 1
# Of anchors, see `grid_anchors`. SSD spaces them evenly from 0.2 to 0.9; objects of generated
# scenes have sides of 0.25 to 0.6: of the anchors of 48 pixels 7.0 and 4.3 match an object, with
# SSD's spacing 4.2 and 2.4.
_CONV_SCALES, _VIT_SCALES = (0.25, 0.4, 0.6, 0.8), (0.3, 0.5, 0.8)


def grid_anchors(grids: Sequence[int], scales: Sequence[float], image_size: int) -> Tensor:
    """Default boxes of square maps, by map, row, column and shape.

    Args:
        grids: cells of a side of each map.
        scales: of the anchors of each map and, at the end, of one map more, as shares of the image.
        image_size: side of the image in pixels.

    Returns:
        float32 [A, 4]: x1, y1, x2, y2 in pixels; those at a border reach outside.
    """
    parts = []
    for grid, scale, larger in zip(grids, scales, scales[1:], strict=False):
        sides = [(scale * math.sqrt(a), scale / math.sqrt(a)) for a in _ASPECTS]
        sides.append((math.sqrt(scale * larger),) * 2)
        half = torch.tensor(sides, dtype=torch.float64).clamp(max=1.0) / 2
        centre = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        middle = torch.stack((x, y), -1).reshape(-1, 1, 2)
        parts.append(torch.cat((middle - half, middle + half), -1).reshape(-1, 4))
    return (torch.cat(parts) * image_size).float()


class SSDHead(nn.Module):
    """Class and box heads, 3 x 3 convolutions, on each of several maps.

    Args:
        channels: of the maps.
        num_classes: without the background.

    Input: the maps. Output: class logits, float32 [B, A, 1 + num_classes], and offsets [B, A, 4].
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classes = nn.ModuleList(
            nn.Conv2d(c, PER_CELL * (1 + num_classes), 3, 1, 1) for c in channels
        )
        self.boxes = nn.ModuleList(nn.Conv2d(c, PER_CELL * 4, 3, 1, 1) for c in channels)
        for module in (*self.classes, *self.boxes):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return _by_anchor(self.classes, maps), _by_anchor(self.boxes, maps)


def _by_anchor(heads: nn.ModuleList, maps: Sequence[Tensor]) -> Tensor:
    rows = []
    for head, x in zip(heads, maps, strict=True):
        y = head(x)  # [B, PER_CELL values, h, w]
        rows.append(y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, y.shape[1] // PER_CELL))
    return torch.cat(rows, 1)


class _Smaller(nn.Module):
    """A map of half the resolution out of another."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Detector(nn.Module):
    """What both models share: the anchors of their maps, found by a pass over nothing."""

    anchors: Tensor

    def _set_anchors(self, image_size: int, scales: Sequence[float]) -> None:
        with torch.no_grad():
            was = self.training
            maps = self.eval().maps(torch.zeros(1, 3, image_size, image_size))
            self.train(was)
        grids = [x.shape[-1] for x in maps]
        self.register_buffer("anchors", grid_anchors(grids, scales, image_size), persistent=False)

    def maps(self, x: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError


class SmallSSD(_Detector):
    """A residual network of stem stride 2, heads on maps of strides 4, 8 and 16.

    Args:
        num_classes: of objects; the background is one more.
        image_size: side of the square images in pixels.
        blocks, width: of the backbone.

    Input: float32 [B, 3, image_size, image_size]. Output: see `DetectorOutputs`.
    """

    def __init__(self, num_classes: int, image_size: int, blocks: int, width: int) -> None:
        super().__init__()
        self.backbone = ResNetBackbone(blocks, width, stem_stride=2)
        _, middle, last = self.backbone.channels
        self.extra = _Smaller(last, last)
        self.head = SSDHead((middle, last, last), num_classes)
        self._set_anchors(image_size, _CONV_SCALES)

    def maps(self, x: Tensor) -> Sequence[Tensor]:
        """Three maps, of strides 4, 8 and 16."""
        _, middle, last = self.backbone.maps(x)
        return middle, last, self.extra(last)

    def forward(self, x: Tensor) -> DetectorOutputs:
        return *self.head(self.maps(x)), self.anchors


class SmallViTSSD(_Detector):
    """A vision transformer, heads on the grid of its patches and on one of half the resolution.

    Args:
        num_classes: of objects; the background is one more.
        image_size: side of the square images in pixels, a multiple of 8.
        dim, depth, heads: of the backbone.

    Input: float32 [B, 3, image_size, image_size]. Output: see `DetectorOutputs`.
    """

    def __init__(self, num_classes: int, image_size: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.backbone = DeiTBackbone(image_size, dim, depth, heads)
        self.extra = _Smaller(dim, dim)
        self.head = SSDHead((dim, dim), num_classes)
        self._set_anchors(image_size, _VIT_SCALES)

    def maps(self, x: Tensor) -> Sequence[Tensor]:
        """The patches' tokens as a map, and one of half its resolution."""
        grid = self.backbone.grid
        tokens = self.backbone(x)[:, 1:].transpose(1, 2)
        patches = tokens.reshape(tokens.shape[0], tokens.shape[1], grid, grid)
        return patches, self.extra(patches)

    def forward(self, x: Tensor) -> DetectorOutputs:
        return *self.head(self.maps(x)), self.anchors
