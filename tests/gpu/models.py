"""A small network and ResNet-18, cut for two nodes, with float64 to compare with."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import disco
from disco.zoo import build_model

SIZE = 64
NODES = 2
DENSITY = 0.2
GROUP = 8


class Small(nn.Module):
    """Convolutions with strides and a residual, tokens with a layer norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 80, 3, 2, 1)
        self.body = nn.Conv2d(80, 80, 3, 1, 1)
        self.narrow = nn.Conv2d(80, 96, 1, 2)
        self.norm = nn.LayerNorm(96)
        self.mix = nn.Linear(96, 160)
        self.head = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        tokens = self.norm(self.narrow(x).flatten(2).transpose(1, 2))
        return self.head(torch.relu(self.mix(tokens)).mean(1))


@cache
def sparse(name: str) -> nn.Module:
    """ "small" or a model of torchvision, with the pattern of two nodes."""
    if name == "small":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = Small().eval()
    else:
        model = build_model("torchvision", name)
    disco.sparsify_(model, NODES, DENSITY, (images(2),), group_size=GROUP)
    return model


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double().cpu() - exact).norm() / exact.norm())
