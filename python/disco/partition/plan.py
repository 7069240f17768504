"""The plan: what each rank computes, holds and sends. Immutable, printable, JSON, deterministic.

Bytes are those of one image's payloads without any header; FLOPs are 2 x multiply-accumulates of
convolutions and linears of one image; weight bytes are those of the tensors that a rank is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from disco.errors import InputError
from disco.partition.nearly_zero import NearlyZero

# Minor versions add fields with defaults; a reader takes every minor of its own major.
PLAN_VERSION = (1, 2)

Channels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ExchangePlan:
    """One exchanged tensor.

    Attributes:
        number: its place in the order of exchanges, the same on all ranks.
        value, dim, dtype: what is exchanged, and which of its dimensions holds the channels.
        bytes_per_channel: of one image.
        ownership: per rank its channels.
        sent: ``sent[i][j]``: channels that rank j sends rank i.
        consumers: layers that read received channels.
        gathered_by: ops that need the value whole ("output" for the model's result).
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

    def bytes_between(self, receiver: int, sender: int) -> int:
        """Payload bytes of one image from `sender` to `receiver`."""
        return len(self.sent[receiver][sender]) * self.bytes_per_channel

    @property
    def bytes_per_image(self) -> int:
        """Over all pairs of ranks."""
        return sum(len(channels) for row in self.sent for channels in row) * self.bytes_per_channel

    @property
    def bytes_dense(self) -> int:
        """The same, had every rank got all channels of the others."""
        owned = sum(len(channels) for channels in self.ownership)
        return owned * (len(self.ownership) - 1) * self.bytes_per_channel


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
    activation: str = ""  # since 1.1


@dataclass(frozen=True)
class Plan:
    """The whole plan; `print` it for a table with a row a layer."""

    world_size: int
    dense_exchange: bool
    tolerance: float
    layers: tuple[LayerPlan, ...]
    exchanges: tuple[ExchangePlan, ...]
    weight_bytes_dense: int
    weight_bytes_per_rank: tuple[int, ...]
    version: tuple[int, int] = PLAN_VERSION
    nearly_zero: tuple[NearlyZero, ...] = ()  # since 1.2

    @property
    def bytes_matrix(self) -> Channels:
        """``[sender][receiver]``: payload bytes per image."""
        ranks = range(self.world_size)
        return tuple(
            tuple(sum(e.bytes_between(i, j) for e in self.exchanges) for i in ranks) for j in ranks
        )

    @property
    def bytes_per_image(self) -> int:
        """Payload bytes of one image, over all pairs, the output's gather included."""
        return sum(exchange.bytes_per_image for exchange in self.exchanges)

    @property
    def bytes_dense_exchange(self) -> int:
        """The same if every exchanged tensor were exchanged whole."""
        return sum(exchange.bytes_dense for exchange in self.exchanges)

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
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

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
            content["exchanges"] = tuple(ExchangePlan(**e) for e in content["exchanges"])
            nearly = content.get("nearly_zero", ())
            content["nearly_zero"] = tuple(NearlyZero(**each) for each in nearly)
            return cls(**content)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"damaged plan: {type(error).__name__} {error}") from None

    def __str__(self) -> str:
        from disco.partition.table import format_plan

        return format_plan(self)


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _dotted(version: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in version)
