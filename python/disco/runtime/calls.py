"""One rank leads: it tells the others each call's inputs, over the transport that they share.

A call is two messages to every other rank: its size, then its arguments as safetensors with the
nesting in JSON. A size of 0 ends it all. Nothing in them is executed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from disco.errors import TransportError
from disco.executor.transport import Transport
from disco.runtime.messages import flatten, unflatten
from disco.runtime.tcp.frames import FIRST_CALL_EXCHANGE

# Numbers that no plan gives to an exchange.
SIZE_EXCHANGE, BODY_EXCHANGE = FIRST_CALL_EXCHANGE, FIRST_CALL_EXCHANGE + 1
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 32


@dataclass(frozen=True)
class Call:
    """One call of the model, as the leader tells it.

    Attributes:
        args, kwargs: of the model.
        request: its number.
        lost: the ranks that it does without.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    request: int
    lost: frozenset[int]


class Calls:
    """Calls of one model, in order, between the rank that leads and those that follow.

    Args:
        transport: connected.
        leader: the rank that has the inputs.
        deadline_s: for the messages of one call once it has begun; for the next call a rank waits
            as long as the leader is there.
    """

    def __init__(self, transport: Transport, leader: int, deadline_s: float) -> None:
        self._transport = transport
        self._leader = leader
        self._deadline_s = deadline_s
        self._told: dict[int, int] = {}  # calls that each rank has been told since it came
        self._number = 0

    def tell(self, args: Sequence[Any], kwargs: Mapping[str, Any], request: int) -> None:
        """(The leader.) Send one call to all others that are there.

        Args:
            args, kwargs: of the model.
            request: the number of the call.

        Raises:
            TypeError: arguments other than tensors, constants, dicts, lists and tuples.
            TransportError: a peer is gone.
        """
        tensors: list[Tensor] = []
        head = {
            "inputs": flatten([list(args), dict(kwargs)], tensors),
            "request": request,
            "lost": sorted(self._transport.lost),
        }
        structure = json.dumps(head).encode()
        named = {str(i): t.detach().contiguous() for i, t in enumerate(tensors)}
        content = _LENGTH.pack(len(structure)) + structure + save(named)
        body = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        size = torch.tensor([body.numel()])
        others = self._others()
        handles = []
        for peer in others:
            number = self._told.get(peer, 0)
            self._told[peer] = number + 1
            handles.append(self._transport.send(size, peer, SIZE_EXCHANGE, number))
            handles.append(self._transport.send(body, peer, BODY_EXCHANGE, number))
        for handle in handles:
            self._transport.wait(handle, self._deadline_s)

    def end(self) -> None:
        """(The leader.) No more calls."""
        nothing = torch.tensor([0])
        handles = [
            self._transport.send(nothing, peer, SIZE_EXCHANGE, self._told.get(peer, 0))
            for peer in self._others()
        ]
        for handle in handles:
            self._transport.wait(handle, self._deadline_s)

    def forget(self, ranks: Iterable[int]) -> None:
        """(The leader.) These ranks have been told nothing yet: new processes have taken them."""
        for rank in ranks:
            self._told.pop(rank, None)

    def next(self) -> Call | None:
        """(The others.) The next call; None if there is none any more.

        Raises:
            TransportError: the leader is gone without a word, or sent what is no call.
        """
        size = torch.zeros(1, dtype=torch.int64)
        self._receive(size, SIZE_EXCHANGE, math.inf)
        if not 0 <= int(size) < _MOST_BYTES:
            raise TransportError(f"rank {self._leader} announced a call of {int(size)} bytes")
        if not int(size):
            return None
        body = torch.empty(int(size), dtype=torch.uint8)
        self._receive(body, BODY_EXCHANGE, self._deadline_s)
        self._number += 1
        content = body.numpy().tobytes()
        begin = _LENGTH.size + _LENGTH.unpack_from(content)[0]
        tensors = load(content[begin:])
        head = json.loads(content[_LENGTH.size : begin])
        args, kwargs = unflatten(head["inputs"], [tensors[str(i)] for i in range(len(tensors))])
        return Call(args, kwargs, head["request"], frozenset(head["lost"]))

    def _others(self) -> list[int]:
        without = {self._transport.rank, *self._transport.lost}
        return [rank for rank in range(self._transport.world_size) if rank not in without]

    def _receive(self, buffer: Tensor, exchange: int, deadline_s: float) -> None:
        handle = self._transport.post_receive(buffer, self._leader, exchange, self._number)
        self._transport.wait(handle, deadline_s)
