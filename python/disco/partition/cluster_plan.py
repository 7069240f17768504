"""The plan for a cluster: shares of its nodes that make it fast and that fit into their memories.

Shares are tried out, not computed: a plan takes a tenth of a second, and only a plan knows the
units that outputs are shared out in, the zeros of the weights and what they leave to be sent.
First come shares by speed and equal shares (a pattern may have been made for them), then small
steps from the better one. Where a node's memory does not do, it gives up shares of layers
(`disco.partition.lighten`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from disco.errors import InputError
from disco.partition.cluster import Cluster
from disco.partition.cost import predict_latency
from disco.partition.lighten import lighten
from disco.partition.plan import Plan
from disco.partition.planner import Decisions, build_all, decide
from disco.partition.prediction import FewerNodes
from disco.partition.rank_builder import RankProgram
from disco.partition.shares import Shares
from disco.program import Program
from disco_kernels.pattern import Ownership

# A node's share is tried this much larger and smaller, then by half of it. A fifth of a layer of 64
# channels on two nodes is 6 of them, which is what roundings of a few channels cannot undo.
_STEPS = (1.2, 1.1)
# Memory that has to be found is found in a few rounds: what is moved adds activations elsewhere.
_ROUNDS = 12


@dataclass(frozen=True)
class Problem:
    """What is to be partitioned, as for `decide`."""

    program: Program
    weights: Mapping[str, Tensor]
    origins: Mapping[str, str]
    out_ownership: Mapping[str, Ownership]
    tolerance: float = 0.0
    dense_exchange: bool = False

    def decide(self, shares: Shares) -> Decisions:
        """With these shares."""
        return decide(
            self.program,
            self.weights,
            self.origins,
            len(shares.everywhere),
            out_ownership=self.out_ownership,
            tolerance=self.tolerance,
            dense_exchange=self.dense_exchange,
            shares=shares,
        )


class _Built(NamedTuple):
    plan: Plan
    ranks: tuple[RankProgram, ...]
    too_heavy: tuple[int, ...]


def plan_for(problem: Problem, cluster: Cluster) -> tuple[Plan, tuple[RankProgram, ...]]:
    """The plan for all nodes of `cluster`, and the ranks.

    Raises:
        InputError: it does not fit into a node's memory, or a node would have nothing to do
            although no fewer nodes are faster.
    """
    built = _fitting(problem, choose_shares(problem, cluster), cluster)
    if built.too_heavy:
        raise InputError(_why_too_heavy(built, cluster))
    fewer = tuple(_on_fewer(problem, cluster)) if cluster.speeds_known else ()
    plan = replace(built.plan, fewer_nodes=fewer)
    _check_work(plan)
    return plan, built.ranks


def choose_shares(problem: Problem, cluster: Cluster) -> Shares:
    """Those of the lowest predicted latency, memory aside; equal ones if speeds are not known."""
    equal = Shares.equal(cluster.world_size)
    if not cluster.speeds_known or cluster.world_size == 1:
        return equal

    def latency(shares: Shares) -> float:
        return predict_latency(problem.decide(shares).plan(), cluster.nodes).total_ms

    by_speed = Shares(cluster.speeds)
    best, least = equal, latency(equal)
    if (found := latency(by_speed)) < least:
        best, least = by_speed, found
    if len({(node.speed_gflops, node.link) for node in cluster.nodes}) == 1:
        return best
    for step in _STEPS:
        for rank in range(cluster.world_size):
            for factor in (step, 1 / step):
                weights = list(best.everywhere)
                weights[rank] *= factor
                trial = Shares(tuple(weights))
                if (found := latency(trial)) < least:
                    best, least = trial, found
                    break
    return best


def _fitting(problem: Problem, shares: Shares, cluster: Cluster) -> _Built:
    """With shares moved from nodes that they are too heavy for; the last try if none fits."""
    limits = [node.memory_bytes for node in cluster.nodes]
    for _ in range(_ROUNDS):
        decisions = problem.decide(shares)
        built = _build(decisions, cluster)
        if not built.too_heavy:
            break
        lighter = lighten(decisions, shares, built.plan.memory, limits)
        if lighter is None:
            break
        shares = lighter
    return built


def _build(decisions: Decisions, cluster: Cluster) -> _Built:
    plan, ranks = build_all(decisions)
    latency = predict_latency(plan, cluster.nodes) if cluster.speeds_known else None
    too_heavy = tuple(
        rank
        for rank, (node, memory) in enumerate(zip(cluster.nodes, plan.memory, strict=True))
        if node.memory_bytes is not None and memory.total_bytes > node.memory_bytes
    )
    return _Built(replace(plan, nodes=cluster.nodes, latency=latency), ranks, too_heavy)


def _on_fewer(problem: Problem, cluster: Cluster) -> Iterator[FewerNodes]:
    # What is fixed is fixed for all nodes; of fewer ones the zeros alone tell what they exchange.
    free = replace(problem, out_ownership={})
    limited = any(node.memory_bytes is not None for node in cluster.nodes)
    for count in range(1, cluster.world_size):
        chosen = cluster.fastest(count)
        shares = choose_shares(free, chosen)
        fits = True
        if limited:
            built = _fitting(free, shares, chosen)
            plan, fits = built.plan, not built.too_heavy
        else:
            plan = free.decide(shares).plan()
        latency = predict_latency(plan, chosen.nodes).total_ms
        yield FewerNodes(tuple(node.name for node in chosen.nodes), latency, fits)


def _why_too_heavy(built: _Built, cluster: Cluster) -> str:
    rank = max(
        built.too_heavy,
        key=lambda r: built.plan.memory[r].total_bytes / (cluster.nodes[r].memory_bytes or 1),
    )
    node, need = cluster.nodes[rank], built.plan.memory[rank]
    limit = (node.memory_bytes or 0) / 1e6
    return (
        f"node {node.name!r} (rank {rank}) needs {need} and has {limit:.2f} MB, and no other node "
        f"has room for more: give it more memory, or the cluster another node"
    )


def _check_work(plan: Plan) -> None:
    if plan.flops_dense == 0:
        return
    for rank, flops in enumerate(plan.flops_per_rank):
        if flops == 0 and plan.faster_on is None:
            busy = sum(map(bool, plan.flops_per_rank))
            raise InputError(
                f"node {plan.nodes[rank].name!r} (rank {rank}) is left without any work: the "
                f"model's layers can be shared out to {busy} of these {plan.world_size} nodes; "
                f"leave it out"
            )
