"""A node's program in a CUDA graph: replayed for new images it computes what it does without."""

from __future__ import annotations

import copy

import pytest
import torch

import disco
from benchmarks.cuda_time import as_graph
from benchmarks.no_network import NoNetwork
from disco.executor import Executor
from tests.gpu.device import needs_gpu
from tests.gpu.models import NODES, images, relative_error, sparse

pytestmark = needs_gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", range(NODES))
def test_a_replay_is_a_request(rank: int, dtype: torch.dtype) -> None:
    model = copy.deepcopy(sparse("small")).to(dtype)
    part = disco.partition(model, (images(2).to(dtype),), NODES).ranks[rank]
    device = torch.device("cuda", 0)
    executor = Executor(part.program, part.weights, NoNetwork(rank, NODES), device=device)
    x = images(4).to(device, dtype)
    kept = []
    with torch.no_grad():
        graph = as_graph(lambda: kept.append(executor(x)))
        x.copy_(images(5)[1:])
        graph.replay()
        replayed = kept[-1].clone()
        eager = executor(x)
    torch.cuda.synchronize()
    assert torch.equal(replayed, eager)
    plain = Executor(
        part.program, part.weights, NoNetwork(rank, NODES), backend="reference", device=device
    )
    most = 5e-6 if dtype == torch.float32 else 5 * 2.0**-8
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert relative_error(eager, plain(x).double().cpu()) <= most
