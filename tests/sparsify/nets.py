"""Small models that a loop can train in milliseconds, and that loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import floor
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import disco
from disco import Cluster
from disco.sparsify import find_groups
from disco.sparsify.groups import Group
from disco_kernels import Pattern

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


class Small(nn.Module):
    """`a`'s result is read by `b` and `c`; batch norm, dropout and a residual; `d` has zeros at
    first, as heads often do."""

    def __init__(self, width: int = 15, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, 12, 3, padding=1)
        self.c = nn.Conv2d(width, 12, 1)
        self.drop = nn.Dropout(0.1)
        self.d = nn.Linear(12, 7)
        nn.init.zeros_(self.d.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        return self.d(self.drop(torch.relu(self.b(x) + self.c(x)).mean((2, 3))))


EXAMPLE = (torch.zeros(2, 3, 6, 6),)
READERS = ("b", "c", "d")


def random_net(seed: int) -> nn.Module:
    """A few convolutions of random widths, kernels and norms, and a classifier."""
    choice = random.Random(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(choice.randint(2, 4)):
        width, kernel = choice.randint(2, 23), choice.choice((1, 3))
        layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2)]
        layers += [nn.BatchNorm2d(width)] * choice.randint(0, 1) + [nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True
    )


_found: dict[str, list[Group]] = {}


def _find_once(model: nn.Module, cluster: Cluster, density: float, *args: Any, **kw: Any) -> Any:
    """What is exchanged depends on shapes only, and capturing takes most of a test's time."""
    key = f"{model} {next(model.parameters()).dtype} {cluster} {density}"
    if key not in _found:
        _found[key] = find_groups(model, cluster, density, *args, **kw)
    return _found[key]


def attached(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> disco.Sparsifier:
    sparsifier = disco.Sparsifier(**{"end_step": 6, **options})
    with mock.patch("disco.sparsify.sparsifier.find_groups", _find_once):
        sparsifier.attach(model, EXAMPLE, optimizer)
    return sparsifier


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsifier: disco.Sparsifier,
    steps: range,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Batches and dropout are those of the step's number, however often training was resumed."""
    model.train()
    device = next(model.parameters()).device
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)
        x = torch.randn(8, 3, 6, 6, generator=generator)
        target = torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        loss = (
            nn.functional.cross_entropy(model(x.to(device)), target.to(device))
            + sparsifier.penalty()
        )
        loss.backward()
        optimizer.step()
        sparsifier.step()
        after(step)


def budget(density: float, owned: int) -> int:
    return floor(density * owned + 1e-9)


def check_zeros(model: nn.Module, pattern: Pattern) -> int:
    """Fail unless each remote column is selected or exactly zero, with a positive sign; the
    number of zero columns."""
    zeros = 0
    for name, layer in pattern.layers.items():
        weight = model.get_submodule(name).weight.detach()
        for i, rows in enumerate(layer.out_ownership.channels):
            for j, owned in enumerate(layer.in_ownership.channels):
                for channel in set(owned) - set(layer.selected[i][j]):
                    if i != j and rows:
                        column = weight[list(rows), channel]
                        assert not column.any() and not torch.signbit(column).any(), name
                        zeros += 1
    return zeros
