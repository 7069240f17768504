"""Models of the zoos on uneven clusters, sparse and dense: exact, and bytes as planned."""

from __future__ import annotations

import copy

import pytest
import torch

import disco
from disco import Cluster, Link, Node
from disco.executor import Executor, InProcessHub, run_together
from disco.zoo import build_model

EXACT_EPS = 64  # as in test_zoo
SPEEDS = {2: (5.0, 2.0), 3: (1.0, 4.0, 2.0), 4: (9.0, 1.0, 2.0, 3.0), 8: (1, 2, 3, 4, 5, 6, 7, 8)}
FAST = [("torchvision", "resnet18", 64, 3)]
SLOW = [
    ("torchvision", "resnet18", 64, 2),
    ("torchvision", "resnet50", 64, 8),
    ("torchvision", "resnext50_32x4d", 64, 3),
    ("torchvision", "mobilenet_v3_small", 64, 4),
    ("torchvision", "densenet121", 64, 3),
    ("torchvision", "regnet_y_400mf", 64, 4),
    ("torchvision", "shufflenet_v2_x0_5", 64, 3),
    ("torchvision", "swin_t", 64, 3),
    ("timm", "deit_tiny_patch16_224", 224, 4),
    ("torchvision", "efficientnet_b0", 64, 4),
    ("torchvision", "vgg16_bn", 64, 3),
    ("torchvision", "googlenet", 64, 2),
    ("torchvision", "convnext_tiny", 64, 8),
    ("timm", "vit_small_patch32_224", 224, 2),
    ("timm", "mixer_s32_224", 224, 3),
]


@torch.no_grad()
def _check(source: str, name: str, size: int, nodes: int) -> None:
    link = Link(1000, 0.2)
    cluster = Cluster([Node(f"n{i}", float(s), None, link) for i, s in enumerate(SPEEDS[nodes])])
    model, x = build_model(source, name).eval(), torch.randn(2, 3, size, size)
    disco.sparsify_(model, cluster, 0.2, (x,))
    partitioned = disco.partition(model, (x,), cluster)
    executors = [Executor(rank.program, rank.weights) for rank in partitioned.ranks]
    for batch in (1, 4):
        given = torch.randn(batch, 3, size, size)
        exact = copy.deepcopy(model).double()(given.double())
        allowed = EXACT_EPS * torch.finfo(torch.float32).eps * float(exact.abs().max())
        transports = InProcessHub(nodes).transports()
        for found in run_together(executors, (given,), transports):
            assert float((found - exact).abs().max()) <= allowed
        sent = sum(transport.bytes_sent for transport in transports)
        assert sent == batch * partitioned.plan.bytes_per_image
    flops = partitioned.plan.flops_per_rank
    by_speed = sorted(range(nodes), key=lambda rank: SPEEDS[nodes][rank])
    assert flops[by_speed[-1]] > 1.5 * flops[by_speed[0]] > 0


@pytest.mark.parametrize(("source", "name", "size", "nodes"), FAST)
def test_uneven(source: str, name: str, size: int, nodes: int) -> None:
    _check(source, name, size, nodes)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "size", "nodes"), SLOW)
def test_more_models_uneven(source: str, name: str, size: int, nodes: int) -> None:
    _check(source, name, size, nodes)
