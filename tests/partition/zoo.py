"""Models of the zoos that partitioning is tested on, and what it has to hold for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import disco
from disco import Cluster, Link, Node
from disco.executor import Executor, InProcessHub, run_together
from disco.partition import Plan
from disco.zoo import build_model

# Over the whole network roundings add up as in the model's own float32 pass: a few at the scale of
# the output. torch's own pass is 2 to 8 of them off; sums of 25088 (VGG) and softmaxes take more.
LARGEST_ERROR_EPS = 64
# torch's own pass is 140 off: at 64 x 64 pixels the last groups are normalised by small variances.
LARGER_ERROR_EPS = {"resnetv2_50x1_bit": 512}

NODES = [2, 3, 4, 8]
SPEEDS = {2: (5, 2), 3: (1, 4, 2), 4: (9, 1, 2, 3), 8: (1, 2, 3, 4, 5, 6, 7, 8)}
SUPER_RESOLUTION = ("here", "super_resolution", 24)
# What the project promises to cover, at density 0.2. SSD is in test_submodules.py.
PROMISED = [
    ("torchvision", "resnet18", 64),
    ("torchvision", "mobilenet_v3_large", 64),
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
    ("torchvision", "fcn_resnet50", 64),
    ("torchvision", "swin_t", 64),
    ("timm", "deit_tiny_patch16_224", 224),
    ("timm", "deit_small_patch16_224", 224),
    ("timm", "vit_small_patch32_224", 224),
    ("timm", "mixer_s32_224", 224),
]
# Beyond: each brings something of its own.
BEYOND = [
    ("timm", "resnetv2_50x1_bit", 64),  # standardised weights, group norms
    ("timm", "poolformer_s12", 64),  # one group of all channels
    ("timm", "gmlp_s16_224", 224),  # gates whose tokens are mixed
    ("torchvision", "inception_v3", 96),
    ("torchvision", "vit_b_16", 224),  # torch's own attention, with heads put into the batch
    ("torchvision", "maxvit_t", 224),  # attention over windows and over grids
    ("torchvision", "swin_v2_t", 64),  # cosine attention, weights that are computed
    ("timm", "swin_tiny_patch4_window7_224", 224),  # neighbouring pixels become channels by a view
    ("timm", "convnextv2_atto", 64),  # norms over pixels, means over channels
    ("timm", "ghostnet_100", 64),  # shortcuts added in place, to a slice of all channels
    ("timm", "hrnet_w18_small", 64),
    ("timm", "dla34", 64),
    ("timm", "focalnet_tiny_srf", 64),
]
# Gathers for ops without a rule, as a share of what is exchanged sparsely.
LARGEST_GATHERED_SHARE = 0.05


def cluster_of(nodes: int) -> Cluster:
    link = Link(1000, 0.2)
    return Cluster([Node(f"n{i}", float(s), None, link) for i, s in enumerate(SPEEDS[nodes])])


class SuperResolution(nn.Module):
    """EDSR's shape (arXiv 1707.02921), small: residual blocks, then pixel shuffles."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 48, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1)
            )
            for _ in range(4)
        )
        self.up = nn.Sequential(nn.Conv2d(48, 192, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
        self.tail = nn.Conv2d(48, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = head = self.head(x)
        for block in self.blocks:
            y = y + 0.1 * block(y)
        return nn.functional.pixel_shuffle(self.tail(self.up(y + head)), 2)


def build(source: str, name: str) -> nn.Module:
    """A model whose batch norms do something, and whose output depends on its input."""
    model = SuperResolution() if source == "here" else build_model(source, name)
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    for parameter in model.parameters():
        # Scales of layers, heads and biases that start at or near zero would hide what they scale.
        if parameter.numel() and float(parameter.abs().max()) <= 1e-3:
            width = 0.02 if parameter.dim() > 1 and parameter.shape[-1] > 1 else 0.1
            parameter.copy_(width * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors(item)]


def check(results: list[Any], exact: Any, what: str) -> None:
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
def check_sparse(source: str, name: str, size: int, nodes: int | Cluster) -> Plan:
    """At density 0.2: exact with batches of 1 and 4, bytes as planned, next to no other gathers."""
    world_size = nodes if isinstance(nodes, int) else nodes.world_size
    generator = torch.Generator().manual_seed(0)
    example, *batches = (torch.randn(b, 3, size, size, generator=generator) for b in (1, 1, 4))
    model = build(source, name)
    pattern = disco.sparsify_(model, nodes, 0.2, (example,))
    partitioned = disco.partition(model, (example,), nodes, pattern=pattern)
    plan = partitioned.plan
    executors = [Executor(rank.program, rank.weights) for rank in partitioned.ranks]
    del partitioned
    exact_model = model.double()
    for x in batches:
        transports = InProcessHub(world_size).transports()
        results = run_together(executors, (x,), transports)
        check(results, exact_model(x.double()), f"{name} on {world_size} nodes")
        counted = sum(transport.bytes_sent for transport in transports)
        assert counted == len(x) * plan.bytes_per_image
    outputs = sum(e.bytes_per_image for e in plan.exchanges if e.gathered_by == ("output",))
    sparse = plan.bytes_per_image - outputs - plan.bytes_without_rule
    share = plan.bytes_without_rule / sparse
    ops = {f"{layer.name} ({layer.op})" for layer in plan.replicated}
    assert share < LARGEST_GATHERED_SHARE, f"{world_size} nodes: {share:.1%} for {ops}"
    return plan
