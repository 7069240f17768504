"""The part of torchvision's SSDs that is a network: backbone and heads, without what follows."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from disco.errors import InputError

# After a detector's name in the zoo: "ssd300_vgg16:heads".
SUFFIX = ":heads"


class DetectorHeads(nn.Module):
    """Backbone and heads of an SSD (arXiv 1512.02325) of torchvision, for one size of images.

    It has the detector's state dict, and takes images that are scaled and normalised already; what
    depends on the data is left out, so it can be captured, trained and partitioned.

    Args:
        detector: made by torchvision.
        image_size: side of the square images in pixels.

    Input: float32 [B, 3, image_size, image_size]. Output: class logits [B, A, 1 + classes], the
    background first, box offsets [B, A, 4], and the anchors [A, 4], x1, y1, x2, y2 in pixels.

    Raises:
        InputError: no SSD, or a size that it cannot be used at.
    """

    anchors: Tensor

    def __init__(self, detector: nn.Module, image_size: int) -> None:
        super().__init__()
        ssd = importlib.import_module("torchvision.models.detection.ssd").SSD
        if not isinstance(detector, ssd):
            raise InputError(
                f"the heads of {type(detector).__name__} do not have SSD's form: give "
                f"ssd300_vgg16{SUFFIX} or ssdlite320_mobilenet_v3_large{SUFFIX}"
            )
        self.backbone, self.head = detector.backbone, detector.head
        lists = importlib.import_module("torchvision.models.detection.image_list")
        images = torch.zeros(1, 3, image_size, image_size)
        try:
            with torch.no_grad():
                maps = list(self.backbone.eval()(images).values())
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{type(detector).__name__} cannot be used on images of {image_size} x "
                f"{image_size} pixels ({reason}): give another --image-size, for example 320"
            ) from error
        made = detector.anchor_generator(lists.ImageList(images, [(image_size, image_size)]), maps)
        self.register_buffer("anchors", made[0], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.head(list(self.backbone(x).values()))
        return found["cls_logits"], found["bbox_regression"], self.anchors
