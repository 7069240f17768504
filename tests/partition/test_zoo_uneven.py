"""The models that the project promises to cover, at density 0.2, on nodes of uneven speed."""

from __future__ import annotations

import pytest

from tests.partition.zoo import (
    BEYOND,
    NODES,
    PROMISED,
    SPEEDS,
    SUPER_RESOLUTION,
    check_sparse,
    cluster_of,
)


def _check(source: str, name: str, size: int, nodes: int) -> None:
    plan = check_sparse(source, name, size, cluster_of(nodes))
    flops = plan.flops_per_rank
    by_speed = sorted(range(nodes), key=lambda rank: SPEEDS[nodes][rank])
    assert flops[by_speed[-1]] > flops[by_speed[0]]


def test_resnet18() -> None:
    _check("torchvision", "resnet18", 64, 3)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize(("source", "name", "size"), [*PROMISED, SUPER_RESOLUTION])
def test_promised_models(source: str, name: str, size: int, nodes: int) -> None:
    _check(source, name, size, nodes)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "size"), BEYOND)
def test_models_beyond(source: str, name: str, size: int) -> None:
    _check(source, name, size, 3)
