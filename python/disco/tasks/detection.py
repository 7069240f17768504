"""Detection: boxes and classes of objects, SSD's loss, COCO's mAP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.detector_heads import SUFFIX as HEADS
from disco.errors import InputError
from disco.tasks.annotated import scene_boxes
from disco.tasks.boxes import encode, match, padded
from disco.tasks.coco_boxes import load_coco
from disco.tasks.data import DataOptions, TaskData
from disco.tasks.mean_average_precision import MeanAveragePrecision, detect
from disco.tasks.options import DistillOptions, LossOptions
from disco.tasks.scene_data import load_scenes
from disco.tasks.scenes import CLASSES
from disco.tasks.voc_boxes import load_voc
from disco.zoo import build_model

# Background anchors that are learnt, for each one of an object: SSD, section 2.2.
_NEGATIVES = 3


class Detection:
    """See `disco.tasks.Task`, whose functions these are.

    Data are ``scenes``, ``coco:PATH`` and ``voc:PATH``; models the small ones and torchvision's
    SSDs. A model's outputs are class logits, float32 [B, A, 1 + classes] with the background first,
    offsets of boxes from anchors, [B, A, 4], and the anchors, [A, 4], in pixels of the input: what
    it learns and how it is read needs nothing else, on one machine or on nodes. A target is a dict
    with "boxes" float32 [n, 4] (x1, y1, x2, y2 in pixels of the input), "labels" int64 [n] and
    "ignored" bool [n].
    """

    name = "detection"
    metric = "mAP"

    def load_data(self, data: str, options: DataOptions) -> TaskData:
        """Raises InputError for other data, and for those that cannot be used."""
        kind, _, place = data.partition(":")
        if kind == "scenes":
            made = load_scenes(place, options)
            return TaskData(
                scene_boxes(made.train, made.preprocessing, options.augment),
                scene_boxes(made.val, made.preprocessing, augment=False),
                CLASSES[1:],
                made.preprocessing,
                made.text,
            )
        if kind in _FILES and place:
            return _FILES[kind](Path(place), options)
        raise InputError(
            f"the data {data!r} are unknown: give scenes, coco:PATH (a folder with annotations/ "
            "and images) or voc:PATH (a folder such as VOCdevkit/VOC2012)"
        )

    def build_model(
        self, source: str, name: str, num_classes: int, image_size: int, seed: int
    ) -> nn.Module:
        """With random weights, in `eval()` mode, on the CPU.

        Raises InputError for a whole detector, which hides what is learnt from.
        """
        model = build_model(source, name, num_classes=num_classes, image_size=image_size, seed=seed)
        if hasattr(model, "anchor_generator"):
            raise InputError(
                f"{source}:{name} is a whole detector, suppression included: give its network, "
                f"{source}:{name}{HEADS}"
            )
        return model

    def loss(self, outputs: Any, targets: Any, options: LossOptions) -> Tensor:
        """SSD's (arXiv 1512.02325, section 2.2), over the anchors of objects in the batch.

        Cross entropy of the classes, of these anchors and of the background's that are taken most
        surely for something else, three for each of an object in the image; and a smooth L1
        distance of the offsets.

        Args:
            outputs: see `Detection`.
            targets: a list of dicts.
            options: of which `label_smoothing` counts.
        """
        logits, offsets, anchors = _outputs(outputs)
        boxes, labels, there = padded(targets)
        which = match(boxes, there, anchors)
        of_object = which >= 0
        which = which.clamp(min=0)
        classes = torch.where(of_object, labels.gather(1, which) + 1, 0)
        errors = F.cross_entropy(
            logits.flatten(0, 1).float(),
            classes.flatten(),
            reduction="none",
            label_smoothing=options.label_smoothing,
        ).unflatten(0, classes.shape)
        image, anchor = of_object.nonzero(as_tuple=True)
        wanted = encode(boxes[image, which[image, anchor]], anchors[anchor])
        distance = F.smooth_l1_loss(offsets[image, anchor].float(), wanted, reduction="sum")
        learnt = errors[of_object].sum() + _hardest(errors, of_object).sum()
        return (learnt + distance) / max(1, len(image))

    def distillation(self, outputs: Any, teacher: Any, options: DistillOptions) -> Tensor:
        """How far the outputs are from a teacher's, over the anchors where it sees an object.

        The divergence of the classes of all anchors (see `Classification.distillation`), and a
        smooth L1 distance of the offsets where the teacher's likeliest class is no background.
        """
        logits, offsets, _ = _outputs(outputs)
        taught, taught_offsets, _ = _outputs(teacher)
        t = options.temperature
        student = F.log_softmax(logits.float() / t, -1)
        target = F.log_softmax(taught.float() / t, -1)
        divergence = F.kl_div(student, target, reduction="sum", log_target=True) * t * t
        seen = taught.argmax(-1) > 0
        distance = F.smooth_l1_loss(
            offsets[seen].float(), taught_offsets[seen].float(), reduction="sum"
        )
        return (divergence + distance) / seen.sum().clamp(min=1)

    def collate(self, targets: Sequence[Any]) -> list[Any]:
        """A list of the images' dicts."""
        return list(targets)

    def new_meter(self, classes: Sequence[str]) -> DetectionMeter:
        """COCO's mAP."""
        return DetectionMeter()


class DetectionMeter(MeanAveragePrecision):
    """mAP of a model's outputs; see `disco.tasks.Meter`."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Outputs as `Detection` has them, and a list of targets."""
        super().update(detect(*_outputs(outputs)), targets)


_FILES = {"coco": load_coco, "voc": load_voc}


def _hardest(errors: Tensor, of_object: Tensor) -> Tensor:
    """Errors of the background's anchors with the largest ones, [chosen].

    Args:
        errors: float32 [B, A].
        of_object: bool [B, A].
    """
    counts = (_NEGATIVES * of_object.sum(1)).clamp(max=errors.shape[1])
    largest, place = errors.detach().masked_fill(of_object, -1.0).topk(int(counts.max()), 1)
    chosen = torch.arange(place.shape[1], device=place.device) < counts[:, None]
    return errors.gather(1, place)[chosen & (largest >= 0)]


def _outputs(outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(outputs, (tuple, list)) and len(outputs) == 3:
        logits, offsets, anchors = outputs
        if all(isinstance(part, Tensor) for part in outputs) and (
            logits.dim() == 3
            and logits.shape[2] > 1
            and offsets.shape == (*logits.shape[:2], 4)
            and anchors.shape == (logits.shape[1], 4)
        ):
            return logits, offsets, anchors
    raise InputError(
        f"the model gives {_described(outputs)} in place of class logits [images, anchors, 1 + "
        "classes], offsets [images, anchors, 4] and anchors [anchors, 4], so it cannot be trained "
        "to detect: choose ssd_small, vit_ssd_small or an SSD of torchvision, for example "
        "torchvision:ssd300_vgg16:heads"
    )


def _described(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"shape {tuple(outputs.shape)}"
    if isinstance(outputs, (tuple, list)):
        return f"{type(outputs).__name__} of {len(outputs)} outputs"
    if isinstance(outputs, Mapping):
        return f"a dict with {', '.join(map(str, outputs))}"
    return f"a {type(outputs).__name__}"
