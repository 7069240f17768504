"""Uneven clusters: exact, faster than equal shares, within every node's memory, or refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import disco
from disco import Cluster, InputError, Link, Node
from disco.capture import capture
from disco.partition import Problem
from disco.partition.cost import predict_latency
from disco.partition.share_choice import choose_shares
from disco.partition.shares import Shares
from disco_kernels import Ownership

EXACT_EPS = 64
LINK = Link(1000, 0.2)
SPEEDS = {2: (3.0, 1.0), 3: (1.0, 4.0, 2.0), 4: (8.0, 1.0, 1.0, 3.0), 8: (1, 2, 3, 4, 5, 6, 7, 8)}


def uneven(speeds: tuple[float, ...], memories: tuple[int | None, ...] = ()) -> Cluster:
    limits = memories or (None,) * len(speeds)
    pairs = enumerate(zip(speeds, limits, strict=True))
    return Cluster([Node(f"n{i}", float(speed), memory, LINK) for i, (speed, memory) in pairs])


class Residual(nn.Module):
    """Residual ties, groups, a depthwise layer, a gate, a concatenation and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=8)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.fc1, self.fc2 = nn.Conv2d(32, 12, 1), nn.Conv2d(12, 32, 1)
        self.left, self.right = nn.Conv2d(32, 20, 1), nn.Conv2d(32, 28, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.depthwise(torch.relu(self.grouped(x))))
        x = x * self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(torch.cat([self.left(x), self.right(x)], 1).relu().mean((2, 3)))


class Transformer(nn.Module):
    """Nine heads of four channels, so that eight nodes get uneven ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(36), nn.Linear(36, 108)
        self.out, self.up, self.down = nn.Linear(36, 36), nn.Linear(36, 72), nn.Linear(72, 36)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 9, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(nn.functional.gelu(self.up(x)))


MODELS = {"residual": (Residual, (3, 9, 9)), "transformer": (Transformer, (7, 36))}


@pytest.mark.parametrize("nodes", SPEEDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_exact_on_uneven_nodes(name: str, nodes: int) -> None:
    """Batch 1 and 4, dense and with a pattern made for the cluster; on every rank."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, cluster = make().eval(), uneven(SPEEDS[nodes])
    example = torch.randn(2, *shape)
    for density in (None, 0.25):
        if density is not None:
            pattern = disco.sparsify_(model, cluster, density, (example,))
            partitioned = disco.partition(model, (example,), cluster, pattern=pattern)
        else:
            partitioned = disco.partition(model, (example,), cluster)
        assert not partitioned.plan.replicated, str(partitioned.plan)
        for batch in (1, 4):
            x = torch.randn(batch, *shape)
            exact = copy.deepcopy(model).double()(x.double())
            allowed = EXACT_EPS * torch.finfo(torch.float32).eps * float(exact.abs().max())
            for found in partitioned.run_ranks(x):
                assert float((found - exact).abs().max()) <= allowed


@pytest.mark.parametrize("nodes", SPEEDS)
def test_shares_follow_the_speeds(nodes: int) -> None:
    """Without links and with wide layers: in proportion, and faster than equal shares."""
    speeds = SPEEDS[nodes]
    cluster = Cluster([Node(f"n{i}", float(speed)) for i, speed in enumerate(speeds)])
    model = nn.Sequential(nn.Conv2d(3, 576, 1), nn.ReLU(), nn.Conv2d(576, 576, 1)).eval()
    x = (torch.randn(1, 3, 4, 4),)
    plan = disco.partition(model, x, cluster).plan
    for layer in plan.layers[:2]:
        for count, speed in zip(layer.out_counts, speeds, strict=True):
            assert count == pytest.approx(576 * speed / sum(speeds), abs=1)
    equal = disco.partition(model, x, nodes).plan
    assert plan.latency is not None
    assert plan.latency.total_ms < predict_latency(equal, cluster.nodes).total_ms
    assert sum(plan.flops_per_rank) == plan.flops_dense


def test_a_pattern_for_equal_shares_keeps_them() -> None:
    """An existing checkpoint: its zeros are worth more than a little balance."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(i, 32, 3, padding=1) for i in (3, 32, 32, 32)]).eval()
    x = (torch.randn(1, 3, 16, 16),)
    disco.sparsify_(model, 2, 0.1, x)
    slow_link = Link(1, 1.0)
    cluster = Cluster([Node("a", 1.1, None, slow_link), Node("b", 1.0, None, slow_link)])
    plan = disco.partition(model, x, cluster).plan
    assert [layer.out_counts for layer in plan.layers[:4]] == [(16, 16)] * 4
    assert plan.bytes_per_image == disco.partition(model, x, 2).plan.bytes_per_image


def test_shares_for_the_density_to_come() -> None:
    """FLOPs of a sparse rank grow faster than its share; the plan after it is well balanced."""
    torch.manual_seed(0)
    cluster = Cluster([Node("a", 4.0), Node("b", 1.0)])
    x = (torch.randn(1, 3, 8, 8),)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Conv2d(i, 128, 3, padding=1) for i in (3, 128, 128, 128)]).eval()

    sparse, problem = model(), Problem(*capture(model(), x), {})
    dense_shares = choose_shares(problem, cluster).everywhere
    sparse_shares = choose_shares(problem, cluster, 0.1).everywhere
    assert sparse_shares[0] / sparse_shares[1] < dense_shares[0] / dense_shares[1]
    pattern = disco.sparsify_(sparse, cluster, 0.1, x)
    plan = disco.partition(sparse, x, cluster, pattern=pattern).plan
    assert plan.latency is not None
    by_speed = model()
    chosen = Problem(*capture(by_speed, x), {}).decide(Shares(dense_shares)).plan()
    assert chosen.layers[1].out_counts[0] > plan.layers[1].out_counts[0]
    slowest = [max(f / s for f, s in zip(plan.flops_per_rank, (4.0, 1.0), strict=True))]
    assert slowest[0] < 1.35 * sum(plan.flops_per_rank) / 5.0


def _heavy_tail() -> nn.Module:
    """Late layers hold most weights on the smallest maps, as in every classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 256, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256 * 4, 512),
    ).eval()


def test_memory_is_kept_to_at_the_expense_of_late_layers() -> None:
    x = (torch.randn(1, 3, 32, 32),)
    free = disco.partition(_heavy_tail(), x, uneven((2.0, 1.0))).plan
    need = free.memory[0].total_bytes
    limit = need * 6 // 10
    tight = disco.partition(_heavy_tail(), x, uneven((2.0, 1.0), (limit, None)))
    plan = tight.plan
    assert plan.memory[0].total_bytes <= limit < need
    before, after = ({la.name: la.out_counts[0] for la in p.layers[:4]} for p in (free, plan))
    assert after["7"] < before["7"] and after["0"] == before["0"]
    assert plan.latency is not None and free.latency is not None
    assert plan.latency.total_ms >= free.latency.total_ms
    assert f"memory limits: {limit / 1e6:.2f} any MB" in str(plan)
    y = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tight(y), _heavy_tail()(y), rtol=1e-4, atol=1e-5)


def test_what_cannot_fit_names_node_need_and_limit() -> None:
    x = (torch.randn(1, 3, 32, 32),)
    with pytest.raises(InputError) as caught:
        disco.partition(_heavy_tail(), x, uneven((2.0, 1.0), (400_000, 500_000)))
    text = str(caught.value)
    assert "node 'n" in text and " and has 0." in text and "MB (weights " in text
    assert "give it more memory" in text and "\n" not in text
    # Speeds need not be known for that.
    nodes = [Node("small", memory_bytes=10_000), Node("large")]
    message = r"node 'small' \(rank 0\) needs .* and has 0\.01 MB"
    with pytest.raises(InputError, match=message):
        disco.partition(_heavy_tail(), x, Cluster(nodes))
    nodes[0] = Node("small", memory_bytes=100_000)
    message = r"node 'small' \(rank 0\) is left without any work: .* into its 0\.10 MB"
    with pytest.raises(InputError, match=message):
        disco.partition(_heavy_tail(), x, Cluster(nodes))


def test_fixed_ownership_is_not_moved() -> None:
    x = (torch.randn(1, 3, 32, 32),)
    plan = disco.partition(_heavy_tail(), x, 2).plan
    fixed = {
        layer.name: Ownership.contiguous(sum(layer.out_counts), 2) for layer in plan.layers[:4]
    }
    limit = plan.memory[0].total_bytes * 8 // 10
    cluster = uneven((1.0, 1.0), (limit, None))
    with pytest.raises(InputError, match=r"node 'n0' \(rank 0\) needs"):
        disco.partition(_heavy_tail(), x, cluster, ownership=fixed)
    assert disco.partition(_heavy_tail(), x, cluster).plan.memory[0].total_bytes <= limit


def test_sparsified_to_fit() -> None:
    """Shares are chosen for the memory that the sparse model will need."""
    x = (torch.randn(1, 3, 32, 32),)
    model = _heavy_tail()
    free = disco.partition(model, x, uneven((1.0, 1.0))).plan
    limit = free.memory[0].total_bytes * 5 // 10
    cluster = uneven((1.0, 1.0), (limit, None))
    pattern = disco.sparsify_(model, cluster, 0.2, x)
    plan = disco.partition(model, x, cluster, pattern=pattern).plan
    assert plan.memory[0].total_bytes <= limit
    assert plan.memory[0].total_bytes > 0.7 * limit, "no more is moved than has to be"


def test_a_node_without_work() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    x = (torch.randn(1, 3, 8, 8),)
    message = r"node 'node4' \(rank 4\) is left without any work: .* to 4 of these 6 nodes"
    with pytest.raises(InputError, match=message):
        disco.partition(model, x, 6)
    with pytest.raises(InputError, match="node 'n1' .* without any work"):
        disco.partition(model, x, Cluster([Node("n0", 1000.0), Node("n1", 0.001)]))
    # With links, leaving it out is predicted to be faster: the plan stands and says so.
    cluster = uneven((1000.0, 0.001))
    plan = disco.partition(model, x, cluster).plan
    assert plan.flops_per_rank[1] == 0
    assert plan.faster_on is not None and plan.faster_on.nodes == ("n0",)
    assert "this plan is for all 2 that were asked for" in str(plan)


def test_fewer_nodes_are_the_fastest_ones() -> None:
    model, x = Residual().eval(), (torch.randn(2, 3, 9, 9),)
    plan = disco.partition(model, x, uneven((1.0, 4.0, 2.0))).plan
    assert [fewer.nodes for fewer in plan.fewer_nodes] == [("n1",), ("n1", "n2")]
    alone = disco.partition(model, x, 1).plan
    one = predict_latency(alone, (Node("n1", 4.0),))
    assert plan.fewer_nodes[0].latency_ms == pytest.approx(one.total_ms)


SCRIPT = """
import sys, torch, disco
from disco import Cluster, Link, Node
from tests.partition.test_cluster_plan import Residual
torch.manual_seed(0)
model, x = Residual().eval(), torch.randn(2, 3, 9, 9)
link = Link(100, 0.3)
limits = (None, 60_000, None)
nodes = zip("abc", (3.0, 2.0, 1.0), limits)
cluster = Cluster([Node(name, speed, memory, link) for name, speed, memory in nodes])
pattern = disco.sparsify_(model, cluster, 0.3, (x,))
disco.partition(model, (x,), cluster, pattern=pattern).save(sys.argv[1])
disco.partition(model, (x,), cluster).save(sys.argv[2])
"""


def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Whatever Python's hashes are: manifest and shards."""
    folders = []
    for seed in ("1", "4242"):
        made = [tmp_path / f"{kind}-{seed}" for kind in ("pattern", "free")]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SCRIPT, *map(str, made)]
        root = Path(__file__).parents[2]
        subprocess.run(command, check=True, env=environment, cwd=root)
        folders.append(made)
    compared = 0
    for first, second in zip(*folders, strict=True):
        for path in sorted(first.iterdir()):
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name
            compared += 1
    assert compared == 2 * 4


@pytest.mark.parametrize("kilobytes", [400, 600, 800, 1200])
def test_a_small_memory_is_used(kilobytes: int) -> None:
    """Work is moved away until it fits, and not much more."""
    x = (torch.randn(1, 3, 32, 32),)
    limit = kilobytes * 1000
    nodes = [Node("small", memory_bytes=limit), Node("large")]
    need = disco.partition(_heavy_tail(), x, Cluster(nodes)).plan.memory[0].total_bytes
    assert 0.8 * limit <= need <= limit


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
def test_a_density_that_is_none_is_one_line(density: float) -> None:
    cluster = uneven((2.0, 1.0), (10**9, None))
    with pytest.raises(InputError, match=r"density must be in \[0, 1\]"):
        disco.sparsify_(_heavy_tail(), cluster, density, (torch.randn(1, 3, 32, 32),))
