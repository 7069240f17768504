"""What disco has compiled or partitioned, as a part of models that torch traces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.errors import InputError
from tests.kernels.process import script

X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Around(nn.Module):
    """Work of torch's own on both sides of what is in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.middle(x + 1)) * 2


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()


@pytest.fixture(params=["compile", "partition"])
def around(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[Around]:
    if request.param == "compile":
        yield Around(disco.compile(model, 2, example_inputs=(X,)))
    else:
        yield Around(disco.partition(model, (X,), 2))
    torch._dynamo.reset()


@torch.no_grad()
def test_torch_compile_works_around_it(around: Around) -> None:
    """In graphs of its own before and after it, and with the same bits."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(around, backend=backend)
    for batch in (1, 2, 3, 2):  # the second size compiles anew, for any batch
        x = X.expand(batch, -1, -1, -1).contiguous()
        assert torch.equal(compiled(x), around(x))
    assert [len(targets) for targets in graphs] == [1, 2] * 2, "once for one image, then for any"


def test_it_cannot_be_exported(around: Around) -> None:
    with pytest.raises(InputError, match="cannot be exported: .*export the model that it was"):
        torch.export.export(around, (X,), strict=False)
    # torch's compiler, which exports strictly, puts an error of its own around it.
    with pytest.raises(Exception, match=r"cannot be exported|Observed exception"):
        torch.export.export(around, (X,), strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_cannot_be_recorded(around: Around) -> None:
    """What torch.jit.trace would record is the numbers of one call."""
    with pytest.raises(InputError, match="cannot be exported"):
        torch.jit.trace(around, (X,))


def test_loading_and_running_import_no_compiler(model: nn.Module, tmp_path: Path) -> None:
    disco.partition(model, (X,), 2).save(tmp_path / "two")
    loaded_then_compiled = """
import sys, torch, disco
model, x = disco.load(sys.argv[1]), torch.randn(2, 3, 12, 12)
with torch.no_grad():
    before = model(x)
    assert "torch._dynamo" not in sys.modules
    assert torch.equal(torch.compile(model, backend="eager")(x), before)
"""
    script(loaded_then_compiled.replace("sys.argv[1]", repr(str(tmp_path / "two"))))
