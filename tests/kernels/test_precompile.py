"""`precompile` calls a model for every size that is wanted, and leaves it as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disco_kernels


class Recorded(nn.Module):
    """A layer that notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.seen: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        self.seen.append((x, more))
        assert torch.is_inference_mode_enabled()
        return self.conv(self.norm(x))


def test_one_call_compiles_and_one_is_compared_with_it() -> None:
    model = Recorded().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 7)
    found = disco_kernels.precompile(model, (x,))
    assert [given.shape for given, _ in model.seen] == [(2, 3, 8, 7)] * 2
    assert torch.equal(model.seen[0][0], x)
    assert found.batches == (2,)
    assert len(found.first_seconds) == len(found.second_seconds) == 1
    assert found.first_seconds[0] > 0 and "batch 2: " in str(found)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_batches_lie_in_memory_as_the_examples_do(memory_format: torch.memory_format) -> None:
    model = Recorded().eval()
    x = torch.randn(2, 3, 8, 7).contiguous(memory_format=memory_format)
    scale, table = torch.tensor(2.0), {"mask": torch.ones(2, 5)}
    disco_kernels.precompile(
        model, (x,), batches=(1, 5), example_kwargs={"scale": scale, "table": table}
    )
    ones, fives = model.seen[0], model.seen[2]
    assert [given.shape[0] for given, _ in model.seen] == [1, 1, 5, 5]
    assert torch.equal(fives[0], x[[0, 1, 0, 1, 0]]) and torch.equal(ones[0], x[:1])
    for given, more in (ones, fives):
        assert given.is_contiguous(memory_format=memory_format)
        assert more["scale"] is scale and more["table"]["mask"].shape == (given.shape[0], 5)


def test_a_swapped_model_and_what_it_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[2].weight[:2, 4:7] = 0
        model[2].weight[2:, :3] = 0
    x = torch.randn(2, 8, 9, 9)
    disco_kernels.swap_(model, 2)
    before = model(x)
    assert disco_kernels.precompile(model, (x,), (1, 3)).batches == (1, 3)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("train", "inputs", "batches", "text"),
    [
        (True, (torch.zeros(1, 3, 4, 4),), (), "training mode"),
        (False, (1, None), (), "no tensor with a batch"),
        (False, (torch.tensor(1.0),), (), "no tensor with a batch"),
        (False, (torch.zeros(1, 3, 4, 4),), (2, 0), "1 or more, given 0"),
        (False, (torch.zeros(1, 3, 4, 4),), (2.5,), "1 or more, given 2.5"),
        (False, (torch.zeros(1, 3, 4, 4),), 4, r"write \(4,\)"),
        (False, torch.zeros(1, 3, 4, 4), (), r"give a tuple of all inputs, as \(x,\)"),
        (False, (torch.zeros(0, 3, 4, 4),), (4,), r"\[0, 3, 4, 4\] has nothing in its batch"),
    ],
)
def test_wrong_calls(train: bool, inputs: Any, batches: Any, text: str) -> None:
    model = Recorded().train(train)
    with pytest.raises(ValueError, match=text):
        disco_kernels.precompile(model, inputs, batches)
    assert not model.seen
