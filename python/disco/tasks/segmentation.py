"""Segmentation: a class for every pixel, cross entropy, mIoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.errors import InputError
from disco.tasks.data import DataOptions, TaskData
from disco.tasks.mask_folders import load_mask_folders, load_voc
from disco.tasks.masks import IGNORED, MaskedImages
from disco.tasks.metric_library import import_torchmetrics
from disco.tasks.options import DistillOptions, LossOptions
from disco.tasks.scene_data import load_scenes
from disco.tasks.scenes import CLASSES, Scenes
from disco.zoo import build_model

# Of the loss of an auxiliary output, as in torchvision's references and PSPNet (arXiv 1612.01105).
_AUXILIARY = 0.4


class Segmentation:
    """See `disco.tasks.Task`, whose functions these are.

    Data are ``scenes``, ``scenes:train=2000,val=5000``, ``voc:PATH`` and ``masks:PATH``; models
    ``deeplab_small``, ``segmenter_small``, and torchvision's segmenters.

    Outputs are logits, float32 [B, classes, h, w] of any resolution, or a dict that holds them as
    "out", and perhaps as "aux" others, which count in the loss alone. They are scaled to the masks'
    size, bilinearly, wherever they meet masks.
    """

    name = "segmentation"
    metric = "mIoU"

    def load_data(self, data: str, options: DataOptions) -> TaskData:
        """Raises InputError for other data, and for those that cannot be used."""
        kind, _, place = data.partition(":")
        if kind == "scenes":
            return _load_scenes(place, options)
        if kind == "voc" and place:
            return load_voc(Path(place), options)
        if kind == "masks" and place:
            return load_mask_folders(Path(place), options)
        raise InputError(
            f"the data {data!r} are unknown: give scenes, scenes:train=2000,val=5000, voc:PATH (a "
            "folder like VOC2012) or masks:PATH (a folder with images/, masks/ and classes.txt)"
        )

    def build_model(
        self, source: str, name: str, num_classes: int, image_size: int, seed: int
    ) -> nn.Module:
        """With random weights, in `eval()` mode, on the CPU."""
        return build_model(source, name, num_classes=num_classes, image_size=image_size, seed=seed)

    def loss(self, outputs: Any, targets: Any, options: LossOptions) -> Tensor:
        """The mean of the cross entropies of all pixels that are not ignored; 0 if all are.

        Args:
            outputs: see the class.
            targets: int64 [B, H, W], with `IGNORED` pixels.
            options: of which `label_smoothing` counts.
        """
        found = _logits(outputs)
        loss = _cross_entropy(found, targets, options)
        if isinstance(outputs, Mapping) and "aux" in outputs:
            auxiliary = _logits({"out": outputs["aux"]})
            loss = loss + _AUXILIARY * _cross_entropy(auxiliary, targets, options)
        return loss

    def distillation(self, outputs: Any, teacher: Any, options: DistillOptions) -> Tensor:
        """How far the outputs are from a teacher's, pixel by pixel (arXiv 1503.02531, 1903.04197).

        The divergence of both softmaxes at a temperature, times its square, the mean over pixels;
        at the teacher's resolution. Auxiliary outputs do not count.
        """
        t = options.temperature
        taught = _logits(teacher).float()
        student = F.log_softmax(_scaled(_logits(outputs).float(), taught.shape[-2:]) / t, 1)
        target = F.log_softmax(taught / t, 1)
        pixels = len(taught) * taught.shape[2] * taught.shape[3]
        return F.kl_div(student, target, reduction="sum", log_target=True) * (t * t / pixels)

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Masks, int64 [B, H, W]."""
        return torch.stack(list(targets)).long()

    def new_meter(self, classes: Sequence[str]) -> MeanIoU:
        """Raises InputError without TorchMetrics."""
        return MeanIoU(len(classes))


class MeanIoU:
    """The mean over classes of intersection over union; see `disco.tasks.Meter`.

    Pixels of all images are counted together, ignored ones left out. As TorchMetrics has it, the
    mean is over the classes that are in a mask or were found anywhere.

    Args:
        num_classes: with the background.
    """

    def __init__(self, num_classes: int) -> None:
        jaccard = import_torchmetrics("classification").MulticlassJaccardIndex
        self._classes = num_classes
        # Masks were checked when they were read.
        self._index = jaccard(num_classes, ignore_index=IGNORED, validate_args=False)

    def update(self, outputs: Any, targets: Any) -> None:
        """Outputs as `Segmentation` has them, masks int64 [B, H, W]. NaN is never right."""
        logits = _scaled(_logits(outputs).float(), targets.shape[-2:])
        lost = logits.isnan()
        found = torch.where(lost, -torch.inf, logits).argmax(1)
        # Where all are lost, any class but the right one.
        found = torch.where(lost.all(1), (targets + 1) % self._classes, found)
        self._index.update(found.cpu(), targets.cpu())

    def value(self) -> float:
        """In [0, 1]. Raises InputError if every pixel was ignored."""
        value = float(self._index.compute())
        if value != value:
            raise InputError(
                f"every pixel of the masks is {IGNORED}, which is ignored: give masks with classes"
            )
        return value


def _load_scenes(place: str, options: DataOptions) -> TaskData:
    made = load_scenes(place, options)

    def part(scenes: Scenes, augment: bool) -> MaskedImages:
        images, masks = torch.from_numpy(scenes.images), torch.from_numpy(scenes.masks)
        return MaskedImages(images, masks, made.preprocessing, augment)

    train, val = part(made.train, options.augment), part(made.val, augment=False)
    return TaskData(train, val, CLASSES, made.preprocessing, made.text)


def _cross_entropy(logits: Tensor, masks: Tensor, options: LossOptions) -> Tensor:
    total = F.cross_entropy(
        _scaled(logits.float(), masks.shape[-2:]),
        masks,
        ignore_index=IGNORED,
        label_smoothing=options.label_smoothing,
        reduction="sum",
    )
    return total / (masks != IGNORED).sum().clamp(min=1)


def _scaled(logits: Tensor, size: Sequence[int]) -> Tensor:
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)


def _logits(outputs: Any) -> Tensor:
    found = outputs.get("out") if isinstance(outputs, Mapping) else outputs
    if not isinstance(found, Tensor) or found.dim() != 4:
        kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else _kind(outputs)
        raise InputError(
            f"the model gives {kind} in place of logits [images, classes, height, width], so it "
            "cannot be trained to segment: choose a segmenter"
        )
    return found


def _kind(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"a dict of {', '.join(map(repr, outputs)) or 'nothing'}"
    return f"a {type(outputs).__name__}"
