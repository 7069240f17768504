"""Models of the zoos, on small images: exact on several nodes and on one machine, any batch."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.capture import capture
from disco.executor import Executor, InProcessHub, run_together
from disco.partition import build_all, decide
from disco.zoo import build_model

# Over the whole network roundings add up as in the model's own float32 pass: a few at the scale of
# the output. torch's own pass is 2 to 8 of them off; sums of 25088 (VGG) and softmaxes take more.
LARGEST_ERROR_EPS = 64
# torch's own pass is 140 off: at 64 x 64 pixels the last groups are normalised by small variances.
LARGER_ERROR_EPS = {"resnetv2_50x1_bit": 512}

FAST = [
    ("torchvision", "resnet18", 64),
    ("torchvision", "mobilenet_v3_small", 64),
    ("torchvision", "mobilenet_v2", 32),
]
SLOW = [
    ("torchvision", "resnet50", 64),
    ("torchvision", "resnext50_32x4d", 64),
    ("torchvision", "densenet121", 64),
    ("torchvision", "vgg16_bn", 64),
    ("torchvision", "googlenet", 64),
    ("torchvision", "efficientnet_b0", 64),
    ("torchvision", "regnet_y_400mf", 64),
    ("torchvision", "convnext_tiny", 64),
    ("torchvision", "shufflenet_v2_x0_5", 64),
    ("torchvision", "deeplabv3_resnet50", 64),
    ("torchvision", "swin_t", 64),
    ("torchvision", "swin_v2_t", 64),
    ("timm", "resnetv2_50x1_bit", 64),  # standardised weights, group norms
    ("timm", "poolformer_s12", 64),  # one group of all channels
    ("timm", "gmlp_s16_224", 224),  # gates whose tokens are mixed
    ("torchvision", "vit_b_16", 224),
    ("timm", "deit_tiny_patch16_224", 224),
]
# How many layers have which activation in their epilogue; none of these models keeps one apart.
FUSED = {
    "resnet18": {"relu": 17},
    "mobilenet_v2": {"relu6": 35},
    "mobilenet_v3_small": {"relu": 14, "hardswish": 19, "hardsigmoid": 9},
    "efficientnet_b0": {"silu": 49, "sigmoid": 16},
    "vit_b_16": {"gelu": 12},
    "deit_tiny_patch16_224": {"gelu": 12},
}


def _build(source: str, name: str) -> nn.Module:
    """A model whose batch norms do something, and whose output depends on its input."""
    model = build_model(source, name)
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model.eval()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors(item)]


def _check(results: list[Any], exact: Any, what: str) -> None:
    compared = 0
    for result in results:
        for found, expected in zip(_tensors(result), _tensors(exact), strict=True):
            error = float((found - expected).abs().max())
            scale = float(expected.abs().max())
            allowed = LARGER_ERROR_EPS.get(what.split()[0], LARGEST_ERROR_EPS)
            limit = allowed * torch.finfo(torch.float32).eps * scale
            assert error <= limit, f"{what}: {error:.2e} at scale {scale:.2e}, allowed {limit:.2e}"
            compared += 1
    assert compared >= len(results)


@torch.no_grad()
def _check_model(source: str, name: str, size: int, nodes: list[int]) -> None:
    """Captured once with a batch of 1, then run on so many nodes and on one machine."""
    model = _build(source, name)
    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    captured = capture(model, (example,))
    batches = [example, torch.randn(3, 3, size, size)]
    exact_model = copy.deepcopy(model).double()
    exact = [exact_model(x.double()) for x in batches]
    whole = Executor(captured.program, captured.weights)
    for x, expected in zip(batches, exact, strict=True):
        _check([whole(x)], expected, f"{name} on one machine")
    for world_size in nodes:
        plan, ranks = build_all(decide(*captured, world_size, partial_sums=True, permute=True))
        if name in FUSED:
            found = Counter(layer.activation for layer in plan.layers)
            assert {a: n for a, n in found.items() if a not in ("", "none")} == FUSED[name]
        executors = [Executor(rank.program, rank.weights) for rank in ranks]
        for x, expected in zip(batches, exact, strict=True):
            transports = InProcessHub(world_size).transports()
            results = run_together(executors, (x,), transports)
            _check(results, expected, f"{name} on {world_size} nodes")
            counted = sum(transport.bytes_sent for transport in transports)
            assert counted == len(x) * plan.bytes_per_image


@pytest.mark.parametrize(("source", "name", "size"), FAST)
def test_partitioned_and_compiled_are_exact(source: str, name: str, size: int) -> None:
    _check_model(source, name, size, [2, 3])


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "size"), SLOW)
def test_more_models_are_exact(source: str, name: str, size: int) -> None:
    _check_model(source, name, size, [2, 3, 8])


@pytest.mark.slow
@torch.no_grad()
def test_resnet50_at_full_size() -> None:
    """The numbers that the project promises for two nodes at density 0.2."""
    model = _build("torchvision", "resnet50")
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
    exact = copy.deepcopy(model).double()(x.double())
    _check([partitioned(x)], exact, "resnet50")
