"""Networks that enlarge images, with the sub-pixel convolution of Shi et al. (arXiv 1609.05158).

All take images in [0, 1] and add what they learnt to the bicubic enlargement, so they begin near
to it. Outputs lie around [0, 1]; nothing is clipped here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.small_models.backbones import DeiTBackbone

COLOURS = 3
# Of photographs, about. Inputs are centred by it.
_MEAN = 0.5


def enlarged(x: Tensor, scale: int) -> Tensor:
    """Float32 [B, C, H, W] to [B, C, scale H, scale W], bicubic."""
    return F.interpolate(x, scale_factor=float(scale), mode="bicubic", align_corners=False)


class _Block(nn.Module):
    """EDSR's: two 3 x 3 convolutions without batch norm, scaled, and a shortcut."""

    def __init__(self, width: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(x)))
        # Without a multiplication in between, the sum is part of the captured convolution.
        return x + (y if self.residual_scale == 1 else y * self.residual_scale)


class _NormBlock(nn.Module):
    """SRResNet's: two 3 x 3 convolutions with batch norm, PReLU between them, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))


def _subpixel(width: int, scale: int) -> nn.Sequential:
    """Colours at once: one convolution at the low resolution."""
    conv = nn.Conv2d(width, COLOURS * scale**2, 3, padding=1)
    _begin_small(conv)
    return nn.Sequential(conv, nn.PixelShuffle(scale))


def _upsampler(width: int, scale: int, kernel: int, prelu: bool) -> nn.Sequential:
    """Feature maps first, a scale of 4 in two steps, then a convolution at the high resolution."""
    layers: list[nn.Module] = []
    for step in (2, 2) if scale == 4 else (scale,):
        layers += [nn.Conv2d(width, width * step**2, 3, padding=1), nn.PixelShuffle(step)]
        if prelu:
            layers.append(nn.PReLU(width))
    conv = nn.Conv2d(width, COLOURS, kernel, padding=kernel // 2)
    _begin_small(conv)
    return nn.Sequential(*layers, conv)


def _begin_small(layer: nn.Conv2d | nn.Linear) -> None:
    """What is added by a layer begins small against an image's deviation, some 0.25."""
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight *= 0.1
        layer.bias.zero_()


class EDSR(nn.Module):
    """After Lim et al. (arXiv 1707.02921), with the bicubic enlargement added.

    Args:
        scale: 2, 3 or 4.
        width: channels.
        blocks: residual blocks.
        residual_scale: what a block adds is multiplied by it: 0.1 there for 256 channels, 1 for 64.
        small: colours come out of a convolution at the low resolution, which spares most of the
            work that is not in the blocks; if not, out of EDSR's upsampler.

    Input: float32 [B, 3, H, W] in [0, 1], of any size. Output: float32 [B, 3, scale H, scale W].
    """

    def __init__(
        self, scale: int, width: int, blocks: int, residual_scale: float = 1.0, small: bool = False
    ) -> None:
        super().__init__()
        self.scale = scale
        self.head = nn.Conv2d(COLOURS, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width, residual_scale) for _ in range(blocks)))
        self.body = nn.Identity() if small else nn.Conv2d(width, width, 3, padding=1)
        self.tail = _subpixel(width, scale) if small else _upsampler(width, scale, 3, prelu=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(x - _MEAN)
        features = self.body(self.blocks(first)) + first
        return enlarged(x, self.scale) + self.tail(features)


class SRResNet(nn.Module):
    """After Ledig et al. (arXiv 1609.04802), with the bicubic enlargement added.

    Args:
        scale: 2, 3 or 4.
        width: channels.
        blocks: residual blocks.
        small: 3 x 3 windows at both ends in place of 9 x 9, and the short end of `EDSR`.

    Input: float32 [B, 3, H, W] in [0, 1], of any size. Output: float32 [B, 3, scale H, scale W].
    """

    def __init__(self, scale: int, width: int, blocks: int, small: bool = False) -> None:
        super().__init__()
        self.scale = scale
        kernel = 3 if small else 9
        self.head = nn.Conv2d(COLOURS, width, kernel, padding=kernel // 2)
        self.prelu = nn.PReLU(width)
        self.blocks = nn.Sequential(*(_NormBlock(width) for _ in range(blocks)))
        self.body = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.tail = _subpixel(width, scale) if small else _upsampler(width, scale, kernel, True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.prelu(self.head(x - _MEAN))
        features = self.bn(self.body(self.blocks(first))) + first
        return enlarged(x, self.scale) + self.tail(features)


class SRTransformer(nn.Module):
    """A vision transformer between two convolutions, as in SwinIR (arXiv 2108.10257, figure 2).

    The first convolution sees single pixels and the transformer whole patches. What a token says of
    its patch is added to the first one's features, pixel by pixel; two more convolutions follow.
    Without them, patches of 3 x 3 pixels gained 0.05 dB over the enlargement where this gains 0.9.

    Args:
        scale: 2, 3 or 4.
        image_size, dim, depth, heads: of the backbone. Features have half as many channels.

    Input: float32 [B, 3, image_size, image_size] in [0, 1]. Output: float32 [B, 3, scale x
    image_size, scale x image_size].
    """

    def __init__(self, scale: int, image_size: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.scale, width = scale, dim // 2
        self.backbone = DeiTBackbone(image_size, dim, depth, heads)
        self.patch = image_size // self.backbone.grid
        self.head = nn.Conv2d(COLOURS, width, 3, padding=1)
        self.spread = nn.Linear(dim, width * self.patch**2)
        _begin_small(self.spread)  # or it would drown what the pixels say
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.tail = _subpixel(width, scale)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - _MEAN
        tokens = self.spread(self.backbone(centred)[:, 1:])
        grid = self.backbone.grid
        maps = tokens.transpose(1, 2).reshape(x.shape[0], tokens.shape[2], grid, grid)
        features = self.head(centred) + F.pixel_shuffle(maps, self.patch)
        return enlarged(x, self.scale) + self.tail(torch.relu(self.conv(torch.relu(features))))
