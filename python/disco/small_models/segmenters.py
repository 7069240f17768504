"""Small networks that give a class for every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.small_models.backbones import DeiTBackbone, ResNetBackbone


class _ConvNorm(nn.Module):
    """A convolution that keeps the resolution, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: windows of several widths, and the whole map."""

    def __init__(self, inputs: int, outputs: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_ConvNorm(inputs, outputs, 1)] + [_ConvNorm(inputs, outputs, 3, d) for d in dilations]
        )
        self.pooled = nn.Conv2d(inputs, outputs, 1)
        self.project = _ConvNorm(outputs * (2 + len(dilations)), outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.relu(self.pooled(x.mean((2, 3), keepdim=True)))
        maps = [branch(x) for branch in self.branches]
        maps.append(whole.expand(-1, -1, x.shape[2], x.shape[3]))
        return self.project(torch.cat(maps, 1))


class SmallDeepLab(nn.Module):
    """DeepLabV3's pyramid (arXiv 1706.05587) with the decoder of DeepLabV3+ (arXiv 1802.02611).

    The pyramid reads the backbone's last map, at an eighth of the resolution; its result is brought
    to half of the resolution and goes on with the first map.

    Args:
        num_classes: outputs.
        blocks, width: of the backbone; pyramid and decoder have twice its width.

    Input: float32 [B, 3, H, W] of any size. Output: logits, float32 [B, num_classes, H/2, W/2].
    """

    def __init__(self, num_classes: int, blocks: int, width: int) -> None:
        super().__init__()
        self.backbone = ResNetBackbone(blocks, width, stem_stride=2)
        fine, _, coarse = self.backbone.channels
        self.pyramid = _Pyramid(coarse, 2 * width, (1, 2, 4))
        self.decoder = _ConvNorm(2 * width + fine, 2 * width, 3)
        self.classifier = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine, _, coarse = self.backbone.maps(x)
        found = F.interpolate(
            self.pyramid(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False
        )
        return self.classifier(self.decoder(torch.cat((found, fine), 1)))


class SmallSegmenter(nn.Module):
    """A transformer with Segmenter's linear decoder (arXiv 2105.05633, section 3.1).

    Patches are few and large here, so a patch's token gives logits for a grid of points in it.

    Args:
        num_classes: outputs.
        image_size, dim, depth, heads: of the backbone.

    Input: float32 [B, 3, image_size, image_size]. Output: logits, float32
    [B, num_classes, points, points], `fine` points a patch and side.
    """

    fine = 4

    def __init__(self, num_classes: int, image_size: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.backbone = DeiTBackbone(image_size, dim, depth, heads)
        self.head = nn.Linear(dim, num_classes * self.fine**2)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.head(self.backbone(x)[:, 1:])
        grid = self.backbone.grid
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (grid, grid)), self.fine)
