"""The small models by name, and names of the same models at other widths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from disco.errors import InputError
from disco.small_models.backbones import SmallDeiT, SmallResNet
from disco.small_models.detectors import SmallSSD, SmallViTSSD
from disco.small_models.segmenters import SmallDeepLab, SmallSegmenter
from disco.small_models.super_resolution import EDSR, SRResNet, SRTransformer


@dataclass(frozen=True)
class SmallModel:
    """How to make a model.

    Attributes:
        make: from the number of classes, the side of the images in pixels, and the width.
        width: the usual one: channels of the first stage, or of a token.
        step: widths are multiples of it.
    """

    make: Callable[[int, int, int], nn.Module]
    width: int
    step: int = 1


def _resnet(blocks: int, width: int) -> SmallModel:
    return SmallModel(lambda classes, size, width: SmallResNet(classes, blocks, width), width)


def _deit(width: int, depth: int, heads: int) -> SmallModel:
    return SmallModel(
        lambda classes, size, width: SmallDeiT(classes, size, width, depth, heads), width, heads
    )


def _ssd(blocks: int, width: int) -> SmallModel:
    return SmallModel(lambda classes, size, width: SmallSSD(classes, size, blocks, width), width)


def _vit_ssd(width: int, depth: int, heads: int) -> SmallModel:
    return SmallModel(
        lambda classes, size, width: SmallViTSSD(classes, size, width, depth, heads), width, heads
    )


def _deeplab(blocks: int, width: int) -> SmallModel:
    return SmallModel(lambda classes, size, width: SmallDeepLab(classes, blocks, width), width)


def _segmenter(width: int, depth: int, heads: int) -> SmallModel:
    return SmallModel(
        lambda classes, size, width: SmallSegmenter(classes, size, width, depth, heads),
        width,
        heads,
    )


# By the scale. Outputs are the three colours, whatever the number of classes.
_ENLARGING: Mapping[str, Callable[[int], SmallModel]] = {
    "edsr_small": lambda scale: SmallModel(lambda c, s, w: EDSR(scale, w, 2, small=True), 40),
    "srresnet_small": lambda scale: SmallModel(
        lambda c, s, w: SRResNet(scale, w, 2, small=True), 40
    ),
    "sr_transformer_small": lambda scale: SmallModel(
        lambda c, s, w: SRTransformer(scale, s, w, depth=3, heads=4), 80, 4
    ),
    # The papers' sizes: EDSR's baseline, and SRResNet.
    "edsr": lambda scale: SmallModel(lambda c, s, w: EDSR(scale, w, 16), 64),
    "srresnet": lambda scale: SmallModel(lambda c, s, w: SRResNet(scale, w, 16), 64),
}
SMALL_MODELS: Mapping[str, SmallModel] = {
    "resnet8_thin": _resnet(blocks=1, width=8),
    "resnet8": _resnet(blocks=1, width=16),
    "resnet14": _resnet(blocks=2, width=16),
    "resnet20": _resnet(blocks=3, width=16),
    "deit_micro": _deit(width=64, depth=4, heads=4),
    "deit_mini": _deit(width=128, depth=6, heads=4),
    "ssd_small": _ssd(blocks=1, width=24),
    "vit_ssd_small": _vit_ssd(width=64, depth=3, heads=8),
    "deeplab_small": _deeplab(blocks=1, width=16),
    "segmenter_small": _segmenter(width=64, depth=4, heads=4),
    **{f"{name}_x{scale}": make(scale) for name, make in _ENLARGING.items() for scale in (2, 3, 4)},
}
_WITH_WIDTH = re.compile(r"(?P<name>.+)-w(?P<width>[0-9]{1,5})")


def base_name(name: str) -> str:
    """The model's name without its width."""
    found = _WITH_WIDTH.fullmatch(name)
    return name if found is None else found["name"]


def small_model(name: str) -> Callable[[int, int], nn.Module]:
    """A model's maker, from the number of classes and the side of the images in pixels.

    Args:
        name: one of `SMALL_MODELS`, or one with another width: ``resnet8-w12``.

    Raises:
        InputError: a width that the model cannot have.
    """
    found = _WITH_WIDTH.fullmatch(name)
    base = SMALL_MODELS[base_name(name)]
    width = base.width if found is None else int(found["width"])
    if width < 1 or width % base.step:
        raise InputError(
            f"{name}: a width of {width} was given; it has to be a multiple of {base.step}, at "
            f"least {base.step}"
        )
    return lambda classes, size: base.make(classes, size, width)
