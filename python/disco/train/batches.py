"""Batches of examples. An image that cannot be read is named once, left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from disco.errors import InputError
from disco.tasks import Example, Examples
from disco.tasks.data import batches_of, mixed, order_of


@dataclass
class Refused:
    """Examples that could not be used, by number, with the reason."""

    say: Callable[[str], None]
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, index: int, reason: str) -> None:
        if index not in self.reasons:
            self.reasons[index] = reason
            self.say(f"left out: {reason}")

    def __len__(self) -> int:
        return len(self.reasons)


class Batches:
    """The batches of a set of examples, in the order of the set or of a seed.

    Args:
        examples: of the task.
        collate: the task's: the targets of a batch out of those of its examples.
        size: images a batch.
        refused: takes note of images that cannot be read.
        workers: processes that read images; 0 reads them in this one. The batches are the same.
    """

    def __init__(
        self,
        examples: Examples,
        collate: Collate,
        size: int,
        refused: Refused,
        workers: int = 0,
    ) -> None:
        self._examples = examples
        self._collate = collate
        self._size = size
        self._refused = refused
        self._workers = workers
        self._count = len(examples)

    def __len__(self) -> int:
        """Training batches of an epoch."""
        return max(1, self._count // self._size)

    def in_order(self) -> Iterator[tuple[Tensor, Any]]:
        """All examples as they are: inputs float32 [B, 3, s, s] and their targets."""
        batches = batches_of(range(self._count), self._size, drop_last=False)
        return self._load([[(index, None) for index in batch] for batch in batches])

    def shuffled(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Any]]:
        """An epoch's training batches, augmented: a function of seed and epoch."""
        batches = batches_of(order_of(self._count, seed, epoch), self._size, drop_last=True)
        return self._load(
            [[(index, mixed(seed, epoch, index) >> 1) for index in batch] for batch in batches]
        )

    def _load(
        self, batches: Sequence[Sequence[tuple[int, int | None]]]
    ) -> Iterator[tuple[Tensor, Any]]:
        loader: DataLoader[_Loaded] = DataLoader(
            _Loading(self._examples),
            batch_sampler=batches,  # type: ignore[arg-type]  # any sequence of batches serves
            num_workers=self._workers,
            collate_fn=list,
            # Its own: the default would draw a number from the generator of the training.
            generator=torch.Generator(),
        )
        for loaded in loader:
            for index, found in loaded:
                if isinstance(found, str):
                    self._refused.add(index, found)
            good = [found for _, found in loaded if not isinstance(found, str)]
            if good:
                images, targets = zip(*good, strict=True)
                yield torch.stack(images), self._collate(targets)


Collate = Callable[[Sequence[Any]], Any]
_Loaded = tuple[int, Example | str]


def moved(targets: Any, device: torch.device | str) -> Any:
    """A tree of tensors (tuples, lists, dicts) on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, targets)


class _Loading(Dataset[_Loaded]):
    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, key: tuple[int, int | None]) -> _Loaded:
        index, seed = key
        try:
            return index, self._examples.load(index, seed)
        except InputError as error:
            # As text: with workers it crosses processes.
            return index, str(error)
