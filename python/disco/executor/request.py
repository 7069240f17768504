"""What belongs to one forward pass of one rank: its number, its transport, its message buffers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from disco.executor.transport import Handle, Transport

Buffers = dict[tuple[int, int, bool], Tensor]
ShapeKey = tuple[tuple[int, ...], ...]

# Buffers of this many different input shapes are kept; a service sees few, a sweep need not keep
# all.
_SHAPES_KEPT = 4


class Request:
    """One forward pass. It owns its buffers until its last message is done.

    Attributes:
        number: the same on all ranks; part of every message's address.
        transport: None in a program without exchanges.
        symbols: sizes that the inputs give to the program's symbols.
        handles: of all its messages, which read or write its buffers until they are done.
    """

    def __init__(
        self, number: int, transport: Transport | None, symbols: dict[str, int], buffers: Buffers
    ) -> None:
        self.number = number
        self.transport = transport
        self.symbols = symbols
        self.handles: list[Handle] = []
        self.buffers = buffers

    def buffer(
        self, exchange: int, peer: int, is_send: bool, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The contiguous buffer of one message, kept for later requests of the same shapes."""
        key = (exchange, peer, is_send)
        found = self.buffers.get(key)
        if found is None or found.shape != tuple(shape) or found.dtype != dtype:
            found = self.buffers[key] = torch.empty(tuple(shape), dtype=dtype)
        return found


class BufferPool:
    """Message buffers that no request uses now, by input shape. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: OrderedDict[ShapeKey, list[Buffers]] = OrderedDict()

    def take(self, shape: ShapeKey) -> Buffers:
        """Buffers used before with these input shapes, or new ones."""
        with self._lock:
            free = self._free.get(shape)
            return free.pop() if free else {}

    def give_back(self, shape: ShapeKey, buffers: Buffers) -> None:
        """Only when no transport can touch them any more: not after an error."""
        with self._lock:
            self._free.setdefault(shape, []).append(buffers)
            self._free.move_to_end(shape)
            if len(self._free) > _SHAPES_KEPT:
                self._free.popitem(last=False)
