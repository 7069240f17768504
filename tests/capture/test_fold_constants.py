"""What is made of weights alone is a weight of the captured program."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disco
from disco.capture import capture
from disco.program import interpret


class _Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT and NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = _Standardised(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6, bias=False)
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu()).mean((2, 3))
        bias = torch.cat([self.parts[0], torch.zeros_like(self.parts[1])])
        return F.linear(x, self.fc.weight, bias)


def test_layers_with_computed_weights_and_biases_are_layers() -> None:
    torch.manual_seed(0)
    model = _Model().eval()
    x = torch.randn(2, 3, 9, 9)
    captured = capture(model, (x,))
    kinds = [op.kind for op in captured.program.ops]
    assert kinds == ["disco.conv2d", "disco.conv2d", "aten.mean.dim", "disco.linear"]
    assert next(captured.program.ops[1].weight_refs()).startswith("body.")
    found = interpret(captured.program, captured.weights, (x,))
    torch.testing.assert_close(found, model(x).detach())
    partitioned = disco.partition(model, (x,), 2)
    assert not partitioned.plan.replicated
    assert {layer.name for layer in partitioned.plan.layers} >= {"stem", "body", "fc"}
    torch.testing.assert_close(partitioned(x), model(x).detach())


def test_the_model_is_left_as_it_is_and_its_changes_do_not_follow() -> None:
    model = _Model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 9, 9)
    captured = capture(model, (x,))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    bias = captured.program.ops[-1].args[2]
    folded = captured.weights[bias.name].clone()  # type: ignore[union-attr]
    with torch.no_grad():
        model.parts[0].zero_()
    assert torch.equal(captured.weights[bias.name], folded)  # type: ignore[union-attr]


def test_weights_that_are_computed_are_not_sparsified() -> None:
    """Zeros in the parameter are none in the standardised weight: such a tensor stays dense."""
    torch.manual_seed(0)
    model = _Model().eval()
    x = torch.randn(2, 3, 9, 9)
    pattern = disco.sparsify_(model, 2, 0.5, (x,))
    assert set(pattern.layers) == {"fc"}
    plan = disco.partition(model, (x,), 2, pattern=pattern, partial_sums=False).plan
    body = next(layer for layer in plan.layers if layer.name == "body")
    assert body.selected_counts == ((0, 4), (4, 0))
