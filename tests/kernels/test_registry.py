"""The choice among the backends."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.backends.cpu import extension_status
from tests.kernels.cases import needs_extension
from tests.kernels.models import linear
from tests.kernels.process import script

CPU = torch.device("cpu")


@needs_extension
def test_automatic_choice_takes_the_kernels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve(None, CPU, torch.float32) == "cpu"
        assert registry.resolve("reference", CPU, torch.float32) == "reference"
        assert registry.resolve("", CPU, torch.float32) == "cpu"


def test_automatic_choice_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_said", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            for dtype in (torch.float64, torch.float16):
                assert registry.resolve(None, CPU, dtype) == "reference"
    texts = [str(w.message) for w in said]
    assert len(texts) == 2 and all(w.category is RuntimeWarning for w in said)
    assert "float64 on cpu runs on the plain-torch reference" in texts[0]
    assert (
        "cpu: float32 and bfloat16 only, given torch.float64" in texts[0]
        or extension_status().error
    )


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("cpu", torch.float64, "cpu: float32 and bfloat16 only, given torch.float64"),
        ("cuda", torch.float32, "cuda: it has no layers, only gather_pack"),
        ("triton", torch.float32, "triton: tensors on cuda devices only, given cpu"),
        ("nonsense", torch.float32, "nonsense: no such backend; allowed: cuda, triton, cpu, ref"),
        ("reference", torch.int32, "reference: floating dtypes only, given torch.int32"),
    ],
)
def test_explicit_requests_raise_with_every_reason(
    name: str, dtype: torch.dtype, reason: str
) -> None:
    if extension_status().error is not None and name == "cpu":
        pytest.skip("no extension")
    with pytest.raises(dk.BackendUnavailable) as raised:
        registry.resolve(name, CPU, dtype)
    text = str(raised.value)
    assert f"backend {name!r} was asked for, but cannot serve {dtype} tensors on cpu" in text
    assert reason in text
    for known in registry.names():
        assert f"\n  {known}: " in text
    assert "DISCO_KERNELS_BACKEND" in text.splitlines()[-1]


def test_no_backend_at_all() -> None:
    with pytest.raises(dk.BackendUnavailable, match="reference: floating dtypes only"):
        registry.resolve(None, CPU, torch.int64)
    with pytest.raises(dk.BackendUnavailable, match="'nonsense': no such backend"):
        registry.get("nonsense")


@needs_extension
def test_the_variable_is_an_explicit_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.BACKEND_VARIABLE, "reference")
    assert registry.resolve(None, CPU, torch.float32) == "reference"
    assert registry.resolve("cpu", CPU, torch.float32) == "cpu"  # an argument goes first
    assert dk.PartialLinear(torch.zeros(2, 2), [2]).backend == "reference"
    monkeypatch.setenv(registry.BACKEND_VARIABLE, "cuda")
    with pytest.raises(dk.BackendUnavailable, match="cuda: it has no layers"):
        registry.resolve(None, CPU, torch.float32)
    model = nn.Sequential(linear())
    with pytest.raises(dk.BackendUnavailable, match="cuda: it has no layers"):
        dk.swap_(model, 2)
    assert type(model[0]) is nn.Linear
    monkeypatch.setenv(registry.BACKEND_VARIABLE, "")
    assert registry.resolve(None, CPU, torch.float32) == "cpu"


def test_a_backend_for_messages_alone_is_chosen_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = registry.get("cuda")
    monkeypatch.setattr(cuda, "refusal", lambda device, dtype: None)
    monkeypatch.delenv(registry.BACKEND_VARIABLE, raising=False)
    assert registry.resolve(None, CPU, torch.float32, "gather_pack") == "cuda"
    assert registry.resolve("cuda", CPU, torch.float32, "gather_pack") == "cuda"
    assert registry.resolve(None, CPU, torch.float32) != "cuda"
    with pytest.raises(dk.BackendUnavailable, match="cuda: it has no layers.*ask for triton"):
        dk.PartialLinear(torch.zeros(2, 2), [2], backend="cuda")
    with pytest.raises(dk.BackendUnavailable, match="it has no layers"):
        cuda.packed_numel(1, [1], 1, torch.float32)


def test_a_missing_extension_is_named_and_the_reference_runs() -> None:
    code = """
import sys, warnings, torch
sys.modules["disco_kernels._C"] = None
import disco_kernels as dk
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight[:2, 2:] = 0
        model[1].weight[:2, 2:] = 0
        x = torch.randn(1, 4, 4, 4)
        wanted = model(x)
        report = dk.swap_(model, 2)
        assert len(report.swapped) == 2, report
        assert torch.allclose(model(x), wanted, atol=1e-6)
    dk.GatherPack([[0]])(torch.zeros(1, 2, 3, 3))
    print(dk.backend_of(model[0]), dk.PartialLinear(torch.zeros(2, 2), [2]).backend)
print(len(said), said[0].message)
try:
    dk.PartialLinear(torch.zeros(2, 2), [2], backend="cpu")
except dk.BackendUnavailable as error:
    print(error)
"""
    printed = script(code).splitlines()
    assert printed[0] == "reference reference"
    assert printed[1].startswith("1 disco_kernels: torch.float32 on cpu runs on the plain-torch")
    assert "the compiled extension is missing or does not load" in printed[1]
    assert any(line.startswith("  cpu: the compiled extension is missing") for line in printed)
