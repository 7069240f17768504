"""The nodes that a model is planned for: how fast they are, what they hold, how they are linked.

What is not known is None, and then not limited: a link without a bandwidth takes no time, a node
without a memory holds anything. Speeds are given for all nodes or for none; without them all nodes
count as equally fast, and no latency is predicted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disco.errors import InputError


@dataclass(frozen=True)
class Link:
    """How a node is connected to the others; full duplex.

    Attributes:
        bandwidth_mbit_s: of payload, each way (1 Mbit = 10^6 bits).
        latency_ms: of a small message to or from another node, one way.
    """

    bandwidth_mbit_s: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        _check_positive("a link's bandwidth_mbit_s", self.bandwidth_mbit_s, "give megabits/second")
        _check_positive(
            "a link's latency_ms", self.latency_ms, "give milliseconds, or 0", zero=True
        )


@dataclass(frozen=True)
class Node:
    """One device.

    Attributes:
        name: unique in the cluster.
        speed_gflops: 10^9 FLOP/s that it sustains in convolutions and linears; a multiplication and
            an addition are two.
        memory_bytes: that the model may take there: packed weights, activations and messages of a
            request of one image. The process itself (Python and torch, some 230 MB) is not in it.
        link: to the other nodes.
    """

    name: str
    speed_gflops: float | None = None
    memory_bytes: int | None = None
    link: Link = field(default_factory=Link)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"a node needs a name, given {self.name!r}: give a text")
        what = f"node {self.name!r}: "
        _check_positive(f"{what}speed_gflops", self.speed_gflops, "give the GFLOP/s it sustains")
        _check_positive(
            f"{what}memory_bytes", self.memory_bytes, "give what the model may take there"
        )
        if self.memory_bytes is not None and not isinstance(self.memory_bytes, int):
            raise InputError(f"{what}memory_bytes is a whole number, given {self.memory_bytes!r}")
        if not isinstance(self.link, Link):
            raise InputError(f"{what}link is a disco.Link, given {type(self.link).__name__}")

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Node:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**data, "link": Link(**data["link"])})


@dataclass(frozen=True, init=False)
class Cluster:
    """Nodes; rank r of a plan is the r-th.

    Args:
        nodes: so many equal ones of which nothing else is known ("node0", "node1", ..), or a list.

    Raises:
        InputError: no node, two of one name, a speed for some and not for others.
    """

    nodes: tuple[Node, ...]

    def __init__(self, nodes: int | Sequence[Node]) -> None:
        if isinstance(nodes, Sequence) and not isinstance(nodes, str):
            listed = tuple(nodes)
        elif isinstance(nodes, int) and not isinstance(nodes, bool) and nodes >= 1:
            listed = tuple(Node(f"node{rank}") for rank in range(nodes))
        else:
            raise InputError(
                f"nodes must be a whole number, 1 or more, or a list of disco.Node; given {nodes!r}"
            )
        _check_nodes(listed)
        object.__setattr__(self, "nodes", listed)

    @classmethod
    def of(cls, nodes: int | Cluster) -> Cluster:
        """A cluster as it is, a number as that many equal nodes."""
        return nodes if isinstance(nodes, Cluster) else cls(nodes)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Cluster:
        """Read a cluster file (`disco.partition.cluster_file`). InputError if it is no such."""
        from disco.partition.cluster_file import read_cluster

        return cls(read_cluster(path))

    @property
    def world_size(self) -> int:
        return len(self.nodes)

    @property
    def speeds_known(self) -> bool:
        """Whether latencies can be predicted."""
        return self.nodes[0].speed_gflops is not None

    @property
    def speeds(self) -> tuple[float, ...]:
        """Per node, relative to each other: 1 for all where none is known."""
        return tuple(node.speed_gflops or 1.0 for node in self.nodes)

    def fastest(self, count: int) -> Cluster:
        """The `count` fastest nodes, in the order in which they are here."""
        ranks = range(self.world_size)
        chosen = sorted(ranks, key=lambda rank: (-self.speeds[rank], rank))[:count]
        return Cluster([self.nodes[rank] for rank in sorted(chosen)])


def _check_nodes(nodes: Sequence[Node]) -> None:
    if not nodes:
        raise InputError("the cluster is empty: give it at least one node")
    for node in nodes:
        if not isinstance(node, Node):
            raise InputError(f"nodes are disco.Node, given {type(node).__name__}")
    names = [node.name for node in nodes]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"{names.count(name)} nodes are called {name!r}: give each a name of its own"
            )
    unknown = [node.name for node in nodes if node.speed_gflops is None]
    if 0 < len(unknown) < len(nodes):
        raise InputError(
            f"node {unknown[0]!r} has no speed_gflops and others have: give it for all nodes, or "
            "for none, which then count as equally fast"
        )


def _check_positive(what: str, value: float | None, remedy: str, *, zero: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        least = "0 or more" if zero else "more than 0"
        raise InputError(f"{what} must be {least}, given {value!r}: {remedy}, or leave it out")
