"""A classifier's output as words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from disco.zoo import category_names


@dataclass(frozen=True)
class Guess:
    """One class of a ranking. `name` is None where the classes have no known names."""

    index: int
    name: str | None
    probability: float

    def __str__(self) -> str:
        return f"{self.probability:7.2%}  {self.name or f'class {self.index}'}"


def top_classes(logits: Tensor, count: int) -> list[Guess]:
    """The `count` most probable classes of `logits` [1, classes], best first."""
    probabilities = torch.softmax(logits[0].double(), dim=0)
    names = category_names(len(probabilities))
    best = torch.topk(probabilities, min(count, len(probabilities)))
    return [
        Guess(index, None if names is None else names[index], probability)
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def is_logits(value: object) -> bool:
    """True for what a classifier returns for one image: a tensor [1, classes]."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == 1
