"""Dividing, ordering, batching: functions of their seeds alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from disco.errors import InputError
from disco.images import Preprocessing
from disco.tasks.data import (
    DataOptions,
    Example,
    TaskData,
    batches_of,
    made_harder,
    mixed,
    order_of,
    split_by_class,
)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_each_class_gives_its_share_and_keeps_an_example(share: float) -> None:
    labels = torch.tensor([0] * 2 + [1] * 7 + [2] * 50)[torch.randperm(59)]
    train, val = split_by_class(labels, ("a", "b", "c"), share, seed=3)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(59))
    for label, count in enumerate((2, 7, 50)):
        given = int((labels[val] == label).sum())
        assert given == min(max(1, round(share * count)), count - 1)
        assert int((labels[train] == label).sum()) == count - given


def test_the_seed_decides_who_is_in_which_part() -> None:
    labels = torch.arange(200) % 4
    first, again, other = (split_by_class(labels, "abcd", 0.3, s)[1].tolist() for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_a_part_empty_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="lies between 0 and 1"):
        split_by_class(torch.tensor([0, 0, 1, 1]), "ab", share, 0)


def test_a_class_that_cannot_be_divided_is_named() -> None:
    with pytest.raises(InputError, match="the class 'rare' has 1 images"):
        split_by_class(torch.tensor([0, 0, 1]), ("often", "rare"), 0.2, 0)


def test_orders_are_permutations_that_differ_by_epoch_and_seed() -> None:
    orders = [order_of(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert order_of(50, 1, 1) == orders[3]


def test_mixed_seeds_differ_and_fit() -> None:
    seeds = {mixed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert mixed(0, 1) != mixed(1, 0)
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"),
    [(6, True, [3, 3]), (7, True, [3, 3]), (7, False, [3, 3, 1]), (2, True, [2]), (0, True, [])],
)
def test_batches(count: int, drop_last: bool, sizes: list[int]) -> None:
    batches = list(batches_of(range(count), 3, drop_last=drop_last))
    assert [len(batch) for batch in batches] == sizes
    assert [index for batch in batches for index in batch] == list(range(sum(sizes)))


@dataclass(frozen=True)
class _Numbers:
    """Examples whose input is their number everywhere."""

    count: int

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, seed: int | None) -> Example:
        return torch.full((3, 2, 2), float(index)), index


def _numbers(train: int, val: int) -> TaskData:
    return TaskData(_Numbers(train), _Numbers(val), ("a",), Preprocessing(2, 2), "numbers")


def test_fewer_training_examples_are_a_choice_of_the_split_seed() -> None:
    def chosen(**options: Any) -> list[int]:
        data = made_harder(_numbers(50, 7), DataOptions(train_count=20, **options))
        assert len(data.val) == 7 and "20 are learnt from" in data.text
        return [data.train.load(index, None)[1] for index in range(len(data.train))]

    assert chosen() == chosen() == sorted(set(chosen())) and len(chosen()) == 20
    assert chosen() != chosen(split_seed=1)
    for count in (0, 51):
        with pytest.raises(InputError, match=f"{count} training examples .* there are 50"):
            made_harder(_numbers(50, 7), DataOptions(train_count=count))


def test_noise_stays_in_evaluation_and_changes_in_training() -> None:
    data = made_harder(_numbers(400, 400), DataOptions(noise=0.5))
    noise = torch.stack([data.val.load(i, None)[0] - i for i in range(400)])
    # 4,800 draws: their deviation is within 5% of 0.5 but for one seed in millions.
    assert abs(float(noise.std()) - 0.5) < 0.025 and abs(float(noise.mean())) < 0.05
    assert torch.equal(data.val.load(3, None)[0], data.val.load(3, None)[0])
    assert not torch.equal(data.train.load(3, None)[0], data.val.load(3, None)[0])
    assert not torch.equal(data.train.load(3, 1)[0], data.train.load(3, 2)[0])
    assert torch.equal(data.train.load(3, 1)[0], data.train.load(3, 1)[0])
    assert data.train.load(3, 1)[1] == 3


def test_nothing_asked_for_changes_nothing() -> None:
    data = _numbers(3, 2)
    assert made_harder(data, DataOptions()) == data
