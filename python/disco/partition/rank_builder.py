"""Writes one rank's program: its ops, its weights, and its side of every exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from disco.partition.placement import Placement, Replicated, Sharded
from disco.program import Arg, Dtype, Op, Program, Ref, WeightRef, map_leaves
from disco_kernels.pattern import Ownership, Selected


@dataclass(frozen=True)
class Exchange:
    """One tensor, sent once for all its consumers.

    Attributes:
        number: its place in the order in which all ranks exchange.
        value: the exchanged value.
        placement: how the value is sharded.
        sent: ``sent[i][j]``: channels that rank j sends rank i, in rank j's order.
        dtype: of the value.
        elements_per_channel: of one image.
        scales_per_channel: of one image, were it sent in int8; 0 where it cannot be.
        narrows: whether it may travel in another dtype than its own.
        consumers: layers that read received channels.
        gathered_by: ops without a rule, and "output", that need the value whole.
        riders: statistics of the value, in the same messages behind it.
        form: "inputs" of layers or "partial sums" of their outputs.
    """

    number: int
    value: str
    placement: Sharded
    sent: Selected
    dtype: str
    elements_per_channel: int
    consumers: tuple[str, ...]
    gathered_by: tuple[str, ...]
    riders: tuple[Exchange, ...] = ()
    form: str = "inputs"
    scales_per_channel: int = 0
    narrows: bool = False

    @property
    def parts(self) -> tuple[Exchange, ...]:
        """What its messages hold, in order."""
        return (self, *self.riders)

    def senders(self, rank: int) -> list[int]:
        """The ranks that send channels of this one value to `rank`."""
        return [peer for peer, channels in enumerate(self.sent[rank]) if channels]


@dataclass(frozen=True)
class Replayed:
    """A value that receivers compute from channels of a smaller one.

    Attributes:
        source: the smaller value.
        op: that computes the value from it.
        replay: writes the op for channels that were received (`disco.partition.rules.registry`).
    """

    source: Ref
    op: Op
    replay: Callable[[Op, RankBuilder, Ref, tuple[int, ...], str], None]


@dataclass(frozen=True)
class RankProgram:
    """What one rank runs: its program and the weights beside it."""

    program: Program
    weights: dict[str, Tensor]

    @property
    def weight_bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights.values())


class RankBuilder:
    """Collects the ops of `rank`. Rules write into it; values keep the program's names.

    A sharded value has the rank's own part under its name; received payloads and the assembled
    whole are made when an op first asks for them, so that a rank waits as late as it can.
    """

    def __init__(
        self,
        rank: int,
        source_weights: Mapping[str, Tensor],
        placements: Mapping[str, Placement],
        exchanges: Mapping[str, Exchange],
        replayed: Mapping[str, Replayed] | None = None,
    ) -> None:
        self.rank = rank
        self.weights: dict[str, Tensor] = {}
        self._source_weights = source_weights
        self._placements = placements
        self._replayed = replayed or {}
        # A message goes out when the last of its parts is there: statistics follow their value.
        self._due = {exchange.parts[-1].value: exchange for exchange in exchanges.values()}
        self._message_of = {
            part.value: exchange for exchange in exchanges.values() for part in exchange.parts
        }
        self._ops: list[Op] = []
        self._made: set[str] = set()

    # Reading values -----------------------------------------------------------------------------

    def localise(self, leaf: Any) -> Any:
        """An argument as it is on this rank: values by name, weights whole."""
        return self.keep(leaf) if isinstance(leaf, WeightRef) else leaf

    def globalise(self, leaf: Any) -> Any:
        """An argument with sharded values assembled."""
        return self.whole(leaf) if isinstance(leaf, Ref) else self.localise(leaf)

    def whole(self, value: Ref) -> Ref:
        """The value with all ranks' channels in global order."""
        placement = self._placements[value.name]
        if isinstance(placement, Replicated):
            return value
        name = f"{value.name}.whole"
        if self._make(name):
            ranks = range(placement.ownership.world_size)
            counts = placement.ownership.counts
            pieces = tuple(
                value if peer == self.rank else self.payload(value, peer)
                for peer in ranks
                if counts[peer]
            )
            order = None
            if not placement.ownership.is_contiguous:
                flat = [c for owned in placement.ownership.channels for c in owned]
                inverse = torch.tensor(flat).argsort().to(torch.int32)
                order = self.store(f"{value.name}.order", inverse)
            self.add(Op("disco.assemble", name, (pieces,), {"order": order, "dim": placement.dim}))
        return Ref(name)

    def payload(self, value: Ref, peer: int) -> Ref:
        """The channels of `value` that `peer` has sent, as a tensor of the value's dimensions."""
        name = f"{value.name}.from{peer}"
        if self._make(name):
            made = self._replayed.get(value.name)
            if made is not None:
                piece = self.payload(made.source, peer)
                made.replay(made.op, self, piece, self.received(value, peer), name)
            else:
                message = self._message_of[value.name]
                source = Ref(f"{message.value}.exchange")
                self.add(
                    Op("operator.getitem", name, (source, self._position(message, value, peer)))
                )
        return Ref(name)

    def received(self, value: Ref, peer: int) -> tuple[int, ...]:
        """Global channels of `value` that `peer` sends this rank."""
        made = self._replayed.get(value.name)
        if made is not None:
            return self.received(made.source, peer)
        return self._part(value.name).sent[self.rank][peer]

    def part(self, arg: Arg, ownership: Ownership, dim: int) -> Arg:
        """This rank's channels (of `ownership`, along `dim`) of a value or weight."""
        owned = ownership.channels[self.rank]
        if isinstance(arg, WeightRef):
            return self.taken(arg, owned, dim)
        assert isinstance(arg, Ref)
        if self._placements[arg.name] == Sharded(ownership, dim):
            return arg
        placed = self._placements[arg.name]
        if isinstance(placed, Sharded) and placed.dim == dim:
            return self._reshared(arg, placed, owned)
        index = self.store(f"{arg.name}.part", _positions(owned).to(torch.int32))
        name = f"{index.name}.dim{dim}"
        if self._make(name):
            self.add(Op("disco.take", name, (self.whole(arg), index), {"dim": dim}))
        return Ref(name)

    def _reshared(self, value: Ref, placed: Sharded, wanted: Sequence[int]) -> Ref:
        """Channels of `value`, this rank's own and received ones, as they are wanted."""
        pieces: list[Ref] = []
        held: list[int] = []
        for peer, owned in enumerate(placed.ownership.channels):
            if set(wanted) & set(owned):
                mine = peer == self.rank
                pieces.append(value if mine else self.payload(value, peer))
                held += owned if mine else self.received(value, peer)
        place = {channel: i for i, channel in enumerate(held)}
        positions = torch.tensor([place[channel] for channel in wanted], dtype=torch.int32)
        order = self.store(f"{value.name}.part", positions)
        name = f"{order.name}.of"
        if self._make(name):
            attributes: dict[str, Arg] = {"order": order, "dim": placed.dim}
            self.add(Op("disco.assemble", name, (tuple(pieces),), attributes))
        return Ref(name)

    def taken(self, weight: WeightRef, channels: Sequence[int], dim: int = 0) -> WeightRef:
        """Listed entries of a weight along `dim`."""
        tensor = self._source_weights[weight.name].index_select(dim, _positions(channels))
        return self.store(weight.name, tensor)

    # Writing ------------------------------------------------------------------------------------

    def add(self, op: Op) -> None:
        """Append an op."""
        self._ops.append(op)

    def add_empty(self, name: str, shape: Sequence[int | str], dim: int, dtype: str) -> None:
        """A rank that owns no channel of a value computes nothing, but knows the value's sizes."""
        sizes = (*shape[:dim], 0, *shape[dim + 1 :])
        self.add(Op("disco.empty", name, (tuple(sizes),), {"dtype": Dtype(dtype)}))

    def keep(self, weight: WeightRef) -> WeightRef:
        """Give the rank a weight as it is."""
        if weight.name not in self.weights:
            # A copy: later changes to the model must not reach some weights and not others.
            return self.store(weight.name, self._source_weights[weight.name].clone())
        return self.store(weight.name, self._source_weights[weight.name])

    def source(self, weight: WeightRef) -> Tensor:
        """The whole tensor of a weight; the rank does not get it."""
        return self._source_weights[weight.name]

    def store(self, name: str, tensor: Tensor) -> WeightRef:
        """Give the rank a tensor, under `name` or, if another tensor has that, one like it."""
        tensor = tensor.contiguous()
        candidate, number = name, 1
        while candidate in self.weights:
            if _equal(self.weights[candidate], tensor):
                return WeightRef(candidate)
            number += 1
            candidate = f"{name}.{number}"
        self.weights[candidate] = tensor
        return WeightRef(candidate)

    def exchange(self, value: str) -> None:
        """Start the exchange that waits for this value, if this rank takes part in one."""
        exchange = self._due.get(value)
        if exchange is None:
            return
        parts = exchange.parts
        send = tuple(self._send(exchange.number, part) for part in parts)
        receive = tuple(
            tuple((peer, len(part.sent[self.rank][peer])) for peer in part.senders(self.rank))
            for part in parts
        )
        dims = tuple(part.placement.dim for part in parts)
        if any(send) or any(receive):
            several = len(parts) > 1
            attributes: dict[str, Arg] = {
                "exchange": exchange.number,
                "dim": dims if several else dims[0],
                "send": send if several else send[0],
                "receive": receive if several else receive[0],
            }
            values = tuple(Ref(part.value) for part in parts)
            self.add(Op("disco.exchange", f"{exchange.value}.exchange", values, attributes))

    def _send(self, number: int, part: Exchange) -> tuple[tuple[int, WeightRef], ...]:
        """Per peer that gets channels of this value their positions here."""
        owned = part.placement.ownership.channels[self.rank]
        position = {channel: i for i, channel in enumerate(owned)}
        send = []
        for peer, row in enumerate(part.sent):
            if row[self.rank]:
                local = torch.tensor([position[c] for c in row[self.rank]], dtype=torch.int32)
                send.append((peer, self.store(f"exchange.{number}.send.{peer}", local)))
        return tuple(send)

    def finish(self, source: Program) -> RankProgram:
        """The rank's program of `source`, with whole outputs, and its weights."""
        whole = map_leaves(source.outputs, self.globalise)
        values = {name: source.values[name] for name in source.inputs}
        program = replace(source, outputs=whole, ops=tuple(self._ops), values=values)
        program.validate()
        return RankProgram(program, self.weights)

    def _part(self, value: str) -> Exchange:
        return next(part for part in self._message_of[value].parts if part.value == value)

    def _position(self, message: Exchange, value: Ref, peer: int) -> int:
        """Of a payload among all that this rank receives with a message."""
        before = 0
        for part in message.parts:
            senders = part.senders(self.rank)
            if part.value == value.name:
                return before + senders.index(peer)
            before += len(senders)
        raise AssertionError(f"{value.name!r} is no part of the exchange of {message.value!r}")

    def _make(self, name: str) -> bool:
        """True the first time that `name` is asked for."""
        new = name not in self._made
        self._made.add(name)
        return new


def _positions(channels: Sequence[int]) -> Tensor:
    return torch.tensor(channels, dtype=torch.int64)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
