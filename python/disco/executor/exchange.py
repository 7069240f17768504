"""A rank's side of the exchange: receives are posted, then the selected channels packed and sent.

On the wire a message has its channels last: ``[B, H, W, n]`` for a map, which is channels-last
memory of ``[B, n, H, W]``, so a kernel reads it where it arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import disco_kernels as dk
from disco.errors import InputError
from disco.executor.request import Request
from disco.executor.steps import REQUEST_SLOT, Preparation, Step, Values
from disco.executor.transport import Handle
from disco.program import Dtype, Op, WeightRef, evaluate_dim
from disco.program.interpret import dtype_of


class Received:
    """The payloads of one exchange, under way: buffers as tensors of the value's dimensions."""

    __slots__ = ("handles", "payloads")

    def __init__(self) -> None:
        self.payloads: list[Tensor] = []
        self.handles: list[Handle] = []


def prepare_exchange(op: Op, prepare: Preparation) -> Step:
    """Post receives, pack, send. The value is a `Received`; waiting is for those who read it."""
    x = prepare.slot_of(op.args[0], op)
    number, dim = op.kwargs["exchange"], op.kwargs["dim"]
    if not isinstance(number, int) or not isinstance(dim, int):
        raise InputError(
            f"op {op.name!r}: exchange and dim must be numbers, given {number!r}, {dim!r}"
        )
    receive = _pairs(op, "receive", int)
    send = _pairs(op, "send", WeightRef)
    peers = [peer for peer, _ in send]
    pack = dk.GatherPack([prepare.kept_weight(ref, op) for _, ref in send])
    counts = [prepare.weight(ref, op).numel() for _, ref in send]

    def run(values: Values) -> Received:
        request: Request = values[REQUEST_SLOT]
        transport = request.transport
        if transport is None:
            raise InputError("this program exchanges data; give its Executor a transport")
        tensor: Tensor = values[x]
        leading = (*tensor.shape[:dim], *tensor.shape[dim + 1 :])
        received = Received()
        for peer, count in receive:
            buffer = request.buffer(number, peer, False, (*leading, count), tensor.dtype)
            handle = transport.post_receive(buffer, peer, number, request.number)
            received.handles.append(handle)
            request.handles.append(handle)
            received.payloads.append(buffer.movedim(-1, dim))
        if peers:
            messages = [
                request.buffer(number, peer, True, (*leading, count), tensor.dtype)
                for peer, count in zip(peers, counts, strict=True)
            ]
            _pack(pack, tensor, dim, messages)
            for peer, message in zip(peers, messages, strict=True):
                request.handles.append(transport.send(message, peer, number, request.number))
        return received

    return Step(op.name, run, prepare.slot(op.name))


def prepare_payload(op: Op, prepare: Preparation) -> Step:
    """``operator.getitem`` of an exchange: the first reader of a payload waits for it."""
    source, position = prepare.slot_of(op.args[0], op), op.args[1]
    if not isinstance(position, int):
        raise InputError(f"op {op.name!r}: the position of a payload must be a number")
    return Step(
        op.name,
        lambda values: values[source].payloads[position],
        prepare.slot(op.name),
        awaits=(source, position),
    )


def prepare_assemble(op: Op, prepare: Preparation) -> Step:
    """All ranks' channels in global order; a fresh tensor, since payload buffers are reused."""
    pieces, dim = op.args[0], op.kwargs["dim"]
    if not isinstance(pieces, tuple) or not isinstance(dim, int):
        raise InputError(f"op {op.name!r} ({op.kind}) needs a tuple of pieces and a dim")
    slots = [prepare.slot_of(piece, op) for piece in pieces]
    order = prepare.optional_kept_weight(op.kwargs["order"], op)

    def run(values: Values) -> Tensor:
        whole = torch.cat([values[slot] for slot in slots], dim)
        return whole if order is None else whole.index_select(dim, order)

    return Step(op.name, run, prepare.slot(op.name))


def prepare_empty(op: Op, prepare: Preparation) -> Step:
    """The part of a rank that owns no channel: sizes may be symbols of the inputs' sizes."""
    sizes: Any = op.args[0]
    dtype = op.kwargs["dtype"]
    if not isinstance(sizes, tuple) or not isinstance(dtype, Dtype):
        raise InputError(f"op {op.name!r} ({op.kind}) needs sizes and a dtype")
    kind = dtype_of(dtype)

    def run(values: Values) -> Tensor:
        symbols = values[REQUEST_SLOT].symbols
        return torch.empty([evaluate_dim(size, symbols) for size in sizes], dtype=kind)

    return Step(op.name, run, prepare.slot(op.name))


def _pack(pack: dk.GatherPack, x: Tensor, dim: int, messages: list[Tensor]) -> None:
    """The kernel reads four dimensions as ``[B, C, H, W]``, any other number as ``[..., C]``."""
    if x.dim() == 4 and dim != 1:
        pack(x.movedim(dim, -1).unsqueeze(0), [message.unsqueeze(0) for message in messages])
    else:
        pack(x if x.dim() == 4 else x.movedim(dim, -1), messages)


def _pairs(op: Op, key: str, kind: type) -> list[tuple[int, Any]]:
    pairs: Any = op.kwargs[key]
    if not isinstance(pairs, Sequence):
        raise InputError(f"op {op.name!r}: {key} must be pairs of a peer and what it gets")
    for peer, what in pairs:
        if not isinstance(peer, int) or not isinstance(what, kind):
            raise InputError(f"op {op.name!r}: {key} holds {peer!r}: {what!r}")
    return [(peer, what) for peer, what in pairs]
