"""`lower_precision`: what becomes bfloat16, and what has to stay as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disco.capture import capture
from disco.executor import Executor
from disco.program import Op, Program, Ref, ValueInfo, WeightRef, interpret, lower_precision

EPS = torch.finfo(torch.bfloat16).eps


def info(*shape: int | str, dtype: str = "float32") -> ValueInfo:
    return ValueInfo(shape, dtype)


def lowered(
    program: Program, weights: dict[str, Tensor], *inputs: Any
) -> tuple[Program, dict[str, Tensor], Any]:
    changed, low = lower_precision(program, weights, torch.bfloat16)
    changed.validate()
    assert Program.from_json(changed.to_json()) == changed
    return changed, low, interpret(changed, low, inputs)


def test_inputs_outputs_and_integers() -> None:
    """Nested outputs are float32 again; integers and other dtypes go through untouched."""
    x, ids = torch.randn(2, 3), torch.tensor([[1, 300], [2, 0]])
    weights = {"w": torch.randn(4, 3), "table": torch.randn(301, 3), "n": torch.tensor([5, 257])}
    program = Program(
        ("x", "ids"),
        {"y": [Ref("y"), (Ref("e"), Ref("y"))], "ids": Ref("ids"), "x": Ref("x"), "k": 3,
         "big": Ref("big"), "n": WeightRef("n"), "w": WeightRef("w")},
        (
            Op("disco.linear", "y", (Ref("x"), WeightRef("w"), None, None), {"activation": "none"}),
            Op("aten.embedding.default", "e", (WeightRef("table"), Ref("ids"))),
            Op("aten.mul.Tensor", "big", (Ref("ids"), WeightRef("n"))),
        ),
        {
            "x": info("s0", 3), "ids": info("s0", 2, dtype="int64"), "y": info("s0", 4),
            "e": info("s0", 2, 3), "big": info("s0", 2, dtype="int64"),
        },
    )  # fmt: skip
    changed, low, result = lowered(program, weights, x, ids)
    assert low["w"].dtype == low["table"].dtype == torch.bfloat16
    assert torch.equal(low["n"], weights["n"]) and low["n"].dtype == torch.int64
    assert list(result) == ["y", "ids", "x", "k", "big", "n", "w"] and result["k"] == 3
    assert result["x"] is x and result["ids"] is ids, "as given, not through bfloat16"
    assert torch.equal(result["big"], ids * weights["n"])
    assert torch.equal(result["n"], weights["n"])
    assert torch.equal(result["w"], weights["w"]), "as given, though y is computed in bfloat16"
    y, (e, again) = result["y"]
    assert y.dtype == e.dtype == torch.float32 and torch.equal(y, again)
    exact = torch.nn.functional.linear(x.bfloat16(), weights["w"].bfloat16()).float()
    assert torch.equal(y, exact)
    assert torch.equal(e, weights["table"].bfloat16()[ids].float())
    assert changed.inputs == program.inputs and changed.values["x"] == program.values["x"]
    assert changed.values["y"].dtype == "bfloat16"
    assert all(weights[name].dtype != torch.bfloat16 for name in weights), "the originals stay"


class Mixed(nn.Module):
    """Values that are float32 whatever their operands are, met by a convolution afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("numbers", torch.arange(8))
        self.register_buffer("scale", torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(x) * self.scale
        y = y + torch.arange(0, 0.8, 0.1).view(8, 1, 1)
        y = y + (self.numbers / 8).view(8, 1, 1)
        y = y + torch.zeros(8, 1, 1)
        y = y.float() * torch.full((1,), 0.5)
        return self.second(torch.nn.functional.max_pool2d(y, 3, 1, 1)), y.argmax(1), self.scale


@torch.no_grad()
def test_values_that_are_float32_by_themselves() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 6, 6)
    captured = capture(model, (x,))
    program, weights = captured.program, captured.weights
    changed, low, result = lowered(program, weights, x)
    exact = model(x)
    ran = Executor(changed, low)(x)
    for found in (result, ran):
        assert [v.dtype for v in found] == [torch.float32, torch.int64, torch.float32]
        error, scale = float((found[0] - exact[0]).abs().max()), float(exact[0].abs().max())
        assert error <= 4 * EPS * scale
        assert error > 0.01 * EPS * scale, "has not been computed in bfloat16"
        assert torch.equal(found[2], exact[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_float_at_all(dtype: torch.dtype) -> None:
    ops = (Op("aten.add.Tensor", "y", (Ref("x"), Ref("x"))),)
    values = {"x": info("s0", dtype="int64"), "y": info("s0", dtype="int64")}
    program = Program(("x",), (Ref("y"), None, True), ops, values)
    changed, low = lower_precision(program, {}, dtype)
    assert changed == program and low == {}
