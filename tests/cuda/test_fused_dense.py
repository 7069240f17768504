"""The dense side of the benchmarks that is fused as ours is, with torch's functions for cuDNN's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fused_dense import FusedConv2d, fuse_convolutions
from benchmarks.gpu_models import fold_batch_norms
from disco.torchvision_compat import import_torchvision


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    def relu(x: Tensor, w: Tensor, b: Tensor, *window: Any) -> Tensor:
        return F.relu(F.conv2d(x, w, b, *window))

    def add_relu(x: Tensor, w: Tensor, z: Tensor, alpha: float, b: Tensor, *window: Any) -> Tensor:
        return F.relu(F.conv2d(x, w, b, *window) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)


class Odd(nn.Module):
    """What cannot be fused beside what can."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.no_bias = nn.Conv2d(8, 8, 1, bias=False)
        self.same = nn.Conv2d(8, 8, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = (x + self.b(x)).relu()  # fused
        shown = self.b(x)
        x = F.relu(shown) + shown  # read twice
        x = F.relu(self.no_bias(x)) + F.relu(self.same(x))
        x = F.relu(x + 1) + F.relu(x + x)
        return F.relu(self.a(x[:, :3]) + self.b(self.a(x[:, :3])))  # fused, either


@torch.no_grad()
def test_what_follows_a_convolution_is_in_it() -> None:
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 3, 12, 12)
    before = copy.deepcopy(model)(x)
    fused = fuse_convolutions(torch.fx.symbolic_trace(model))
    assert fused is not None
    assert sum(isinstance(m, FusedConv2d) for m in fused.modules()) == 3
    assert torch.allclose(fused(x), before, atol=1e-5)
    assert fuse_convolutions(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))) is None
    assert fuse_convolutions(model) is None, "it could not be traced"


@torch.no_grad()
@pytest.mark.parametrize(("name", "relus"), [("resnet18", 17), ("resnet50", 49)])
def test_residual_networks(name: str, relus: int) -> None:
    torch.manual_seed(0)
    model = getattr(import_torchvision().models, name)().eval()
    x = torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(model).double()(x.double())
    dense = fold_batch_norms(model)
    fused = fuse_convolutions(dense)
    assert fused is not None
    modules = [
        type(fused.get_submodule(str(n.target))) for n in fused.graph.nodes if n.op == "call_module"
    ]
    assert modules.count(FusedConv2d) == relus and modules.count(nn.ReLU) == 0
    error = float((fused(x).double() - exact).norm() / exact.norm())
    assert error < 1e-4
    assert float((dense(x).double() - exact).norm() / exact.norm()) < 1e-4, "it is left as it was"
