"""What outputs lose without a channel, measured on inputs: against the outputs themselves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disco
from disco import Cluster
from disco.capture import Captured, capture
from disco.errors import InputError
from disco.small_models import small_model
from disco.sparsify import tensors_of
from disco.sparsify.calibration import output_energies
from disco.sparsify.find_groups import groups_in
from disco.sparsify.groups import Group
from disco.sparsify.lost_score import Floats, Scores
from tests.sparsify.permuted import check_same_function, trained_like

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Pointwise(nn.Module):
    """1 x 1 convolutions, so that what a channel adds to an output is one product a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 7, 1, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.c = nn.Conv2d(7, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.b(torch.relu(self.a(x)))))
        return torch.as_tensor(self.fc(torch.relu(self.c(x)).mean((2, 3))))


def energies(model: nn.Module, batches: Any, nodes: int = 2) -> dict[str, Floats]:
    captured = capture(model, (X,))
    return output_energies(captured, groups_of(model, captured, nodes), batches)


def groups_of(model: nn.Module, captured: Captured, nodes: int) -> list[Group]:
    return groups_in(captured, model, Cluster(nodes), 0.2, ignore_zeros=True)


@pytest.mark.parametrize(("layer", "seen"), [("b", "norm"), ("c", "c"), ("fc", "fc")])
def test_it_is_what_the_output_lacks_without_the_channel(layer: str, seen: str) -> None:
    torch.manual_seed(1)
    model = trained_like(Pointwise()).double()
    found = energies(model.float(), [(X,)])[f"{layer}.weight"]
    model = model.double()
    outputs: list[Tensor] = []
    model.get_submodule(seen).register_forward_hook(lambda *args: outputs.append(args[2]))
    weight = model.get_submodule(layer).get_parameter("weight")
    with torch.no_grad():
        model(X.double())
        for channel in range(found.shape[1]):
            column = weight[:, channel].clone()
            weight[:, channel] = 0.0
            model(X.double())
            weight[:, channel] = column
            lacking = (outputs[0] - outputs[-1]).square()
            means = lacking.mean([d for d in range(lacking.dim()) if d != 1])
            # The program runs in float32: its inputs and folded weights are off by a few units, and
            # squares by twice as many.
            np.testing.assert_allclose(found[:, channel], means.numpy(), rtol=1e-5)
    assert (found.max(1) > 0).all()


def test_batches_count_by_their_images() -> None:
    model = trained_like(Pointwise())
    whole = energies(model, [(X,)])
    parts = energies(model, ((part,) for part in (X[:1], X[1:4], X[4:])))
    assert sorted(whole) == sorted(parts) == ["b.weight", "c.weight", "fc.weight"]
    for name, matrix in whole.items():
        np.testing.assert_allclose(parts[name], matrix, rtol=1e-5)


def test_a_shared_weight_has_the_sum_of_its_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.both = nn.Conv2d(6, 6, 1, bias=False)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.both(torch.relu(self.both(torch.relu(self.stem(x))))))
            return torch.as_tensor(self.fc(x.mean((2, 3))))

    torch.manual_seed(0)
    model = Shared()
    with torch.no_grad():
        first = torch.relu(model.stem(X))
        second = torch.relu(model.both(first))
        means = sum(x.double().square().mean((0, 2, 3)) for x in (first, second))
        expected = model.both.weight.double()[:, :, 0, 0].square() * means
    np.testing.assert_allclose(energies(model, [(X,)])["both.weight"], expected.numpy(), rtol=1e-5)


def test_what_a_batch_norm_undoes_does_not_count() -> None:
    """Rows ten times as large, and statistics that are, too: the same function."""
    torch.manual_seed(0)
    model = trained_like(small_model("resnet8")(10, 16))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in other.named_modules():
            if isinstance(module, nn.BatchNorm2d) and name.endswith("bn1"):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.mul_(10)
                # The norm adds its eps to the variance, and that has to grow as well.
                module.running_var.add_(module.eps).mul_(100).sub_(module.eps)
                other.get_submodule(name.replace("bn1", "conv1")).get_parameter("weight").mul_(10)
    with torch.no_grad():
        # Statistics are float32; a few of them are off by a unit in their last place.
        torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-5)
    one, two = (energies(m, [(X,)], 4) for m in (model, other))
    for name, matrix in one.items():
        np.testing.assert_allclose(two[name], matrix, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet8", "deit_micro"])
def test_colocation_by_activation(name: str) -> None:
    torch.manual_seed(0)
    model = trained_like(small_model(name)(10, 16))
    before = copy.deepcopy(model)
    report = disco.colocate_(model, 4, (X,), score="activation", calibration=[(X,)], starts=0)
    check_same_function(before, model, X)
    assert report.lost_after < 0.99 * report.lost_before
    for found, lost in ((before, report.lost_before), (model, report.lost_after)):
        captured = capture(found, (X,))
        groups = groups_of(found, captured, 4)
        scores = Scores(groups, 0.2, output_energies(captured, groups, [(X,)]))
        # Permuted sums are rounded otherwise, in float32.
        assert scores.lost(range(len(scores.groups))) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize(
    ("score", "calibration", "message"),
    [
        ("activation", None, "score 'activation' was given without calibration"),
        ("l2", [(X,)], "score 'l2' was given with calibration"),
        ("activation", [], "there was no batch"),
        ("activation", [X], r"a batch of calibration is a tuple .* given Tensor"),
        ("activation", [(X, X)], "takes 1 input"),
        ("activation", [(X[:, :, :8],)], r"\[6, 3, 8, 16\], and the example was"),
        ("activation", [(X.double(),)], r"is torch.float64 \[6, 3, 16, 16\]"),
        ("activation", [(X[:0],)], r"is torch.float32 \[0, 3, 16, 16\]"),
        ("activation", [(X * torch.inf,)], "is not finite: give finite inputs"),
    ],
)
def test_wrong_calibration(score: str, calibration: Any, message: str) -> None:
    model = Pointwise()
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=message):
        disco.colocate_(model, 2, (X,), score=score, calibration=calibration)
    for a, b in zip(tensors_of(before).values(), tensors_of(model).values(), strict=True):
        assert torch.equal(a, b)
