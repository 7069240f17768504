"""Partitioned models as drop-ins: several inputs, nested outputs, any batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.errors import InputError
from disco_kernels import Ownership


class TwoInputs(nn.Module):
    """An image and a vector in; a dict of a tuple and a map out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3, padding=1)
        self.vector = nn.Linear(4, 6)
        self.mix = nn.Conv2d(6, 5, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, object]:
        features = torch.relu(self.image(image)) * self.vector(vector)[:, :, None, None]
        y = self.mix(features * self.scale.view(1, -1, 1, 1))
        return {"pooled": (y.amax((2, 3)), y.mean()), "map": y, "input": vector}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return TwoInputs().eval()


@pytest.fixture(scope="module")
def partitioned(model: nn.Module) -> disco.Partitioned:
    return disco.partition(model, (torch.randn(1, 3, 6, 6), torch.randn(1, 4)), 4)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_nested_results_of_two_inputs(
    model: nn.Module, partitioned: disco.Partitioned, batch: int
) -> None:
    image, vector = torch.randn(batch, 3, 6, 6), torch.randn(batch, 4)
    exact = copy.deepcopy(model).double()(image.double(), vector.double())
    results = partitioned.run_ranks(image, vector)
    assert len(results) == 4
    for result in results:
        assert list(result) == ["pooled", "map", "input"]
        assert isinstance(result["pooled"], tuple)
        assert torch.equal(result["input"], vector)
        pairs = zip(
            (*result["pooled"], result["map"]), (*exact["pooled"], exact["map"]), strict=True
        )
        for found, expected in pairs:
            error, scale = float((found - expected).abs().max()), float(expected.abs().max())
            assert error <= 32 * torch.finfo(torch.float32).eps * max(scale, 1.0)


def test_inputs_have_to_agree_in_batch(partitioned: disco.Partitioned) -> None:
    with pytest.raises(InputError, match=r"'vector' must be .* \(s0 is 2 before\), given \[3, 4\]"):
        partitioned(torch.randn(2, 3, 6, 6), torch.randn(3, 4))


def test_plan_counts_bytes_of_one_image(partitioned: disco.Partitioned) -> None:
    """Nothing that is exchanged may be missed, whatever dimension it is sharded over."""
    values = {e.value: e for e in partitioned.plan.exchanges}
    assert all(e.bytes_per_channel > 0 for e in values.values())
    assert not any(e.gathered_by == () and e.consumers == () for e in values.values())


@torch.no_grad()
def test_later_changes_to_the_model_do_not_reach_it() -> None:
    """Neither through sliced weights nor through those that every rank has whole."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.LayerNorm((4, 4, 4)),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    x = torch.randn(2, 3, 6, 6)
    partitioned = disco.partition(model, (x,), 2)
    assert [layer.name for layer in partitioned.plan.replicated] == ["2"]
    before = partitioned(x)
    for parameter in model.parameters():
        parameter.fill_(7.0)
    assert torch.equal(partitioned(x), before)


class Masks(nn.Module):
    """Masks and indices, which are exchanged too: as outputs, and where an op needs them whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        mask = y > 0
        counts = mask.sum((2, 3))
        return y, mask, counts, y.flatten(2).argmax(2), mask.flip(1), mask.permute(0, 2, 3, 1)


@torch.no_grad()
@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_masks_and_whole_numbers_are_exchanged(nodes: int) -> None:
    torch.manual_seed(0)
    model, x = Masks().eval(), torch.randn(2, 3, 6, 6)
    cluster = disco.Cluster(nodes)
    ownership = None
    if nodes == 8:  # more nodes than channels: some own nothing
        ownership = {"conv": Ownership(((4, 0), (), (2,), (), (1,), (3, 5), (), ()))}
    partitioned = disco.partition(model, (x,), cluster, ownership=ownership)
    y = partitioned(x)[0]
    torch.testing.assert_close(y, model(x)[0])
    mask = y > 0
    expected = (
        *(y, mask, mask.sum((2, 3)), y.flatten(2).argmax(2)),
        *(mask.flip(1), mask.permute(0, 2, 3, 1)),
    )
    for result in partitioned.run_ranks(x):
        for found, wanted in zip(result, expected, strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": lambda x: x}, "model must be a torch.nn.Module, given function"),
        ({"model": nn.Conv2d(3, 4, 1, device="meta")}, "device 'meta'"),
        ({"example_inputs": None}, "example_inputs must be a tuple .* given NoneType"),
        ({"example_kwargs": [1]}, "example_kwargs must be a dict .* given list"),
        ({"tolerance": float("nan")}, "tolerance must be a number, 0 or more; given nan"),
        ({"tolerance": "0"}, "tolerance must be a number, 0 or more; given '0'"),
        ({"pattern": "p.json"}, r"disco_kernels\.Pattern .* given str"),
        ({"ownership": [1]}, r"disco_kernels\.Ownership, given list"),
        ({"ownership": {"conv": [[0], [1]]}}, "of layer 'conv' must be a .* given list"),
    ],
)
def test_arguments_of_another_kind_are_refused(options: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "model": Masks().eval(),
        "example_inputs": (torch.randn(2, 3, 6, 6),),
    }
    with pytest.raises(InputError, match=message) as caught:
        disco.partition(**{**given, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
