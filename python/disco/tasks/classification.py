"""Classification: one label an image, cross entropy, top-1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.errors import InputError
from disco.tasks.data import DataOptions, TaskData
from disco.tasks.digits import load_digits
from disco.tasks.image_folder import load_folder
from disco.tasks.options import DistillOptions, LossOptions
from disco.zoo import build_model


class Classification:
    """See `disco.tasks.Task`, whose functions these are.

    Data are ``digits``, ``digits:FILE`` and ``folder:PATH``; models the small ones of
    `disco.small_models` by name, and ``torchvision:NAME`` and ``timm:NAME``.
    """

    name = "classification"
    metric = "top1"

    def load_data(self, data: str, options: DataOptions) -> TaskData:
        """Raises InputError for other data, and for those that cannot be used."""
        kind, _, place = data.partition(":")
        if kind == "digits":
            return load_digits(Path(place) if place else None, options)
        if kind == "folder" and place:
            return load_folder(Path(place), options)
        raise InputError(
            f"the data {data!r} are unknown: give digits, digits:FILE (its digits.csv.gz) or "
            "folder:PATH (a folder of images a class)"
        )

    def build_model(
        self, source: str, name: str, num_classes: int, image_size: int, seed: int
    ) -> nn.Module:
        """With random weights, in `eval()` mode, on the CPU."""
        return build_model(source, name, num_classes=num_classes, image_size=image_size, seed=seed)

    def loss(self, outputs: Any, targets: Any, options: LossOptions) -> Tensor:
        """Cross entropy, of smoothed labels (arXiv 1512.00567, section 7) if so asked.

        Args:
            outputs: logits, [B, classes].
            targets: int64 [B].
            options: of which `label_smoothing` counts.
        """
        logits = _logits(outputs)
        return F.cross_entropy(logits.float(), targets, label_smoothing=options.label_smoothing)

    def distillation(self, outputs: Any, teacher: Any, options: DistillOptions) -> Tensor:
        """How far the outputs are from a teacher's, after Hinton et al. (arXiv 1503.02531).

        The divergence of both softmaxes at a temperature, times its square, so that its gradients
        are as large as the cross entropy's.
        """
        t = options.temperature
        student = F.log_softmax(_logits(outputs).float() / t, 1)
        target = F.log_softmax(_logits(teacher).float() / t, 1)
        return F.kl_div(student, target, reduction="batchmean", log_target=True) * t * t

    def collate(self, targets: Sequence[Any]) -> Tensor:
        """Labels, int64 [B]."""
        return torch.stack(list(targets))

    def new_meter(self, classes: Sequence[str]) -> Top1:
        """The share of right answers."""
        return Top1()


class Top1:
    """The share of images whose largest output is their label's; see `disco.tasks.Meter`."""

    def __init__(self) -> None:
        self._right = self._images = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """Logits [B, classes] and labels int64 [B]. Not a number is never the largest."""
        logits = _logits(outputs)
        found = torch.where(logits.isnan(), -torch.inf, logits).argmax(1)
        right = (found == targets) & ~logits.isnan().all(1)
        self._right += int(right.sum())
        self._images += len(right)

    def value(self) -> float:
        """In [0, 1]."""
        return self._right / self._images


def _logits(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        given = type(outputs).__name__
        kind = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {given}"
        raise InputError(
            f"the model gives {kind} in place of logits [images, classes], so it cannot be trained "
            "to classify: choose a classifier without auxiliary outputs"
        )
    return outputs
