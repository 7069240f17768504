"""What depends on weights alone is a weight of the program."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disco
from disco.capture import capture
from disco.program import interpret


class Standardised(nn.Module):
    """A convolution with standardised weights, and a linear whose bias is put together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 8, bias=False)
        self.part = nn.Parameter(torch.randn(4))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
        y = F.conv2d(x, (weight - mean) / (var + 1e-5).sqrt(), self.conv.bias)
        bias = torch.cat((self.part[self.order], torch.zeros(4)))
        return F.linear(y.mean((2, 3)), self.fc.weight, bias)


def test_they_are_computed_once_and_named_after_their_parameter() -> None:
    torch.manual_seed(0)
    model = Standardised().eval()
    x = torch.randn(3, 3, 8, 8)
    captured = capture(model, (x,))
    kinds = [op.kind for op in captured.program.ops]
    assert kinds == ["disco.conv2d", "aten.mean.dim", "disco.linear"]
    names = captured.program.weight_names()
    assert any(name.startswith("conv.weight@") for name in names)
    assert any(name.startswith("part@") for name in names)
    torch.testing.assert_close(interpret(captured.program, captured.weights, (x,)), model(x))
    texts = {capture(model, (x,)).program.to_json() for _ in range(2)}
    assert len(texts) == 1


@torch.no_grad()
def test_layers_with_computed_weights_are_split_and_left_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 3, 8, 8)
    before = model[0].conv.weight.clone()
    pattern = disco.sparsify_(model, 2, 0.25, (x,))
    assert torch.equal(model[0].conv.weight, before) and "2" in pattern.layers
    partitioned = disco.partition(model, (x,), 2, pattern=pattern)
    assert not partitioned.plan.replicated
    assert torch.allclose(partitioned(x), model(x), atol=1e-5)


def test_what_grows_too_much_stays_an_op() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w.expand(1, 4, 400, 400)

    captured = capture(Grows(), (torch.randn(2, 4, 400, 400),))
    assert [op.kind for op in captured.program.ops] == ["aten.expand.default", "aten.add.Tensor"]
