"""One rank leads: it tells the others each call's inputs, over the transport that they share.

A call is two messages to every other rank: its size, then its arguments as safetensors with the
nesting in JSON. A size of 0 ends it all. Nothing in them is executed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from disco.errors import TransportError
from disco.executor.transport import Handle, Transport
from disco.runtime.messages import by_number, flatten, unflatten
from disco.runtime.tcp.frames import FIRST_CALL_EXCHANGE

# Numbers that no plan gives to an exchange.
SIZE_EXCHANGE, BODY_EXCHANGE = FIRST_CALL_EXCHANGE, FIRST_CALL_EXCHANGE + 1
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 32

_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class LedCall:
    """What the leader tells the others.

    Attributes:
        args, kwargs: of the model.
        options: what else they have to know.
        is_last: there is nothing more, and this is no call.
    """

    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    is_last: bool = False


class Calls:
    """Calls of one model, in order, between the rank that leads and those that follow.

    Args:
        transport: connected.
        leader: the rank that has the inputs.
        deadline_s: for the messages of one call once it has begun; for the next call a rank waits
            as long as the leader is there.
        survives: whether ranks go on without others that are lost.
    """

    def __init__(
        self, transport: Transport, leader: int, deadline_s: float, survives: bool = False
    ) -> None:
        self._survives = survives
        self._transport = transport
        self._leader = leader
        self._deadline_s = deadline_s
        self._number = 0
        self._sending: list[Handle] = []
        self._size: tuple[Tensor, Handle] | None = None
        self._body: tuple[Tensor, Handle] | None = None
        self._told: dict[int, int] = {}  # messages that each rank has been sent since it came

    def tell(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any] = _NONE
    ) -> None:
        """(The leader.) Send one call to all others, and wait until it is on its way.

        Args:
            args, kwargs: of the model.
            options: what else the others have to know; for JSON.

        Raises:
            TypeError: arguments other than tensors, constants, dicts, lists and tuples.
            TransportError: a peer is gone.
        """
        self.begin(args, kwargs, options)
        while self._sending:
            self._transport.wait(self._sending.pop(), self._deadline_s)

    def begin(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any] = _NONE
    ) -> None:
        """`tell` without the waiting: for a transport that moves it along meanwhile."""
        tensors: list[Tensor] = []
        content_of = flatten([list(args), dict(kwargs), dict(options)], tensors)
        structure = json.dumps(content_of).encode()
        content = _LENGTH.pack(len(structure)) + structure + save(by_number(tensors))
        body = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._sending = [handle for handle in self._sending if not handle.done]
        size = torch.tensor([body.numel()])
        for peer in self._others():
            number = self._told.get(peer, 0)
            self._told[peer] = number + 1
            self._sending.append(self._transport.send(size, peer, SIZE_EXCHANGE, number))
            self._sending.append(self._transport.send(body, peer, BODY_EXCHANGE, number))

    def end(self) -> None:
        """(The leader.) No more calls."""
        nothing = torch.tensor([0])
        for peer in self._others():
            number = self._told.get(peer, 0)
            self._sending.append(self._transport.send(nothing, peer, SIZE_EXCHANGE, number))
        while self._sending:
            self._transport.wait(self._sending.pop(), self._deadline_s)

    def forget(self, ranks: Iterable[int]) -> None:
        """(The leader.) These ranks have been told nothing yet: new processes have taken them."""
        for rank in ranks:
            self._told.pop(rank, None)

    def give_up(self) -> None:
        """(The leader.) Wait no more for what a lost rank was to take."""
        self._sending.clear()

    def next(self) -> LedCall | None:
        """(The others.) The next call; None if there is none any more.

        Raises:
            TransportError: the leader is gone without a word, or sent what is no call.
        """
        call = self._take(wait=True)
        assert call is not None
        return None if call.is_last else call

    def poll(self) -> LedCall | None:
        """(The others.) The next call if it is there already, else None; errors as of `next`.

        Raises:
            TransportError: also if the leader has ended it all.
        """
        call = self._take(wait=False)
        if call is not None and call.is_last:
            raise TransportError(f"rank {self._leader} has ended in the middle of a stream")
        return call

    def _take(self, wait: bool) -> LedCall | None:
        if self._size is None:
            self._size = self._receive(torch.zeros(1, dtype=torch.int64), SIZE_EXCHANGE)
        size, handle = self._size
        if wait:
            self._transport.wait(handle, math.inf)
        elif not handle.done:
            return None
        if not 0 <= int(size) < _MOST_BYTES:
            raise TransportError(f"rank {self._leader} announced a call of {int(size)} bytes")
        if not int(size):
            return LedCall(is_last=True)
        if self._body is None:
            self._body = self._receive(torch.empty(int(size), dtype=torch.uint8), BODY_EXCHANGE)
        body, handle = self._body
        if wait:
            # Others may be lost meanwhile; whether to go on without them is what the call says.
            self._transport.wait(handle, math.inf if self._survives else self._deadline_s)
        elif not handle.done:
            return None
        self._size = self._body = None
        self._number += 1
        return _read(body.numpy().tobytes())

    def _others(self) -> list[int]:
        without = {self._transport.rank, *self._transport.lost}
        return [rank for rank in range(self._transport.world_size) if rank not in without]

    def _receive(self, buffer: Tensor, exchange: int) -> tuple[Tensor, Handle]:
        return buffer, self._transport.post_receive(buffer, self._leader, exchange, self._number)


def _read(content: bytes) -> LedCall:
    begin = _LENGTH.size + _LENGTH.unpack_from(content)[0]
    tensors = load(content[begin:])
    structure = json.loads(content[_LENGTH.size : begin])
    return LedCall(*unflatten(structure, [tensors[str(i)] for i in range(len(tensors))]))
