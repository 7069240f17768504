"""What a CUDA graph of a request needs, looked for without a GPU: from the third request of a shape
on nothing waits for a value, and no tensor is made of Python numbers (which a GPU would have to be
sent)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import disco
from benchmarks.no_network import NoNetwork
from disco.executor import Executor

# What copies from or to the host, or has a result whose size depends on values.
FORBIDDEN = {
    "aten._local_scalar_dense.default",
    "aten.lift_fresh.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
}


class Seen(TorchDispatchMode):
    """Counts the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Norms(nn.Module):
    """Convolutions, a group norm, tokens with layer norms and attention, an arange."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, 1, 1)
        self.group = nn.GroupNorm(3, 24)
        self.last = nn.Conv2d(24, 32, 3, 2, 1)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.relu(self.group(self.conv(x))))
        tokens = self.norm(y.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        places = torch.arange(tokens.shape[0], dtype=torch.float32)
        return self.head(tokens.mean(1)) + places.unsqueeze(1)


@pytest.mark.parametrize("nodes", [2, 3])
def test_later_requests_neither_wait_nor_send_numbers(nodes: int) -> None:
    torch.manual_seed(0)
    model, x = Norms().eval(), torch.randn(2, 3, 8, 8)
    disco.sparsify_(model, nodes, 0.5, (x,))
    parts = disco.partition(model, (x,), nodes)
    kinds = {op.kind for part in parts.ranks for op in part.program.ops}
    assert {"disco.exchange", "disco.group_normalize", "disco.normalize"} <= kinds
    for rank, part in enumerate(parts.ranks):
        executor = Executor(
            part.program, part.weights, NoNetwork(rank, nodes), device=torch.device("cpu")
        )
        expected = [executor(x) for _ in range(3)][-1]
        with Seen() as seen:
            found = executor(x)
        assert sum(seen.ops.values()) > 10
        assert not FORBIDDEN & set(seen.ops), seen.ops
        assert torch.equal(found, expected)


def test_the_check_sees_what_it_looks_for() -> None:
    with Seen() as seen:
        torch.arange(4)[:, None][[0, 2]].sum().item()
    assert FORBIDDEN & set(seen.ops)
