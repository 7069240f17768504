"""A rank's side of the exchange: receives are posted, then the selected channels packed and sent.

On the wire a message has its channels last: ``[B, H, W, n]`` for a map, which is channels-last
memory of ``[B, n, H, W]``, so a kernel reads it where it arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

import disco_kernels as dk
from disco.errors import InputError
from disco.executor.activations import Activations
from disco.executor.request import KeptExchange, Request
from disco.executor.steps import REQUEST_SLOT, Preparation, Step, Values
from disco.executor.transport import Handle
from disco.program import Dtype, Op, WeightRef, evaluate_dim
from disco.program.interpret import dtype_of


class Received:
    """The payloads of one exchange, under way: buffers as tensors of the values' dimensions.

    `handles` are those of the payloads' messages, position by position.
    """

    __slots__ = ("handles", "payloads")

    def __init__(self) -> None:
        self.payloads: list[Tensor] = []
        self.handles: list[Handle] = []


class _Part:
    """One of the values that travel together, as this rank sends and receives it."""

    def __init__(self, op: Op, prepare: Preparation, value: Any, dim: Any, send: Any, receive: Any):
        if not isinstance(dim, int):
            raise InputError(f"op {op.name!r}: dim must be a number, given {dim!r}")
        self.slot = prepare.slot_of(value, op)
        self.dim = dim
        self.receive = dict(_pairs(op, "receive", receive, int))
        index = [(p, prepare.kept_weight(r, op)) for p, r in _pairs(op, "send", send, WeightRef)]
        self.send = {peer: positions.numel() for peer, positions in index}
        self._positions = [positions for _, positions in index]
        self._pack = dk.GatherPack(self._positions)

    def leading(self, x: Tensor) -> tuple[int, ...]:
        """The other dimensions than the channels'."""
        return (*x.shape[: self.dim], *x.shape[self.dim + 1 :])

    def packing(
        self, x: Tensor, messages: list[Tensor], activations: Activations
    ) -> Callable[[Tensor], None]:
        """What packs the value, which now is ``x``, in later requests."""
        last = x if x.dim() == 4 else x.movedim(self.dim, -1)
        in_place = last.stride(1) == 1 if x.dim() == 4 else last.is_contiguous()
        plain = x.dtype.is_floating_point and (x.dim() != 4 or self.dim == 1) and in_place
        if not plain or activations.fixed(self.slot) is not x:
            return lambda value: self.pack(value, messages)
        bound = self._pack.bind(last, messages)
        return lambda _: bound()

    def pack(self, x: Tensor, messages: list[Tensor]) -> None:
        """The kernel reads 4 dimensions as ``[B, C, H, W]``, any other number as ``[..., C]``.

        Kernels are for floats; masks and indices are packed by torch.
        """
        if not x.dtype.is_floating_point:
            last = x.movedim(self.dim, -1)
            for positions, message in zip(self._positions, messages, strict=True):
                message.copy_(last[..., positions])
        elif x.dim() == 4 and self.dim != 1:
            moved = [message.unsqueeze(0) for message in messages]
            self._pack(x.movedim(self.dim, -1).unsqueeze(0), moved)
        else:
            self._pack(x if x.dim() == 4 else x.movedim(self.dim, -1), messages)


def prepare_exchange(op: Op, prepare: Preparation) -> Step:
    """Post receives, pack, send. The value is a `Received`; waiting is for those who read it.

    Of several values (``dim``, ``send`` and ``receive`` then have an entry for each) a message
    holds one payload after the other.
    """
    number = op.kwargs["exchange"]
    if not isinstance(number, int):
        raise InputError(f"op {op.name!r}: exchange must be a number, given {number!r}")
    keys = ("dim", "send", "receive")
    columns: list[Any] = [op.kwargs[k] if len(op.args) > 1 else (op.kwargs[k],) for k in keys]
    parts = [
        _Part(op, prepare, x, dim, send, receive)
        for x, dim, send, receive in zip(op.args, *columns, strict=True)
    ]
    sources = sorted({peer for part in parts for peer in part.receive})
    targets = sorted({peer for part in parts for peer in part.send})

    def run(values: Values) -> Received:
        request: Request = values[REQUEST_SLOT]
        if request.transport is None:
            raise InputError("this program exchanges data; give its Executor a transport")
        kept = request.kept.exchanges.get(number)
        if kept is None:
            kept = first(values, request)
            if request.activations.out:
                request.kept.exchanges[number] = kept
        received = Received()
        handles = [request.receive(buffer, peer, number) for peer, buffer in kept.receives]
        for payload, place in kept.payloads:
            received.payloads.append(payload)
            received.handles.append(handles[place])
        for slot, pack in kept.packs:
            pack(values[slot])
        for peer, message in kept.sends:
            request.send(message, peer, number)
        return received

    def first(values: Values, request: Request) -> KeptExchange:
        tensors: list[Tensor] = [values[part.slot] for part in parts]
        leading = [part.leading(x) for part, x in zip(parts, tensors, strict=True)]
        dtype = tensors[0].dtype

        def buffer(peer: int, is_send: bool) -> tuple[Tensor, list[Tensor | None]]:
            counts = [(part.send if is_send else part.receive).get(peer) for part in parts]
            shapes = [None if n is None else (*s, n) for s, n in zip(leading, counts, strict=True)]
            return _message(request, (number, peer, is_send), shapes, dtype)

        kept = KeptExchange()
        incoming = [buffer(peer, False) for peer in sources]
        outgoing = [buffer(peer, True) for peer in targets]
        kept.receives = [(peer, m) for peer, (m, _) in zip(sources, incoming, strict=True)]
        kept.sends = [(peer, m) for peer, (m, _) in zip(targets, outgoing, strict=True)]
        for position, (part, x) in enumerate(zip(parts, tensors, strict=True)):
            for place, (_, pieces) in enumerate(incoming):
                piece = pieces[position]
                if piece is not None:
                    kept.payloads.append((piece.movedim(-1, part.dim), place))
            filled = [p for _, pieces in outgoing if (p := pieces[position]) is not None]
            if filled:
                kept.packs.append((part.slot, part.packing(x, filled, request.activations)))
        return kept

    return Step(op.name, run, prepare.slot(op.name), kind="pack")


def _message(
    request: Request,
    key: tuple[int, int, bool],
    shapes: Sequence[tuple[int, ...] | None],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor | None]]:
    """A message's buffer, and in it the payload of each part that it has."""
    there = [shape for shape in shapes if shape is not None]
    if len(there) == 1:
        buffer = request.buffer(*key, there[0], dtype)
        return buffer, [None if shape is None else buffer for shape in shapes]
    buffer = request.buffer(*key, (sum(prod(shape) for shape in there),), dtype)
    pieces = iter(buffer.split([prod(shape) for shape in there]))
    return buffer, [None if shape is None else next(pieces).view(shape) for shape in shapes]


def prepare_payload(op: Op, prepare: Preparation) -> Step:
    """``operator.getitem`` of an exchange: whoever reads a payload waits for it."""
    source, position = prepare.slot_of(op.args[0], op), op.args[1]
    if not isinstance(position, int):
        raise InputError(f"op {op.name!r}: the position of a payload must be a number")
    out = prepare.slot(op.name)
    prepare.payloads.add(out)

    def run(values: Values) -> Tensor:
        request: Request = values[REQUEST_SLOT]
        received: Received = values[source]
        request.arriving[out] = received.handles[position]
        # Its buffer is the request's and stays, so kernels may be bound to it.
        return request.activations.views.setdefault(out, received.payloads[position])

    return Step(op.name, run, out)


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


def _pairs(op: Op, key: str, pairs: Any, kind: type) -> list[tuple[int, Any]]:
    if not isinstance(pairs, Sequence):
        raise InputError(f"op {op.name!r}: {key} must be pairs of a peer and what it gets")
    for peer, what in pairs:
        if not isinstance(peer, int) or not isinstance(what, kind):
            raise InputError(f"op {op.name!r}: {key} holds {peer!r}: {what!r}")
    return [(peer, what) for peer, what in pairs]
