"""Boxes and anchors: matching, and what is left of many overlapping boxes; all images at once.

B images, M boxes an image at most, A anchors, N candidates. Boxes are x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from disco.torchvision_compat import import_torchvision

# An anchor is of an object if they overlap by half of their union, at least (SSD, section 2.2).
MATCH_IOU = 0.5
# Of the offsets' centres and sizes, SSD's "variances" of 0.1 and 0.2.
_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def padded(targets: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The objects of a batch as rectangles of numbers; those to ignore are left out.

    Args:
        targets: an image's "boxes" float32 [n, 4], "labels" int64 [n] and "ignored" bool [n].

    Returns:
        Boxes [B, M, 4], labels [B, M] and which of them are there, bool [B, M]; M is at least 1.
    """
    kept = [~target["ignored"] for target in targets]
    boxes = [t["boxes"][k] for t, k in zip(targets, kept, strict=True)]
    labels = [t["labels"][k] for t, k in zip(targets, kept, strict=True)]
    counts = torch.tensor([len(b) for b in boxes], device=boxes[0].device)
    filled, named = pad_sequence(boxes, batch_first=True), pad_sequence(labels, batch_first=True)
    if not filled.shape[1]:
        filled, named = filled.new_zeros(len(boxes), 1, 4), named.new_zeros(len(boxes), 1)
    there = torch.arange(filled.shape[1], device=counts.device) < counts[:, None]
    return filled, named, there


def iou(first: Tensor, second: Tensor) -> Tensor:
    """What two boxes share of their union, [..., n, m]; the boxes are [..., n, 4] and [..., m, 4].

    As `torchvision.ops.box_iou`, which takes no batches in older versions.
    """
    # Edge by edge, each contiguous: five times faster than corner by corner.
    left, top, right, bottom = first.movedim(-1, 0).contiguous().unsqueeze(-1)
    other_left, other_top, other_right, other_bottom = (
        second.movedim(-1, 0).contiguous().unsqueeze(-2)
    )
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    shared = width.clamp(min=0) * height.clamp(min=0)
    areas = (right - left) * (bottom - top)
    others = (other_right - other_left) * (other_bottom - other_top)
    return shared / (areas + others - shared)


def match(boxes: Tensor, there: Tensor, anchors: Tensor) -> Tensor:
    """Which object each anchor is of.

    The one that it overlaps most, if by `MATCH_IOU` at least; and the anchor that overlaps an
    object most is that object's in any case (the later one's, if of several): SSD, section 2.2.

    Args:
        boxes: [B, M, 4], M at least 1.
        there: bool [B, M]; others match nothing.
        anchors: [A, 4].

    Returns:
        int64 [B, A], an object's number or -1.
    """
    overlap = iou(boxes, anchors).masked_fill(~there[..., None], -1.0)
    most, which = overlap.max(1)
    which = torch.where(most >= MATCH_IOU, which, -1)
    numbers = torch.arange(boxes.shape[1], device=boxes.device).where(there, -1)
    certain = torch.full_like(which, -1).scatter_reduce(1, overlap.argmax(2), numbers, "amax")
    return torch.where(certain >= 0, certain, which)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes [n, 4] as offsets [n, 4] from their anchors [n, 4]; the sides of both are above 0."""
    offsets: Tensor = _coder().encode_single(boxes, anchors)
    return offsets


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode`. Sizes are 62.5 times the anchor's at most."""
    boxes: Tensor = _coder().decode_single(offsets, anchors)
    return boxes


def _coder() -> Any:
    import_torchvision()
    return importlib.import_module("torchvision.models.detection._utils").BoxCoder(_WEIGHTS)


def suppress(boxes: Tensor, labels: Tensor, there: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression class by class: `torchvision.ops.batched_nms` of many images.

    Args:
        boxes: [B, N, 4], an image's in order of falling score.
        labels: int64 [B, N]; only boxes with the same one suppress each other.
        there: bool [B, N]; others are not kept and suppress nothing.
        iou_threshold: of two boxes that overlap more than this the first is kept.

    Returns:
        bool [B, N], those that are kept.
    """
    clash = (iou(boxes, boxes) > iou_threshold) & (labels[:, :, None] == labels[:, None, :])
    free = ~clash.triu(1)
    kept = there.clone()
    for number in range(boxes.shape[1] - 1):
        kept &= free[:, number] | ~kept[:, number, None]
    return kept
