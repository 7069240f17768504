"""Models of the zoos, on small images: exact on several nodes and on one machine, any batch."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

import disco
from disco.capture import capture
from disco.executor import Executor, InProcessHub, run_together
from disco.partition import build_all, decide
from tests.partition.wire_harness import WIRES, check_payloads
from tests.partition.zoo import (
    BEYOND,
    NODES,
    PROMISED,
    SUPER_RESOLUTION,
    build,
    check,
    check_sparse,
)

FAST = [
    ("torchvision", "resnet18", 64),
    ("torchvision", "mobilenet_v3_small", 64),
    ("torchvision", "mobilenet_v2", 32),
]
# Queries, keys and values are gathered: a split by heads holds on two nodes only.
GATHERING = [("timm", "levit_128s", 224)]
# How many layers have which activation in their epilogue; none of these models keeps one apart.
FUSED = {
    "resnet18": {"relu": 17},
    "mobilenet_v2": {"relu6": 35},
    "mobilenet_v3_small": {"relu": 14, "hardswish": 19, "hardsigmoid": 9},
    "efficientnet_b0": {"silu": 49, "sigmoid": 16},
    "vit_b_16": {"gelu": 12},
    "deit_tiny_patch16_224": {"gelu": 12},
}


@torch.no_grad()
def _check_model(source: str, name: str, size: int, nodes: list[int]) -> None:
    """Captured once with a batch of 1, then run on so many nodes and on one machine."""
    model = build(source, name)
    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    captured = capture(model, (example,))
    batches = [example, torch.randn(3, 3, size, size)]
    exact_model = copy.deepcopy(model).double()
    exact = [exact_model(x.double()) for x in batches]
    whole = Executor(captured.program, captured.weights)
    for x, expected in zip(batches, exact, strict=True):
        check([whole(x)], expected, f"{name} on one machine")
    for world_size in nodes:
        plan, ranks = build_all(decide(*captured, world_size, partial_sums=True, permute=True))
        if name in FUSED:
            found = Counter(layer.activation for layer in plan.layers)
            assert {a: n for a, n in found.items() if a not in ("", "none")} == FUSED[name]
        executors = [Executor(rank.program, rank.weights) for rank in ranks]
        for x, expected in zip(batches, exact, strict=True):
            transports = InProcessHub(world_size).transports()
            results = run_together(executors, (x,), transports)
            check(results, expected, f"{name} on {world_size} nodes")
            counted = sum(transport.bytes_sent for transport in transports)
            assert counted == len(x) * plan.bytes_per_image


@pytest.mark.parametrize(("source", "name", "size"), FAST)
def test_partitioned_and_compiled_are_exact(source: str, name: str, size: int) -> None:
    _check_model(source, name, size, [2, 3])


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "size"), GATHERING)
def test_models_that_gather_are_exact(source: str, name: str, size: int) -> None:
    _check_model(source, name, size, [2, 3, 8])


@pytest.mark.parametrize("nodes", NODES)
def test_super_resolution_at_density_02(nodes: int) -> None:
    check_sparse(*SUPER_RESOLUTION, nodes)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize(("source", "name", "size"), [*PROMISED, *BEYOND])
def test_more_models_are_exact_at_density_02(source: str, name: str, size: int, nodes: int) -> None:
    check_sparse(source, name, size, nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "name", "size", "nodes"),
    [
        ("torchvision", "mobilenet_v3_large", 64, 3),
        ("timm", "deit_tiny_patch16_224", 224, 2),
        ("torchvision", "swin_t", 64, 3),
        ("torchvision", "vit_b_16", 224, 2),
        (*SUPER_RESOLUTION, 4),
        ("torchvision", "densenet121", 64, 2),
        ("timm", "resnetv2_50x1_bit", 64, 2),
        ("timm", "mixer_s32_224", 224, 2),
    ],
)
@torch.no_grad()
def test_payloads_in_int8(source: str, name: str, size: int, nodes: int) -> None:
    """As with payloads that are rounded after they were received, bit for bit."""
    model = build(source, name)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(b, 3, size, size, generator=generator) for b in (1, 2)]
    disco.sparsify_(model, nodes, 0.2, (inputs[0],))
    partitioned = disco.partition(model, (inputs[0],), nodes)
    plan = check_payloads(partitioned.plan, partitioned.ranks, "int8", inputs, None)
    assert plan.bytes_per_image < partitioned.plan.bytes_per_image / 1.9


@pytest.mark.slow
@torch.no_grad()
def test_resnet50_at_full_size() -> None:
    """The numbers that the project promises for two nodes at density 0.2."""
    model = build("torchvision", "resnet50")
    x = torch.randn(1, 3, 224, 224)
    pattern = disco.sparsify_(model, 2, 0.2, (x,))
    dense = disco.partition(model, (x,), 2, dense_exchange=True).plan
    partitioned = disco.partition(model, (x,), 2, pattern=pattern)
    plan = partitioned.plan
    assert dense.bytes_matrix[0][1] == dense.bytes_matrix[1][0] == 4 * 4_454_644
    assert dense.bytes_per_image / plan.bytes_per_image >= 5.0
    assert max(plan.weight_bytes_per_rank) <= 0.31 * plan.weight_bytes_dense
    assert sum(plan.flops_per_rank) / plan.flops_dense == pytest.approx(0.61, abs=0.005)
    assert not plan.replicated
    narrow = {w: disco.with_wire_dtype(partitioned, getattr(torch, w)).plan for w in WIRES}
    found = {wire: plan.bytes_per_image for wire, plan in narrow.items()}
    halves = plan.bytes_per_image // 2 + 2 * 1000  # the output's gather stays: 1000 float32
    assert found["float32"] == plan.bytes_per_image == 6_935_800
    assert found["float16"] == found["bfloat16"] == halves == 3_469_900
    assert found["int8"] == 1_753_712 and dense.bytes_per_image / found["int8"] >= 19.0
    exact = copy.deepcopy(model).double()(x.double())
    check([partitioned(x)], exact, "resnet50")
