"""The plan: what each rank computes, holds and sends. Immutable, printable, JSON, deterministic.

Bytes are those of one image's payloads as they travel, without any header; FLOPs are 2 x
multiply-accumulates of convolutions and linears of one image; weight bytes are those of the tensors
that a rank is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from disco.errors import InputError
from disco.partition.cluster import Node
from disco.partition.exchange_plan import Channels, DenseInputs, ExchangePlan, GatherRuns
from disco.partition.nearly_zero import NearlyZero
from disco.partition.prediction import FewerNodes, Latency, NodeMemory

# Minor versions add fields with defaults; a reader takes every minor of its own major, up to its
# own minor. A field says since when it is there, and a plan that was read is written as it came, so
# that its digest stays.
PLAN_VERSION = (1, 4)


@dataclass(frozen=True)
class LayerPlan:
    """One op that computes, exchanges, or runs replicated although its input was sharded.

    Attributes:
        name: the model's layer, or the value's name.
        op: kind in the program.
        value: what it computes.
        placement: "sharded" or "replicated".
        in_counts, out_counts: channels owned per rank; empty if not sharded by channels.
        selected_counts: ``[i][j]``: channels of rank j that this layer reads on rank i.
        exchanges: numbers of the exchanges that this layer is the first to need.
        bytes_per_image: of those.
        flops: per rank; empty for ops that are neither convolution nor linear.
        flops_dense: of the whole layer.
        note: why it runs replicated, or that it shares an exchange.
        activation: that is fused into it, "none" if none is; empty for ops that take none.
        form: how a convolution or linear gets what it needs of other ranks, "inputs" or "partial
            sums"; empty if it needs nothing. Of partial sums `selected_counts` are those received.
    """

    name: str
    op: str
    value: str
    placement: str
    in_counts: tuple[int, ...]
    out_counts: tuple[int, ...]
    selected_counts: Channels
    exchanges: tuple[int, ...]
    bytes_per_image: int
    flops: tuple[int, ...]
    flops_dense: int
    note: str
    activation: str = field(default="", metadata={"since": (1, 1)})
    form: str = field(default="", metadata={"since": (1, 2)})


@dataclass(frozen=True)
class Plan:
    """The whole plan; `print` it for a table with a row a layer.

    Attributes:
        nodes: the cluster's, by rank.
        memory: per rank what it takes, for requests of one image.
        latency: predicted, if the nodes' speeds are known.
        fewer_nodes: then also that of the same model on the 1, 2, .. fastest nodes.
        wire_dtype: asked for; a tensor travels in it where that is fewer bytes. Empty for none.
        survivable: any of the ranks can answer over all outputs without the others.
    """

    world_size: int
    dense_exchange: bool
    tolerance: float
    layers: tuple[LayerPlan, ...]
    exchanges: tuple[ExchangePlan, ...]
    weight_bytes_dense: int
    weight_bytes_per_rank: tuple[int, ...]
    version: tuple[int, int] = PLAN_VERSION
    nodes: tuple[Node, ...] = field(default=(), metadata={"since": (1, 2)})
    memory: tuple[NodeMemory, ...] = field(default=(), metadata={"since": (1, 2)})
    latency: Latency | None = field(default=None, metadata={"since": (1, 2)})
    fewer_nodes: tuple[FewerNodes, ...] = field(default=(), metadata={"since": (1, 2)})
    nearly_zero: tuple[NearlyZero, ...] = field(default=(), metadata={"since": (1, 2)})
    wire_dtype: str = field(default="", metadata={"since": (1, 3)})
    survivable: bool = field(default=False, metadata={"since": (1, 4)})

    @property
    def bytes_matrix(self) -> Channels:
        """``[sender][receiver]``: payload bytes of one image."""
        return self.bytes_matrix_for(1)

    def bytes_matrix_for(self, batch: int) -> Channels:
        """``[sender][receiver]``: payload bytes of a request of so many images."""
        ranks = range(self.world_size)
        return tuple(
            tuple(sum(e.bytes_between(i, j, batch) for e in self.exchanges) for i in ranks)
            for j in ranks
        )

    def bytes_for(self, batch: int) -> int:
        """Payload bytes of a request of so many images, over all pairs: what transports count."""
        return sum(exchange.bytes_for(batch) for exchange in self.exchanges)

    @property
    def bytes_per_image(self) -> int:
        """Payload bytes of one image, over all pairs, the output's gather included."""
        return sum(exchange.bytes_per_image for exchange in self.exchanges)

    @property
    def bytes_dense_exchange(self) -> int:
        """The same if every exchanged tensor were exchanged whole."""
        return sum(exchange.bytes_dense for exchange in self.exchanges)

    @property
    def gather(self) -> GatherRuns:
        """What all senders read of one pixel of every tensor that is sent in part."""
        return _sum_of([exchange.gather for exchange in self.exchanges])

    @property
    def gather_before(self) -> GatherRuns:
        """The same, had channels not been put into an order for it."""
        return _sum_of([exchange.gather_before for exchange in self.exchanges])

    @property
    def flops_dense(self) -> int:
        """FLOPs of one image of the whole model, zeros counted."""
        return sum(layer.flops_dense for layer in self.layers)

    @property
    def flops_per_rank(self) -> tuple[int, ...]:
        """FLOPs of one image per rank."""
        ranks = range(self.world_size)
        return tuple(sum(la.flops[r] for la in self.layers if la.flops) for r in ranks)

    @property
    def faster_on(self) -> FewerNodes | None:
        """The fewer nodes that are predicted to be fastest, if that is faster than all of them."""
        if self.latency is None:
            return None
        faster = [f for f in self.fewer_nodes if f.fits and f.latency_ms < self.latency.total_ms]
        return min(faster, key=lambda f: f.latency_ms, default=None)

    @property
    def bytes_without_rule(self) -> int:
        """Payload bytes per image of what is gathered for ops that no rule covers."""
        names = {layer.name for layer in self.replicated}
        return sum(e.bytes_per_image for e in self.exchanges if names & set(e.gathered_by))

    @property
    def replicated(self) -> tuple[LayerPlan, ...]:
        """The ops that gather their inputs because no rule covers them."""
        return tuple(
            layer for layer in self.layers if layer.placement == "replicated" and layer.note
        )

    def to_json(self) -> str:
        """One line of JSON; equal plans give equal text."""
        return json.dumps(_plain(self, self.version), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """sha256 of the JSON: tells shards of different plans apart."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote. InputError for another version or a damaged plan."""
        try:
            content = json.loads(text)
            version = tuple(content["version"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"not a plan: {type(error).__name__} {error}") from None
        if version[:1] != PLAN_VERSION[:1] or version > PLAN_VERSION:
            raise InputError(
                f"plan of version {_dotted(version)}; this release reads {_dotted(PLAN_VERSION)} "
                f"and older ones of {PLAN_VERSION[0]}: install the release that wrote it, or "
                f"partition again"
            )
        try:
            content = _tuples(content)
            content["layers"] = tuple(LayerPlan(**layer) for layer in content["layers"])
            content["exchanges"] = tuple(_exchange(e) for e in content["exchanges"])
            nearly = content.get("nearly_zero", ())
            content["nearly_zero"] = tuple(NearlyZero(**each) for each in nearly)
            content |= _predictions(content)
            return cls(**content)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"damaged plan: {type(error).__name__} {error}") from None

    def __str__(self) -> str:
        from disco.partition.table import format_plan

        return format_plan(self)


def _predictions(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of version 1.2, where they are."""
    latency = content.get("latency")
    return {
        "nodes": tuple(Node.from_plain(node) for node in content.get("nodes", ())),
        "memory": tuple(NodeMemory(**memory) for memory in content.get("memory", ())),
        "latency": None if latency is None else Latency(**latency),
        "fewer_nodes": tuple(FewerNodes(**fewer) for fewer in content.get("fewer_nodes", ())),
    }


def _plain(value: Any, version: tuple[int, int]) -> Any:
    """What JSON can hold, without the fields that this version does not have."""
    if is_dataclass(value):
        known = (f for f in fields(value) if f.metadata.get("since", version) <= version)
        return {f.name: _plain(getattr(value, f.name), version) for f in known}
    return [_plain(item, version) for item in value] if isinstance(value, tuple) else value


def _exchange(content: Mapping[str, Any]) -> ExchangePlan:
    parts: dict[str, Any] = {
        key: GatherRuns(**content[key]) for key in ("gather", "gather_before") if key in content
    }
    if content.get("dense_inputs") is not None:
        parts["dense_inputs"] = DenseInputs(**content["dense_inputs"])
    return ExchangePlan(**{**content, **parts})


def _sum_of(runs: Sequence[GatherRuns]) -> GatherRuns:
    return GatherRuns(
        sum(r.channels for r in runs), sum(r.runs for r in runs), sum(r.lines for r in runs)
    )


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _dotted(version: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in version)
