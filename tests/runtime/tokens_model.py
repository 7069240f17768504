"""A model whose ranks exchange maps, tokens and norms' statistics."""

from __future__ import annotations

from torch import Tensor, nn


class TokensModel(nn.Module):
    """Maps, tokens with a layer norm (two dtypes in a message), a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.body = nn.Conv2d(24, 36, 3, padding=1)
        self.norm = nn.LayerNorm(36)
        self.mix = nn.Linear(36, 30)
        self.head = nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu()).relu()
        tokens = self.mix(self.norm(x.flatten(2).transpose(1, 2))).relu()
        return self.head(tokens.mean(1))
