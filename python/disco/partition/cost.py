"""How long a plan takes on a cluster.

Nothing overlaps: ranks compute a layer, all wait for the slowest, then the tensor is exchanged, and
all wait for that. A real run overlaps computing and sending, so the model is on the high side; it
is meant for comparing plans. What it counts:

- computing: FLOPs of convolutions and linears over the node's speed; other ops take no time;
- an exchange: what the busiest link moves, each way at its bandwidth (full duplex, all links at
  once), and once the latency of the slowest pair that talks;
- the output's gather like any exchange; not how the image comes to the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from disco.partition.cluster import Node
from disco.partition.exchange_plan import ExchangePlan
from disco.partition.plan import LayerPlan, Plan
from disco.partition.prediction import Latency


def predict_latency(plan: Plan, nodes: Sequence[Node]) -> Latency:
    """Of one image. All nodes need a speed."""
    return Latency(
        compute_ms=sum(compute_ms(layer, nodes) for layer in plan.layers),
        exchange_ms=sum(exchange_ms(exchange, nodes) for exchange in plan.exchanges),
    )


def compute_ms(layer: LayerPlan, nodes: Sequence[Node]) -> float:
    """The slowest rank's time for its part of a layer."""
    times = [0.0]
    for flops, node in zip(layer.flops, nodes, strict=False):  # a layer without FLOPs lists none
        assert node.speed_gflops is not None
        times.append(flops / (node.speed_gflops * 1e6))
    return max(times)


def exchange_ms(exchange: ExchangePlan, nodes: Sequence[Node]) -> float:
    """Until every rank has what it needs of one tensor."""
    ranks = range(len(nodes))
    latency = busiest = 0.0
    for rank in ranks:
        sent = sum(exchange.bytes_between(peer, rank) for peer in ranks)
        received = sum(exchange.bytes_between(rank, peer) for peer in ranks)
        link = nodes[rank].link
        if sent or received:
            latency = max(latency, link.latency_ms or 0.0)
        if link.bandwidth_mbit_s is not None:
            busiest = max(busiest, max(sent, received) * 8 / (link.bandwidth_mbit_s * 1e3))
    return latency + busiest
