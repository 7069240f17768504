"""What stands in for torchvision's own operators where they do not load."""

from __future__ import annotations

import torch
from torch import Tensor

from disco.torchvision_compat import import_torchvision, nms


def by_definition(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """Take the best box that is left, drop what overlaps it too much; one pair at a time."""
    left = sorted(range(len(boxes)), key=lambda i: -float(scores[i]))
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if overlap(boxes[best].tolist(), boxes[i].tolist()) <= threshold]
    return kept


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height)


def test_non_maximum_suppression_is_as_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 50):
        corner = 10 * torch.rand(count, 2, generator=generator)
        size = 0.5 + 5 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat((corner, corner + size), 1)
        scores = torch.rand(count, generator=generator)
        for threshold in (0.0, 0.3, 0.7):
            kept = nms(boxes, scores, threshold)
            assert kept.dtype == torch.int64
            assert kept.tolist() == by_definition(boxes, scores, threshold)


def test_of_equal_boxes_one_is_kept_and_of_none_none() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(3, 1)
    assert nms(boxes, torch.tensor([0.5, 0.5, 0.5]), 0.5).tolist() == [0]
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)


def test_torchvisions_function_works() -> None:
    ops = import_torchvision().ops
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.1, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    scores = torch.tensor([0.2, 0.9, 0.5])
    assert ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert ops.batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.5).tolist() == [1, 2, 0]
