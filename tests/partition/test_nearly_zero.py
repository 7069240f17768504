"""Patterns that are nearly there: never cut, always reported, with the tolerance that would."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import disco
from disco.partition import Plan
from disco.partition.nearly_zero import NearlyZero, describe, find_nearly_zero
from disco_kernels import Ownership

SHARES = Ownership.contiguous(8, 2)


def weight(noise: float, columns: int) -> torch.Tensor:
    """Two ranks of 4 channels; this many of each remote block's columns are noise."""
    values = torch.ones(8, 8, 3, 3)
    values[:4, 4 : 4 + columns] = noise
    values[4:, :columns] = -noise
    return values


def test_columns_are_counted_over_all_pairs_with_their_largest_value() -> None:
    found = find_nearly_zero("a", weight(1e-5, 3), SHARES, SHARES, 0.0)
    assert found == NearlyZero("a", 6, 8, pytest.approx(1e-5))


@pytest.mark.parametrize(
    ("noise", "columns", "tolerance"),
    [(0.0, 4, 0.0), (1e-5, 0, 0.0), (1e-5, 3, 1e-5), (2e-3, 4, 0.0)],
)
def test_zeros_tolerated_values_and_weights_are_not_reported(
    noise: float, columns: int, tolerance: float
) -> None:
    assert find_nearly_zero("a", weight(noise, columns), SHARES, SHARES, tolerance) is None


def test_random_weights_are_not_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in [(8, 8), (8, 8, 3, 3)]:
        values = torch.randn(shape, generator=generator)
        assert find_nearly_zero("a", values, SHARES, SHARES, 0.0) is None
    idle = Ownership((tuple(range(8)), ()))
    assert find_nearly_zero("a", torch.zeros(8, 8), idle, SHARES, 0.0) is None


def test_the_tolerance_named_is_enough_and_the_plan_keeps_the_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    x = torch.randn(1, 3, 8, 8)
    disco.sparsify_(model, 2, 0.25, (x,))
    exact = disco.partition(model, (x,), 2).plan
    assert not exact.nearly_zero
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-6 * torch.randn_like(parameter))
    partitioned = disco.partition(model, (x,), 2)
    plan = partitioned.plan
    assert plan.bytes_per_image > exact.bytes_per_image, "nothing was cut"
    assert torch.allclose(partitioned(x), model(x), atol=1e-6)
    assert [(each.layer, each.columns) for each in plan.nearly_zero] == [("1", 6), ("2", 6)]
    assert Plan.from_json(plan.to_json()) == plan
    line = str(plan).splitlines()[-1]
    assert line.startswith("tolerance=") and "nearly zero: 6 of 8 remote columns of 1" in str(plan)
    tolerance = float(line.split()[0].removeprefix("tolerance="))
    tolerant = disco.partition(model, (x,), 2, tolerance=tolerance).plan
    assert not tolerant.nearly_zero
    assert tolerant.bytes_per_image == exact.bytes_per_image
    assert json.loads(plan.to_json())["nearly_zero"][0]["remote_columns"] == 8


def test_many_layers_are_summed_up() -> None:
    lines = describe([NearlyZero(f"layer{i}", 1, 2, 1.2345e-7 * i) for i in range(1, 6)])
    assert len(lines) == 5 and lines[3] == "nearly zero: 2 more layers"
    assert lines[4].startswith("tolerance=6.18e-07 ")
