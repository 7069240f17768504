"""Super-resolution: an image twice, three or four times as large; L1, PSNR of the luminance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.errors import InputError
from disco.tasks.data import DataOptions, TaskData
from disco.tasks.fidelity import Fidelity
from disco.tasks.options import DistillOptions, LossOptions
from disco.tasks.patches import Target
from disco.tasks.photograph_patches import load_photos, load_shipped, patch_options
from disco.zoo import build_model

_OPTIONS = re.compile(r"(?P<place>.*?)(:(?P<options>[a-z]+=[^:/]*))?")


class SuperResolution:
    """See `disco.tasks.Task`, whose functions these are.

    Data are ``photographs`` (those that packages ship) and ``photos:PATH`` (a folder), each with
    options behind a colon: ``photographs:scale=3``, ``photos:PATH:scale=4,train=4000``. Models are
    those of `disco.small_models` whose name ends in the scale: ``edsr_small_x2``. Inputs and
    outputs are images in [0, 1].
    """

    name = "super-resolution"
    metric = "psnr"

    def load_data(self, data: str, options: DataOptions) -> TaskData:
        """Raises InputError for other data, and for those that cannot be used."""
        kind, _, rest = data.partition(":")
        if kind == "photographs":
            return load_shipped(patch_options(rest), options)
        found = _OPTIONS.fullmatch(rest)
        if kind == "photos" and found is not None and found["place"]:
            return load_photos(Path(found["place"]), patch_options(found["options"] or ""), options)
        raise InputError(
            f"the data {data!r} are unknown: give photographs, photographs:scale=4 or photos:PATH "
            "(a folder of photographs), photos:PATH:scale=4"
        )

    def build_model(
        self, source: str, name: str, num_classes: int, image_size: int, seed: int
    ) -> nn.Module:
        """With random weights, in `eval()` mode, on the CPU."""
        return build_model(source, name, num_classes=num_classes, image_size=image_size, seed=seed)

    def loss(self, outputs: Any, targets: Any, options: LossOptions) -> Tensor:
        """The mean absolute error, with which Lim et al. (arXiv 1707.02921) train.

        Args:
            outputs: images, [B, 3, h, w].
            targets: a `Target` of a batch.
            options: there are no labels to smooth. Raises InputError if that is asked for.
        """
        if options.label_smoothing:
            raise InputError(
                f"a label smoothing of {options.label_smoothing:g} was given, and super-resolution "
                "has no labels: leave it out"
            )
        return F.l1_loss(_images(outputs, targets.high).float(), targets.high)

    def distillation(self, outputs: Any, teacher: Any, options: DistillOptions) -> Tensor:
        """The mean absolute difference from a teacher's images, which knows no temperature."""
        return F.l1_loss(_images(outputs, teacher).float(), teacher.float())

    def collate(self, targets: Sequence[Any]) -> Target:
        """The patches and numbers of a batch, in one `Target`."""
        high, photographs, scales = zip(*targets, strict=True)
        return Target(torch.stack(high), torch.stack(photographs), scales[0])

    def new_meter(self, classes: Sequence[str]) -> Luminance:
        """PSNR in dB, and SSIM. Raises InputError if torchmetrics is not installed."""
        return Luminance()


class Luminance:
    """PSNR of the luminance, the mean over the photographs; see `disco.tasks.Meter`.

    As is usual, images are clipped to [0, 1] and rounded to 8 bits, and a border as wide as the
    scale is left out. The patches of a photograph count as one image.
    """

    def __init__(self) -> None:
        self._fidelity = Fidelity()

    def update(self, outputs: Any, targets: Any) -> None:
        """Images [B, 3, h, w] and a `Target`. Not a number is as wrong as can be."""
        found = _images(outputs, targets.high).float()
        worst = 1 - targets.high.round()
        found = torch.where(found.isnan(), worst, found).clamp(0, 1).mul(255).round().div(255)
        border = slice(targets.scale, -targets.scale)
        measured, wanted = (
            luminance(images)[..., border, border].cpu() for images in (found, targets.high)
        )
        self._fidelity.update(measured, wanted, targets.photograph.cpu())

    def value(self) -> float:
        """In dB."""
        return self._fidelity.psnr()

    def others(self) -> dict[str, float]:
        """SSIM of the luminance."""
        return {"ssim": self._fidelity.ssim()}


def luminance(images: Tensor) -> Tensor:
    """ITU-R BT.601's, of 16 to 235 by 255, as MATLAB's rgb2ycbcr gives it.

    Args:
        images: red, green and blue in [0, 1], [B, 3, h, w].

    Returns:
        [B, 1, h, w].
    """
    weights = torch.tensor((65.481, 128.553, 24.966), dtype=images.dtype, device=images.device)
    return ((images * weights[:, None, None]).sum(1, keepdim=True) + 16) / 255


def bicubic(scale: int) -> Callable[[Tensor], Tensor]:
    """What to compare with: enlarges inputs by Pillow's bicubic kernel (a = -0.5), untrained."""
    return lambda inputs: F.interpolate(
        inputs, scale_factor=float(scale), mode="bicubic", align_corners=False, antialias=True
    )


def _images(outputs: Any, wanted: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.shape != wanted.shape:
        given = type(outputs).__name__
        kind = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {given}"
        raise InputError(
            f"the model gives {kind}, and images of shape {tuple(wanted.shape)} are wanted: choose "
            "a model that enlarges by the scale of the data, edsr_small_x2 for photographs:scale=2"
        )
    return outputs
