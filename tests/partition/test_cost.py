"""Predicted latency against hand calculation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import disco
from disco import Cluster, Link, Node
from disco.partition.cost import compute_ms, exchange_ms, predict_latency
from disco.partition.plan import Plan
from disco.partition.prediction import FewerNodes, Latency


def _plan(nodes: int = 2) -> Plan:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = (torch.randn(1, 3, 10, 10),)
    return disco.partition(model, x, nodes, partial_sums=False).plan


def test_the_slowest_rank_and_the_busiest_link() -> None:
    plan = _plan()
    fast, slow = Node("a", 2.0, None, Link(8, 1.0)), Node("b", 1.0, None, Link(4, 3.0))
    first, second, _ = plan.layers
    assert first.flops == (2 * 100 * 3 * 4,) * 2
    assert compute_ms(first, (fast, slow)) == pytest.approx(2400 / 1e6)
    assert compute_ms(second, (fast, slow)) == pytest.approx(2 * 100 * 8 * 2 / 1e6)
    hidden, result = plan.exchanges
    # 4 channels of 400 bytes each way: 1600 bytes at 4 Mbit/s take 3.2 ms, and 3 of latency.
    assert exchange_ms(hidden, (fast, slow)) == pytest.approx(3.2 + 3.0)
    assert exchange_ms(result, (fast, slow)) == pytest.approx(1.6 + 3.0)
    found = predict_latency(plan, (fast, slow))
    assert found.exchange_ms == pytest.approx(10.8)
    assert found.compute_ms == pytest.approx(0.0024 + 0.0032)
    assert found.total_ms == pytest.approx(10.8056)


def test_links_that_are_not_known_take_no_time() -> None:
    plan = _plan()
    nodes = (Node("a", 1.0, None, Link(4, 3.0)), Node("b", 1.0))
    assert exchange_ms(plan.exchanges[0], nodes) == pytest.approx(3.2 + 3.0)
    assert predict_latency(plan, (Node("a", 1.0), Node("b", 1.0))).exchange_ms == 0.0


def test_a_node_receives_from_all_others_over_one_link() -> None:
    plan = _plan(3)  # 8 channels: 3, 3, 2
    nodes = [Node(f"n{i}", 1.0, None, Link(8)) for i in range(3)]
    hidden = plan.exchanges[0]
    # Rank 0 sends 2 x 3 channels, rank 2 receives 6: 2400 bytes at 8 Mbit/s.
    assert exchange_ms(hidden, nodes) == pytest.approx(2.4)
    # What is not sent needs no link.
    alone = replace(hidden, sent=(((), (), ()),) * 3)
    assert exchange_ms(alone, [replace(node, link=Link(8, 5.0)) for node in nodes]) == 0.0


def test_the_plan_says_what_is_predicted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = (torch.randn(1, 3, 10, 10),)
    slow_link = Cluster([Node("a", 1.0, None, Link(1, 5.0)), Node("b", 1.0, None, Link(1, 5.0))])
    plan = disco.partition(model, x, slow_link).plan
    assert plan.nodes == slow_link.nodes
    assert plan.latency == predict_latency(plan, plan.nodes)
    (one,) = plan.fewer_nodes
    flops = 2 * 100 * (3 * 8 + 8 * 4)
    assert one == FewerNodes(("a",), pytest.approx(flops / 1e6), True)  # type: ignore[arg-type]
    assert plan.faster_on == one
    text = str(plan)
    assert "predicted latency: " in text and "nothing overlapped" in text
    assert "fewer nodes are faster: 1 node (a) take 0.01 ms; this plan is for all 2" in text
    assert Plan.from_json(plan.to_json()) == plan

    plan = disco.partition(model, x, Cluster([Node("a", 1.0), Node("b", 1.0)])).plan
    assert plan.faster_on is None and "fewer nodes are faster" not in str(plan)
    plan = disco.partition(model, x, 2).plan
    assert plan.latency is None and plan.fewer_nodes == () and "latency" not in str(plan)


def test_what_does_not_fit_is_not_called_faster() -> None:
    plan = replace(
        _plan(),
        latency=Latency(2.0, 1.0),
        fewer_nodes=(FewerNodes(("a",), 1.0, False), FewerNodes(("a", "b"), 2.5, True)),
    )
    assert plan.faster_on == plan.fewer_nodes[1]
    assert "predicted on 1 node (a): 1.00 ms, but it does not fit there" in str(plan)
