"""Views that put heads into the batch and take them out again are a split and a permutation."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.capture import capture
from disco.program import interpret
from tests.examples import examples


class Attention(nn.Module):
    """Between two linears, so that it reads and makes sharded values."""

    def __init__(self, batch_first: bool, heads: int = 3, need_weights: bool = False) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(12, 12), nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(12, heads, batch_first=batch_first)
        self.batch_first, self.need_weights = batch_first, need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        tokens = x if self.batch_first else x.transpose(0, 1)
        y, _ = self.attention(tokens, tokens, tokens, need_weights=self.need_weights)
        return self.after(x + (y if self.batch_first else y.transpose(0, 1)))


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_torchs_attention_runs_by_heads(batch_first: bool, nodes: int) -> None:
    torch.manual_seed(0)
    model = Attention(batch_first).eval()
    x = torch.randn(2, 5, 12)
    captured = capture(model, (x,))
    kinds = [op.kind for op in captured.program.ops]
    assert kinds.count("aten.slice.Tensor") == 3 and "aten.select.int" not in kinds
    partitioned = disco.partition(model, (x,), nodes)
    assert not partitioned.plan.replicated
    for batch in (1, 4):
        x = torch.randn(batch, 5, 12)
        torch.testing.assert_close(partitioned(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_encoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 4)).eval()
    x = torch.randn(3, 6, 8)
    partitioned = disco.partition(model, (x,), 2)
    assert not partitioned.plan.replicated
    torch.testing.assert_close(partitioned(x), model(x), rtol=1e-5, atol=1e-5)


class Chain(nn.Module):
    """Random views of ``[B, 12, 6]``: dimensions are split, permuted, merged and taken apart."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        rng = random.Random(self.seed)
        y = x + 1
        dims = [[x.shape[0]], [12], [6]]
        for _ in range(6):
            step = rng.choice(["split", "permute", "merge", "take apart"])
            place = rng.randrange(len(dims))
            if step == "split" and len(dims[place]) == 1 and place and dims[place][0] in (12, 6):
                outer = rng.choice([2, 3])
                dims[place : place + 1] = [[outer], [dims[place][0] // outer]]
            elif step == "permute":
                order = rng.sample(range(len(dims)), len(dims))
                dims, y = [dims[i] for i in order], y.permute(order)
            elif step == "merge" and place:
                dims[place - 1 : place + 1] = [dims[place - 1] + dims[place]]
            elif step == "take apart":
                dims[place : place + 1] = [[size] for size in dims[place]]
            y = y.reshape([math.prod(dim) for dim in dims])
        return y.reshape([size for dim in dims for size in dim]) * 2


def test_any_chain_is_exact() -> None:
    rewritten = 0
    for seed in range(examples(30)):
        model, x = Chain(seed), torch.randn(2, 12, 6)
        captured = capture(model, (x,))
        rewritten += any(op.name.endswith(".split") for op in captured.program.ops)
        for batch in (1, 3):
            x = torch.randn(batch, 12, 6)
            found = interpret(captured.program, captured.weights, (x,))
            assert torch.equal(found, model(x)), seed
    assert rewritten >= 2


def test_a_part_of_a_stack_is_a_slice() -> None:
    class Stack(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k = x.unflatten(1, (2, 3)).unbind(1)
            inner = x.unflatten(1, (3, 2))[:, :, 1]  # every other channel is no slice of neighbours
            return q * k + inner

    x = torch.randn(2, 6, 4)
    captured = capture(Stack(), (x,))
    kinds = [op.kind for op in captured.program.ops]
    assert kinds.count("aten.slice.Tensor") == 2 and kinds.count("aten.select.int") == 1
    assert torch.equal(interpret(captured.program, captured.weights, (x,)), Stack()(x))
