"""What belongs to one forward pass of one rank: its number, its transport, its message buffers."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from disco.executor.activations import Activations, Layout
from disco.executor.timeline import Recorder
from disco.executor.transport import NOTHING, Handle, Transport
from disco_kernels.memory import return_freed_memory

ShapeKey = tuple[tuple[int, ...], ...]

# Buffers of this many different input shapes are kept; a service sees few, a sweep need not keep
# all.
_SHAPES_KEPT = 4


@dataclass
class KeptExchange:
    """What of an exchange is the same in every request that uses the same memory.

    Attributes:
        incoming, outgoing: per peer the whole message.
        payloads, scales: what arrives, by position.
        peers: the sender of each payload.
        packed: per part the messages that it is packed into.
        packs: slots of what is sent, and what packs it, from the tensor in the slot; None as long
            as the values have no fixed place.
    """

    incoming: list[tuple[int, Tensor]] = field(default_factory=list)
    outgoing: list[tuple[int, Tensor]] = field(default_factory=list)
    payloads: list[Tensor] = field(default_factory=list)
    scales: list[Tensor | None] = field(default_factory=list)
    peers: list[int] = field(default_factory=list)
    packed: list[list[Tensor]] = field(default_factory=list)
    packs: list[tuple[int, Callable[[Tensor], None]]] | None = None


@dataclass
class Kept:
    """The memory of one request, which a later one of the same input shapes uses again."""

    activations: Activations
    exchanges: dict[int, KeptExchange] = field(default_factory=dict)


class Request:
    """One forward pass. It owns its buffers until its last message is done.

    Attributes:
        number: the same on all ranks; part of every message's address.
        transport: None in a program without exchanges.
        symbols: sizes that the inputs give to the program's symbols.
        handles: of all its messages, which read or write its buffers until they are done.
        arriving: by slot of a payload, the receive that fills it.
        begun: slots of layers whose first pass has run and whose second has not.
        activations: where kernels write their results.
        lost: ranks that it does without.
        device: where it computes; None for the CPU.
        record: takes down where its time goes, if that was asked for.
    """

    def __init__(
        self,
        number: int,
        transport: Transport | None,
        symbols: dict[str, int],
        kept: Kept,
        record: Recorder | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.number = number
        self.transport = transport
        self.symbols = symbols
        self.handles: list[Handle] = []
        self.arriving: dict[int, Handle] = {}
        self.begun: set[int] = set()
        self._posted: dict[tuple[int, int], Handle] = {}
        self.lost: frozenset[int] = frozenset() if transport is None else transport.lost
        self.record = record
        self.device = device
        self.kept = kept
        self.activations = kept.activations

    def post_receives(self) -> None:
        """Announce all messages whose buffers are known from an earlier request.

        Before anything is computed, so that whatever the other ranks send finds its place.
        """
        if self.transport is None:
            return
        for exchange, kept in self.kept.exchanges.items():
            for peer, buffer in kept.incoming:
                self._posted[exchange, peer] = self._post(buffer, peer, exchange)

    def receive(self, buffer: Tensor, peer: int, exchange: int) -> Handle:
        """The receive of one message into a buffer of `buffer`, posted now if it is not yet."""
        posted = self._posted.pop((exchange, peer), None)
        if posted is not None:
            return posted
        return self._post(buffer, peer, exchange)

    def _post(self, buffer: Tensor, peer: int, exchange: int) -> Handle:
        assert self.transport is not None
        if peer in self.lost:
            buffer.zero_()
            return NOTHING
        begin = time.perf_counter_ns()
        handle = self.transport.post_receive(buffer, peer, exchange, self.number)
        self.handles.append(handle)
        if self.record is not None:
            self.record.messages.append((False, exchange, peer, buffer.nbytes, begin, handle))
        return handle

    def send(self, buffer: Tensor, peer: int, exchange: int) -> None:
        """Start sending one message."""
        assert self.transport is not None
        if peer in self.lost:
            return
        begin = time.perf_counter_ns()
        handle = self.transport.send(buffer, peer, exchange, self.number)
        self.handles.append(handle)
        if self.record is not None:
            self.record.messages.append((True, exchange, peer, buffer.nbytes, begin, handle))


@dataclass
class _Shape:
    """What is known of requests of one set of input shapes, and the memory that none uses now."""

    layout: Layout | None = None
    free: list[Kept] = field(default_factory=list)


class BufferPool:
    """Memory that no request uses now, by input shape. Threads may share it.

    Args:
        buffer_of: slot of a kernel's result -> number of its buffer (`plan_buffers`).
    """

    def __init__(self, buffer_of: Mapping[int, int]) -> None:
        self._buffer_of = buffer_of
        self._lock = threading.Lock()
        self._known: OrderedDict[ShapeKey, _Shape] = OrderedDict()

    def take(self, shapes: ShapeKey) -> Kept:
        """Memory used before with these input shapes, or new one."""
        with self._lock:
            known = self._known.get(shapes)
            if known is not None and known.free:
                return known.free.pop()
        return Kept(Activations(None if known is None else known.layout, self._buffer_of))

    def give_back(self, shapes: ShapeKey, kept: Kept, layout: Layout) -> None:
        """Only when no transport can touch it any more: not after an error.

        Args:
            shapes: of the inputs.
            kept: from `take`.
            layout: of the values in ``buffer_of``, as they have been computed.
        """
        first = not kept.activations.out and bool(layout)
        with self._lock:
            known = self._known.setdefault(shapes, _Shape())
            if not kept.activations.out:
                # It has run in fresh tensors; others may have done so at the same time.
                known.layout = layout
                kept = Kept(Activations(layout, self._buffer_of), kept.exchanges)
            elif known.layout is None:
                known.layout = kept.activations.layout  # forgotten while this one was under way
            known.free.append(kept)
            self._known.move_to_end(shapes)
            if len(self._known) > _SHAPES_KEPT:
                self._known.popitem(last=False)
        if first:
            return_freed_memory()  # the fresh tensors of the first request
