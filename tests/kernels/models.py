"""Small models with a DISCO pattern, to be swapped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import disco_kernels as dk
from disco_kernels import registry


def sparsify(
    module: nn.Conv2d | nn.Linear, nodes: int = 2, density: float = 0.3
) -> dk.LayerPattern:
    """Zero the remote columns beyond a density, contiguous shares; returns what is left."""
    weight = module.weight
    owned_out = dk.Ownership.contiguous(weight.shape[0], nodes)
    owned_in = dk.Ownership.contiguous(weight.shape[1], nodes)
    selected = tuple(
        tuple(
            () if i == j else owned[: int(density * len(owned))]
            for j, owned in enumerate(owned_in.channels)
        )
        for i in range(nodes)
    )
    with torch.no_grad():
        for i, outputs in enumerate(owned_out.channels):
            for j, inputs in enumerate(owned_in.channels):
                dropped = [k for k in inputs if i != j and k not in selected[i][j]]
                for output in outputs:
                    weight[output, dropped] = 0
    return dk.LayerPattern(owned_out, owned_in, selected)


class Small(nn.Module):
    """Every geometry that swaps, a depthwise layer among them, beside a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(11)
        self.body = nn.Sequential(
            nn.Conv2d(11, 11, 3, padding="same", dilation=2, bias=False),
            nn.ReLU(),
            nn.Conv2d(11, 11, 3, padding=1, groups=11),
            nn.Conv2d(11, 14, (1, 3), padding=(0, 1)),
        )
        self.attend = nn.Linear(14, 14)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.norm(self.stem(x))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head((tokens + self.attend(tokens)).mean(1))


# Layers of `Small` that have a pattern once it is sparse.
PATTERNED = ("stem", "body.0", "body.3", "attend", "head")
DEPTHWISE = "body.2"


def swappable(backend: str | None = None) -> tuple[str, ...]:
    """The layers of a sparse `Small` that a backend takes: the reference would do for the depthwise
    one what torch does."""
    chosen = registry.resolve(backend, torch.device("cpu"), torch.float32)
    return PATTERNED if chosen == "reference" else (*PATTERNED[:2], DEPTHWISE, *PATTERNED[2:])


SWAPPABLE = swappable()


def small(nodes: int = 2) -> Small:
    """A sparse `Small` in eval mode, batch norm's statistics not the initial ones."""
    torch.manual_seed(1)
    model = Small()
    for name in PATTERNED:
        sparsify(model.get_submodule(name), nodes)  # type: ignore[arg-type]
    model(torch.randn(4, 3, 9, 8))
    return model.eval()


def conv(inputs: int = 8, outputs: int = 8, kernel: int = 3) -> nn.Conv2d:
    """One sparse convolution in eval mode."""
    module = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    sparsify(module)
    return module.eval()


def linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    module = nn.Linear(inputs, outputs)
    sparsify(module)
    return module.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 9, 8)


def close(a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    """Equal up to what float32 loses in a few layers of some 100 terms each."""
    return torch.allclose(a, b, rtol=1e-4 * scale, atol=1e-5 * scale)


def inference(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)
