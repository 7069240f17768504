"""Shares of a cluster's nodes that make the predicted latency low, memory aside.

Shares are tried out, not computed: a plan takes a tenth of a second, and only a plan knows the
units that outputs are shared out in, the zeros of the weights and what they leave to be sent.
First come equal shares (a pattern may have been made for them) and shares by speed, then small
steps from the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from disco.partition.cluster import Cluster
from disco.partition.cost import predict_latency
from disco.partition.planner import Decisions, decide
from disco.partition.shares import Shares
from disco.partition.thin import thinned
from disco.program import Program
from disco_kernels.pattern import Ownership

# Shares by powers of the speed: FLOPs grow faster than a share where a pattern is to come, since a
# rank reads all of its own channels and few of the others'.
_POWERS = (0.0, 0.5, 0.75, 1.0)
# Then a node's share is tried this much larger and smaller. A tenth of half of 64 channels is 3 of
# them; less is lost in rounding to whole channels.
_STEPS = (1.2, 1.1)


@dataclass(frozen=True)
class Problem:
    """What is to be partitioned, as for `decide`."""

    program: Program
    weights: Mapping[str, Tensor]
    origins: Mapping[str, str]
    out_ownership: Mapping[str, Ownership]
    tolerance: float = 0.0
    dense_exchange: bool = False
    partial_sums: bool = False
    permute: bool = False
    kept_order: tuple[str, ...] = ()
    wire_dtype: str | None = None
    survivable: bool = False
    # Which columns of the weights are in use, which no share changes.
    known_columns: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

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
            partial_sums=self.partial_sums,
            permute=self.permute,
            kept_order=self.kept_order,
            wire_dtype=self.wire_dtype,
            survivable=self.survivable,
            known_columns=self.known_columns,
        )


def choose_shares(
    problem: Problem, cluster: Cluster, density: float | None = None, refine: bool = True
) -> Shares:
    """Those of the lowest predicted latency; equal ones if speeds are not known.

    Args:
        problem: with the weights as they are.
        cluster: its nodes share the layers out.
        density: that the weights will be sparsified to; None if they stay.
        refine: take small steps from the best power of the speeds. Not where outputs are shared
            out already: what is left would hardly move.
    """
    if not cluster.speeds_known or cluster.world_size == 1:
        return Shares.equal(cluster.world_size)

    def latency(shares: Shares) -> float:
        plan = problem.decide(shares).plan()
        expected = plan if density is None else thinned(plan, density)
        return predict_latency(expected, cluster.nodes).total_ms

    alike = len({(node.speed_gflops, node.link) for node in cluster.nodes}) == 1
    powers = _POWERS[:1] if alike else _POWERS
    tried = [Shares(tuple(speed**power for speed in cluster.speeds)) for power in powers]
    latencies = [latency(shares) for shares in tried]
    least = min(latencies)
    best = tried[latencies.index(least)]
    refine = refine and not alike and not problem.out_ownership
    for step in _STEPS if refine else ():
        for rank in range(cluster.world_size):
            for trial in _neighbours(best, rank, step):
                if (found := latency(trial)) < least:
                    best, least = trial, found
                    break
    return best


def _neighbours(shares: Shares, rank: int, step: float) -> Iterator[Shares]:
    for factor in (step, 1 / step):
        weights = list(shares.everywhere)
        weights[rank] *= factor
        yield Shares(tuple(weights))
