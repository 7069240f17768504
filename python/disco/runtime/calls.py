"""One rank leads: it tells the others each call's inputs, over the transport that they share.

A call is two messages to every other rank: its size, then its arguments as safetensors with the
nesting in JSON. A size of 0 ends it all. Nothing in them is executed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from disco.errors import TransportError
from disco.executor.transport import Transport
from disco.runtime.messages import by_number, flatten, unflatten

# Numbers that no plan gives to an exchange.
SIZE_EXCHANGE, BODY_EXCHANGE = 65534, 65535
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 32


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
        self._number = 0
        self._others = [r for r in range(transport.world_size) if r != transport.rank]

    def tell(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """(The leader.) Send one call to all others.

        Raises:
            TypeError: arguments other than tensors, constants, dicts, lists and tuples.
            TransportError: a peer is gone.
        """
        tensors: list[Tensor] = []
        structure = json.dumps(flatten([list(args), dict(kwargs)], tensors)).encode()
        content = _LENGTH.pack(len(structure)) + structure + save(by_number(tensors))
        body = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._send(torch.tensor([body.numel()]), SIZE_EXCHANGE)
        self._send(body, BODY_EXCHANGE)
        self._number += 1

    def end(self) -> None:
        """(The leader.) No more calls."""
        self._send(torch.tensor([0]), SIZE_EXCHANGE)

    def next(self) -> tuple[list[Any], dict[str, Any]] | None:
        """(The others.) The next call's arguments; None if there is none any more.

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
        structure = json.loads(content[_LENGTH.size : begin])
        args, kwargs = unflatten(structure, [tensors[str(i)] for i in range(len(tensors))])
        return args, kwargs

    def _send(self, buffer: Tensor, exchange: int) -> None:
        handles = [
            self._transport.send(buffer, peer, exchange, self._number) for peer in self._others
        ]
        for handle in handles:
            self._transport.wait(handle, self._deadline_s)

    def _receive(self, buffer: Tensor, exchange: int, deadline_s: float) -> None:
        handle = self._transport.post_receive(buffer, self._leader, exchange, self._number)
        self._transport.wait(handle, deadline_s)
