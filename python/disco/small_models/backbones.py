"""Residual networks as He et al. (arXiv 1512.03385, section 4.2) made them for CIFAR-10, and a
small vision transformer (that of DeiT, arXiv 2012.12877, without the distillation token).

Each is a backbone, which gives maps or tokens, and a classifier on top of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.errors import InputError


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a 1 x 1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNetBackbone(nn.Module):
    """Three stages of residual blocks, `width`, 2 and 4 times as wide, of halved resolution.

    Args:
        blocks: of each stage; the network has 6 x blocks + 1 layers on its longest path.
        width: channels of the first stage.
        stem_stride: of the first convolution, 1 or 2.

    Input: float32 [B, 3, H, W] of any size. Output: the stages' maps, float32 [B, width, h, w],
    [B, 2 width, h/2, w/2] and [B, 4 width, h/4, w/4], where h is H / stem_stride.
    """

    def __init__(self, blocks: int, width: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.blocks, self.channels = blocks, (width, 2 * width, 4 * width)
        self.conv = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            outputs = width << stage
            for block in range(blocks):
                stages.append(_Block(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of the three stages."""
        x = torch.relu(self.bn(self.conv(x)))
        first = self.stages[: self.blocks](x)
        second = self.stages[self.blocks : 2 * self.blocks](first)
        return first, second, self.stages[2 * self.blocks :](second)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.maps(x)


class SmallResNet(nn.Module):
    """A backbone, the mean over pixels, and a linear layer.

    Args:
        num_classes: outputs.
        blocks, width: of the backbone.

    Input: float32 [B, 3, H, W] of any size. Output: logits, float32 [B, num_classes].
    """

    def __init__(self, num_classes: int, blocks: int, width: int) -> None:
        super().__init__()
        self.backbone = ResNetBackbone(blocks, width)
        self.fc = nn.Linear(self.backbone.channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone.maps(x)[-1].mean((2, 3)))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class _EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DeiTBackbone(nn.Module):
    """A vision transformer over a grid of 8 x 8 patches (4 x 4 for 8 pixels) and a class token.

    Args:
        image_size: side of the square images in pixels, a multiple of 8.
        dim: channels of a token.
        depth, heads: of the encoder.

    Input: float32 [B, 3, image_size, image_size]. Output: normalised tokens, float32
    [B, 1 + grid^2, dim]: that of the class, then the patches' by row.
    """

    def __init__(self, image_size: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        if image_size % 8:
            raise InputError(
                "this model cuts images into a grid of patches, so their size has to be a multiple "
                f"of 8 pixels; given {image_size}"
            )
        # A patch of one pixel says too little: 8 x 8 digits are not learnt from such.
        patch = max(2, image_size // 8)
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.grid = image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2 + 1, dim))
        self.layers = nn.Sequential(*(_EncoderLayer(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        # DeiT's deviation of 0.02 for weights and positions suits wide models and long trainings.
        # Ten epochs of the digits (AdamW, 0.002, batches of 32) reach top-1 0.34 with it; with
        # Xavier's weights 0.68, and then with positions of 0.2 0.91, of 0.5 0.95.
        nn.init.trunc_normal_(self.pos_embed, std=0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        return self.norm(self.layers(x))


class SmallDeiT(nn.Module):
    """A backbone, and a linear layer on the class token.

    Args:
        num_classes: outputs.
        image_size, dim, depth, heads: of the backbone.

    Input: float32 [B, 3, image_size, image_size]. Output: logits, float32 [B, num_classes].
    """

    def __init__(self, num_classes: int, image_size: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.backbone = DeiTBackbone(image_size, dim, depth, heads)
        self.head = nn.Linear(dim, num_classes)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[:, 0])
