"""mAP of detectors, by torchmetrics and COCO's tools."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from disco.errors import InputError
from disco.tasks.boxes import decode, suppress
from disco.tasks.metric_library import import_torchmetrics

# SSD's (arXiv 1512.02325, section 3.1), but for the number that is kept: COCO counts 100.
_LEAST_SCORE, _NMS_IOU, _CANDIDATES, _KEPT = 0.01, 0.45, 200, 100
# The same numbers; the first in C++, many times faster where there are thousands of images.
_BACKENDS = ("faster_coco_eval", "pycocotools")


def detect(logits: Tensor, offsets: Tensor, anchors: Tensor) -> list[dict[str, Tensor]]:
    """What a detector found.

    Args:
        logits: [B, A, 1 + classes], the background first.
        offsets: [B, A, 4].
        anchors: [A, 4], x1, y1, x2, y2 in pixels.

    Returns:
        For each image at most 100 "boxes" float32 [n, 4], their "scores" [n] and "labels" int64
        [n], the highest score first. Scores that are no numbers count as 0.
    """
    scores = logits.float().softmax(-1)[..., 1:].nan_to_num(0.0)
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    best, place = flat.topk(min(_CANDIDATES, flat.shape[1]), 1)
    most = max(1, int((best > _LEAST_SCORE).sum(1).max()))
    best, place = best[:, :most], place[:, :most]
    anchor, labels = place // classes, place % classes
    chosen = offsets.float().gather(1, anchor[..., None].expand(-1, -1, 4))
    boxes = decode(chosen.flatten(0, 1), anchors[anchor.flatten()].float())
    boxes = boxes.unflatten(0, best.shape)
    there = (best > _LEAST_SCORE) & boxes.isfinite().all(-1)
    kept = suppress(boxes, labels, there, _NMS_IOU)
    kept &= kept.cumsum(1) <= _KEPT
    return [
        {"boxes": b[k], "scores": s[k], "labels": n[k]}
        for b, s, n, k in zip(boxes, best, labels, kept, strict=True)
    ]


class MeanAveragePrecision:
    """COCO's mean over IoU thresholds from 0.5 to 0.95; see `disco.tasks.Meter`.

    Objects to ignore are COCO's crowds: what lies in them neither counts nor costs. Classes without
    an object in the images do not count.

    Raises:
        InputError: torchmetrics, or COCO's tools, are not installed.
    """

    def __init__(self) -> None:
        self._metric = _torchmetrics_metric()
        self._values: dict[str, float] | None = None

    def update(self, found: Sequence[Mapping[str, Tensor]], targets: Sequence[Any]) -> None:
        """Take what `detect` found and the targets, on any device."""
        wanted = [
            {
                "boxes": target["boxes"].cpu(),
                "labels": target["labels"].cpu(),
                "iscrowd": target["ignored"].cpu().long(),
            }
            for target in targets
        ]
        self._metric.update([{k: v.cpu() for k, v in image.items()} for image in found], wanted)
        self._values = None

    def value(self) -> float:
        """mAP in [0, 1]; 0 if there is no object in any image."""
        return self._computed()["map"]

    def others(self) -> dict[str, float]:
        """mAP where boxes have to overlap by 0.5 of their union, and by 0.75."""
        found = self._computed()
        return {"mAP50": found["map_50"], "mAP75": found["map_75"]}

    def _computed(self) -> dict[str, float]:
        if self._values is None:
            found = self._metric.compute()
            # It says -1 where there is nothing to find.
            self._values = {n: max(0.0, float(found[n])) for n in ("map", "map_50", "map_75")}
        return self._values


def _torchmetrics_metric() -> Any:
    detection = import_torchmetrics("detection")
    backend = next((name for name in _BACKENDS if importlib.util.find_spec(name)), None)
    if backend is None:
        raise InputError(
            "mAP is measured with COCO's tools, which are not installed: `pip install pycocotools`"
        )
    # COCO's own points in float64: torchmetrics' are float32, and a recall of 0.6 is below its 0.6.
    metric = detection.MeanAveragePrecision(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
        backend=backend,
    )
    metric.warn_on_many_detections = False
    return metric
