"""What a task's data are made of: examples by number, in two parts, and how they are divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from disco.errors import InputError
from disco.images import Preprocessing

# One input, float32 [3, size, size], and what is wanted of it: a tensor, or a tree of tensors.
Example = tuple[Tensor, Any]


class Examples(Protocol):
    """Inputs and targets by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def load(self, index: int, seed: int | None) -> Example:
        """One example.

        Args:
            index: of the example.
            seed: of its augmentation; None for none, as it is evaluated.

        Raises:
            InputError: the file behind it cannot be used; the message names it.
        """
        ...


@dataclass(frozen=True)
class TaskData:
    """Training and validation examples.

    Attributes:
        train, val: disjoint.
        classes: their names, in the order of the outputs.
        preprocessing: how an image file becomes an input.
        text: one line on where they come from and how they were divided.
    """

    train: Examples
    val: Examples
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    text: str


@dataclass(frozen=True)
class DataOptions:
    """How data are read.

    Attributes:
        preprocessing: None for the data's usual one, at `image_size`.
        image_size: side of the inputs in pixels, None for the data's usual one.
        val_share: of each class's examples, where the data are not divided already.
        split_seed: of that division. It is not the training's seed, so that runs that differ in
            theirs are compared on the same examples.
        augment: change training examples at random.
        train_count: of the training examples so many, chosen by `split_seed`; None for all.
        noise: deviation of normal noise that is added to the inputs, once they are normalised.
    """

    preprocessing: Preprocessing | None = None
    image_size: int | None = None
    val_share: float = 0.2
    split_seed: int = 0
    augment: bool = True
    train_count: int | None = None
    noise: float = 0.0

    def preprocessing_or(self, usual: Preprocessing) -> Preprocessing:
        """That to use: the one given, or `usual` at the size given."""
        if self.preprocessing is not None:
            return self.preprocessing
        if self.image_size is None:
            return usual
        scaled = Preprocessing.for_size(self.image_size)
        resize = self.image_size if usual.size == usual.resize else scaled.resize
        return Preprocessing(self.image_size, resize, usual.mean, usual.std)


@dataclass(frozen=True)
class Subset:
    """Some of the examples."""

    whole: Examples
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, seed: int | None) -> Example:
        """As the whole's."""
        return self.whole.load(int(self.indices[index]), seed)


@dataclass(frozen=True)
class Noisy:
    """Examples with normal noise on their inputs, the same at every look but in training."""

    clean: Examples
    deviation: float
    seed: int

    def __len__(self) -> int:
        return len(self.clean)

    def load(self, index: int, seed: int | None) -> Example:
        """As the clean ones', and noise."""
        image, target = self.clean.load(index, seed)
        own = mixed(self.seed, index) if seed is None else mixed(self.seed, seed)
        generator = torch.Generator().manual_seed(own >> 1)
        return image + self.deviation * torch.randn(image.shape, generator=generator), target


def made_harder(data: TaskData, options: DataOptions) -> TaskData:
    """The data with fewer training examples and noisy inputs, where the options ask for these.

    Raises InputError for more training examples than there are.
    """
    train, val, text = data.train, data.val, data.text
    if options.train_count is not None:
        if not 0 < options.train_count <= len(train):
            raise InputError(
                f"{options.train_count} training examples were asked for, and there are "
                f"{len(train)}: ask for fewer"
            )
        generator = torch.Generator().manual_seed(mixed(options.split_seed, 1) >> 1)
        chosen = torch.randperm(len(train), generator=generator)[: options.train_count]
        train, text = Subset(train, chosen.sort().values), f"{text}; {len(chosen)} are learnt from"
    if options.noise:
        # Of two seeds, or the two parts would have the same noise by number.
        train = Noisy(train, options.noise, mixed(options.split_seed, 2) >> 1)
        val = Noisy(val, options.noise, mixed(options.split_seed, 3) >> 1)
        text = f"{text}; with noise of {options.noise:g}"
    return replace(data, train=train, val=val, text=text)


def split_by_class(
    labels: Tensor, classes: Sequence[str], val_share: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Divide examples so that both parts have the same share of each class.

    Args:
        labels: int64 [n].
        classes: their names, for messages.
        val_share: between 0 and 1. Each class gives round(share x its examples), one at least, and
            keeps one at least.
        seed: which ones.

    Returns:
        The numbers of the training and of the validation examples, in ascending order.

    Raises:
        InputError: a share out of range, or a class with fewer than two examples.
    """
    if not 0 < val_share < 1:
        raise InputError(
            f"a validation share of {val_share!r} was given; it lies between 0 and 1, for example "
            "0.2"
        )
    generator = torch.Generator().manual_seed(seed)
    train, val = [], []
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise InputError(
                f"the class {name!r} has {len(members)} images, and at least 2 are needed to "
                "divide them into training and validation: add images, or leave the class out"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(val_share * len(members))), len(members) - 1)
        val.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """An epoch's order of examples: a function of seed and epoch, so resuming needs no state."""
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def mixed(*numbers: int) -> int:
    """One seed out of several numbers, by SplitMix64's steps (Steele et al., OOPSLA 2014)."""
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


_MASK = (1 << 64) - 1


def batches_of(order: Sequence[int], size: int, *, drop_last: bool) -> Iterator[list[int]]:
    """Runs of `size`; the last, smaller one is left out only if it is not the only one."""
    for first in range(0, len(order), size):
        batch = list(order[first : first + size])
        if len(batch) == size or not drop_last or first == 0:
            yield batch
