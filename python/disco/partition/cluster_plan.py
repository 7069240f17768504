"""The plan for a cluster: shares that make it fast (`disco.partition.share_choice`) and that fit.

Where a node's memory does not do, it gives up shares of layers (`disco.partition.lighten`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from disco.errors import InputError
from disco.partition.cluster import Cluster
from disco.partition.cost import predict_latency
from disco.partition.lighten import lighten
from disco.partition.plan import Plan
from disco.partition.planner import Decisions, build_all
from disco.partition.prediction import FewerNodes
from disco.partition.rank_builder import RankProgram
from disco.partition.share_choice import Problem, choose_shares
from disco.partition.shares import Shares
from disco.partition.thin import thinned, thinned_memory

# Memory that has to be found is found in a few rounds: what is moved adds activations elsewhere.
_ROUNDS = 12


class _Built(NamedTuple):
    plan: Plan
    ranks: tuple[RankProgram, ...]
    too_heavy: tuple[int, ...]
    lightened: bool


def plan_for(
    problem: Problem, cluster: Cluster, *, idle_allowed: bool = False
) -> tuple[Plan, tuple[RankProgram, ...]]:
    """The plan for all nodes of `cluster`, and the ranks.

    Args:
        problem: what to partition.
        cluster: for which nodes.
        idle_allowed: a node may be left without any work, as the user's own ownership may do.

    Raises:
        InputError: it does not fit into a node's memory, or a node would have nothing to do
            although no fewer nodes are faster.
    """
    built = _fitting(problem, choose_shares(problem, cluster), cluster)
    if problem.partial_sums and not all(built.plan.flops_per_rank):
        # A node that owns none of a layer's inputs has nothing to multiply for its partial sums.
        problem = replace(problem, partial_sums=False)
        built = _fitting(problem, choose_shares(problem, cluster), cluster)
    if built.too_heavy:
        raise InputError(_why_too_heavy(built, cluster))
    fewer = tuple(_on_fewer(problem, cluster)) if cluster.speeds_known else ()
    plan = replace(built.plan, fewer_nodes=fewer)
    if not idle_allowed:
        _check_work(plan, built.lightened)
    return plan, built.ranks


def shares_for(problem: Problem, cluster: Cluster, density: float) -> Shares:
    """Shares for a model that is to be sparsified to this density, as far as they can fit."""
    shares = choose_shares(problem, cluster, density)
    limits = [node.memory_bytes for node in cluster.nodes]
    if not any(limits):
        return shares
    for _ in range(_ROUNDS):
        decisions = problem.decide(shares)
        plan, _ = build_all(decisions)
        memory = thinned_memory(decisions, plan, thinned(plan, density))
        lighter = lighten(decisions, shares, memory, limits)
        if lighter is None:
            break
        shares = lighter
    return shares


def _fitting(problem: Problem, shares: Shares, cluster: Cluster) -> _Built:
    """With shares moved from nodes that they are too heavy for; the last try if none fits."""
    limits = [node.memory_bytes for node in cluster.nodes]
    for _ in range(_ROUNDS):
        decisions = problem.decide(shares)
        built = _build(decisions, cluster, bool(shares.of_layer))
        if not built.too_heavy:
            break
        if problem.partial_sums:
            # They take the weights of others' outputs, which stay where the inputs are whatever
            # share of the layer moves.
            problem = replace(problem, partial_sums=False)
            continue
        lighter = lighten(decisions, shares, built.plan.memory, limits)
        if lighter is None:
            break
        shares = lighter
    return built


def _build(decisions: Decisions, cluster: Cluster, lightened: bool) -> _Built:
    plan, ranks = build_all(decisions)
    latency = predict_latency(plan, cluster.nodes) if cluster.speeds_known else None
    too_heavy = tuple(
        rank
        for rank, (node, memory) in enumerate(zip(cluster.nodes, plan.memory, strict=True))
        if node.memory_bytes is not None and memory.total_bytes > node.memory_bytes
    )
    return _Built(replace(plan, nodes=cluster.nodes, latency=latency), ranks, too_heavy, lightened)


def _on_fewer(problem: Problem, cluster: Cluster) -> Iterator[FewerNodes]:
    # What is fixed is fixed for all nodes; of fewer ones the zeros alone tell what they exchange.
    free = replace(problem, out_ownership={})
    limited = any(node.memory_bytes is not None for node in cluster.nodes)
    for count in range(1, cluster.world_size):
        chosen = cluster.fastest(count)
        # Not refined: eight nodes have seven such subsets, and what is gained is a few percent.
        shares = choose_shares(free, chosen, refine=False)
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


def _check_work(plan: Plan, lightened: bool) -> None:
    if plan.flops_dense == 0 or plan.faster_on is not None:
        return
    for rank, (node, flops) in enumerate(zip(plan.nodes, plan.flops_per_rank, strict=True)):
        if flops:
            continue
        if lightened and node.memory_bytes is not None:
            raise InputError(
                f"node {node.name!r} (rank {rank}) is left without any work: all of it was moved "
                f"away to fit into its {node.memory_bytes / 1e6:.2f} MB; give it more memory, or "
                "leave it out"
            )
        busy = sum(map(bool, plan.flops_per_rank))
        raise InputError(
            f"node {node.name!r} (rank {rank}) is left without any work: the model's layers can be "
            f"shared out to {busy} of these {plan.world_size} nodes; leave it out"
        )
