"""The tests' own shortcut gives what an export would."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disco.capture import capture
from tests import exported_once

X = (torch.randn(2, 3, 5, 5),)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.conv(x) * self.scale)


def test_same_structure_is_exported_once_with_its_own_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[nn.Module] = []
    export = exported_once._export

    def counted(model: nn.Module, *args: Any) -> Any:
        calls.append(model)
        return export(model, *args)

    monkeypatch.setattr(exported_once, "_export", counted)
    monkeypatch.setattr(exported_once, "_kept", {})
    models = [Scaled(2.0), Scaled(2.0), Scaled(3.0)]
    hooked = Scaled(2.0)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    models.append(hooked)
    plain = [capture(model, X) for model in models]
    exported_once.install(monkeypatch)
    assert importlib.import_module("disco.capture.capture")._functional is exported_once.functional
    for model, expected in zip(models, plain, strict=True):
        found = capture(model, X)
        assert found.program == expected.program
        assert set(found.weights) == set(expected.weights)
        for name, weight in expected.weights.items():
            assert torch.equal(found.weights[name], weight)
    assert calls == [models[0], models[2], models[3]]
