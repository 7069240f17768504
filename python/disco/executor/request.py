"""What belongs to one forward pass of one rank: its number, its transport, its message buffers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disco.executor.activations import Activations, Layout
from disco.executor.transport import Handle, Transport
from disco_kernels.memory import return_freed_memory

ShapeKey = tuple[tuple[int, ...], ...]

# Buffers of this many different input shapes are kept; a service sees few, a sweep need not keep
# all.
_SHAPES_KEPT = 4


@dataclass
class Kept:
    """The memory of one request, which a later one of the same input shapes uses again."""

    activations: Activations
    exchanges: dict[int, Any] = field(default_factory=dict)  # number -> its messages


class Request:
    """One forward pass. It owns its buffers until its last message is done.

    Attributes:
        number: the same on all ranks; part of every message's address.
        transport: None in a program without exchanges.
        symbols: sizes that the inputs give to the program's symbols.
        handles: of all its messages, which read or write its buffers until they are done.
        activations: where kernels write their results.
    """

    def __init__(
        self, number: int, transport: Transport | None, symbols: dict[str, int], kept: Kept
    ) -> None:
        self.number = number
        self.transport = transport
        self.symbols = symbols
        self.handles: list[Handle] = []
        self.kept = kept
        self.activations = kept.activations


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
