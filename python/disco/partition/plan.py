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
from disco.partition.nearly_zero import NearlyZero
from disco.partition.prediction import FewerNodes, Latency, NodeMemory
from disco.program.message_layout import alignment, item_bytes, offsets, payload_bytes

# Minor versions add fields with defaults; a reader takes every minor of its own major, up to its
# own minor. A field says since when it is there, and a plan that was read is written as it came, so
# that its digest stays.
PLAN_VERSION = (1, 3)

Channels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class GatherRuns:
    """What the senders of an exchange read, over all its messages, for one pixel or token.

    Attributes:
        channels: that are sent.
        runs: of neighbouring channels that they lie in.
        lines: of 64 bytes that hold them, where each pixel begins with a line.
    """

    channels: int = 0
    runs: int = 0
    lines: int = 0


@dataclass(frozen=True)
class DenseInputs:
    """What a layer that sends partial sums would read, had every rank sent all of its inputs.

    Attributes:
        elements_per_channel, scales_per_channel: of one image, as of an `ExchangePlan`.
        counts: per rank its channels.
    """

    elements_per_channel: int
    scales_per_channel: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ExchangePlan:
    """One exchanged tensor.

    Attributes:
        number: its place in the order of exchanges, the same on all ranks.
        value, dim, dtype: what is exchanged, and which of its dimensions holds the channels.
        bytes_per_channel: of one image, as it travels; in int8 with its scales.
        ownership: per rank its channels.
        sent: ``sent[i][j]``: channels that rank j sends rank i.
        consumers: layers that read received channels.
        gathered_by: ops that need the value whole ("output" for the model's result).
        form: "inputs" of layers, or "partial sums" of one layer's outputs, which the receiver adds.
        dense_bytes: of one image, had every rank got all channels of the others; None for what
            follows from the ownership.
        statistics: values that travel in the same messages, and are small.
        statistics_bytes: ``[receiver][sender]``, of one image; empty for none.
        gather: what senders read; zeros for values that travel whole and for partial sums.
        gather_before: the same, had channels not been put into an order for it.
        wire_dtype: that the channels travel in (statistics: always `dtype`); empty for `dtype`.
        narrows: whether they may travel in another dtype than `dtype`: not so the model's output,
            statistics, and what is not of floats.
        elements_per_channel: of one image.
        scales_per_channel: of one image in int8; 0 for what has no images to scale one by one.
        dense_inputs: of the layer that the partial sums are of, unless they are exchanged, too.
    """

    number: int
    value: str
    dim: int
    dtype: str
    bytes_per_channel: int
    ownership: Channels
    sent: tuple[Channels, ...]
    consumers: tuple[str, ...]
    gathered_by: tuple[str, ...]
    form: str = field(default="inputs", metadata={"since": (1, 2)})
    dense_bytes: int | None = field(default=None, metadata={"since": (1, 2)})
    statistics: tuple[str, ...] = field(default=(), metadata={"since": (1, 2)})
    statistics_bytes: Channels = field(default=(), metadata={"since": (1, 2)})
    gather: GatherRuns = field(default=GatherRuns(), metadata={"since": (1, 2)})
    gather_before: GatherRuns = field(default=GatherRuns(), metadata={"since": (1, 2)})
    wire_dtype: str = field(default="", metadata={"since": (1, 3)})
    narrows: bool = field(default=False, metadata={"since": (1, 3)})
    elements_per_channel: int = field(default=0, metadata={"since": (1, 3)})
    scales_per_channel: int = field(default=0, metadata={"since": (1, 3)})
    dense_inputs: DenseInputs | None = field(default=None, metadata={"since": (1, 3)})

    @property
    def wire(self) -> str:
        """The dtype that the channels travel in."""
        return self.wire_dtype or self.dtype

    @property
    def is_narrow(self) -> bool:
        """Whether they travel in another dtype than their own."""
        return self.wire != self.dtype

    def bytes_between(self, receiver: int, sender: int, batch: int = 1) -> int:
        """Bytes of the message from `sender` to `receiver`, for so many images."""
        statistics = self.statistics_bytes[receiver][sender] if self.statistics else 0
        return self._message_bytes(len(self.sent[receiver][sender]), statistics, batch)

    def bytes_for(self, batch: int) -> int:
        """Over all pairs of ranks, for so many images: int8 is padded once a message."""
        ranks = range(len(self.ownership))
        return sum(self.bytes_between(i, j, batch) for i in ranks for j in ranks)

    @property
    def bytes_per_image(self) -> int:
        """Over all pairs of ranks, for a batch of 1."""
        return self.bytes_for(1)

    def _message_bytes(self, channels: int, statistics: int, batch: int) -> int:
        if not self.is_narrow:
            return batch * (channels * self.bytes_per_channel + statistics)
        scales = self.scales_per_channel if self.wire == "int8" else 0
        values = batch * channels * self.elements_per_channel
        payload = payload_bytes(self.wire, values, batch * channels * scales)
        steps = (alignment(self.wire, bool(scales)), item_bytes(self.dtype))
        return offsets((payload, batch * statistics), steps)[1]

    @property
    def bytes_dense(self) -> int:
        """The same, had every rank got all channels of the others."""
        if self.dense_bytes is not None:
            return self.dense_bytes
        statistics = self.statistics_bytes or ((0,) * len(self.ownership),) * len(self.ownership)
        return sum(
            self._message_bytes(len(owned), row[sender], 1)
            for receiver, row in enumerate(statistics)
            for sender, owned in enumerate(self.ownership)
            if receiver != sender
        )


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
