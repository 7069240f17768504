"""A rank's side of the exchange: receives are posted, then the selected channels packed and sent.

On the wire a message has its channels last: ``[B, H, W, n]`` for a map, which is channels-last
memory of ``[B, n, H, W]``, so a kernel reads it where it arrived, in whatever dtype it travels.
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
from disco.program.fused import scale_of_images
from disco.program.interpret import dtype_of
from disco.program.message_layout import WIRE_DTYPES, alignment, offsets


class Received:
    """The payloads of one exchange, under way: buffers as tensors of the values' dimensions.

    `scales` are those of int8 payloads, else None, and `handles` those of the payloads' messages,
    position by position.
    """

    __slots__ = ("handles", "payloads", "scales")

    def __init__(self, payloads: Sequence[Tensor], scales: Sequence[Tensor | None]) -> None:
        self.payloads = payloads
        self.scales = scales
        self.handles: list[Handle] = []


class _Part:
    """One of the values that travel together, as this rank sends and receives it."""

    def __init__(
        self, op: Op, prepare: Preparation, value: Any, dim: Any, send: Any, receive: Any, wire: Any
    ):
        if not isinstance(dim, int):
            raise InputError(f"op {op.name!r}: dim must be a number, given {dim!r}")
        if wire is not None and wire not in WIRE_DTYPES:
            raise InputError(
                f"op {op.name!r}: the wire dtype must be one of {', '.join(WIRE_DTYPES)}, given "
                f"{wire!r}: install the release that wrote the program"
            )
        self.slot = prepare.slot_of(value, op)
        self.dim = dim
        self.wire: torch.dtype | None = None if wire is None else getattr(torch, wire)
        self.scaled = self.wire == torch.int8
        self.receive = dict(_pairs(op, "receive", receive, int))
        index = [(p, prepare.kept_weight(r, op)) for p, r in _pairs(op, "send", send, WeightRef)]
        self.send = {peer: positions.numel() for peer, positions in index}
        self._positions = [positions for _, positions in index]
        self._pack = dk.GatherPack(self._positions, wire_dtype=self.wire)

    def leading(self, x: Tensor) -> tuple[int, ...]:
        """The other dimensions than the channels'."""
        return (*x.shape[: self.dim], *x.shape[self.dim + 1 :])

    def dtype(self, x: Tensor) -> torch.dtype:
        """That a value travels in."""
        return self.wire or x.dtype

    def num_bytes(self, x: Tensor, channels: int) -> int:
        """Of a payload of so many channels."""
        dtype, leading = self.dtype(x), self.leading(x)
        if self.scaled:
            return dk.message_numel(dtype, leading, channels)
        return prod(leading) * channels * dtype.itemsize

    def packing(
        self, x: Tensor, messages: list[Tensor], activations: Activations
    ) -> Callable[[Tensor], None]:
        """What packs the value, which now is ``x``, in later requests."""
        last = x.movedim(self.dim, 1 if x.dim() == 4 else -1)
        in_place = last.stride(1) == 1 if x.dim() == 4 else last.is_contiguous()
        served = x.dtype.is_floating_point and in_place
        if not served or activations.fixed(self.slot) is not x:
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
        else:
            self._pack(x.movedim(self.dim, 1 if x.dim() == 4 else -1), messages)


def prepare_exchange(op: Op, prepare: Preparation) -> Step:
    """Post receives, pack, send. The value is a `Received`; waiting is for those who read it.

    Of several values (``dim``, ``send``, ``receive`` and ``wire`` then have an entry for each) a
    message holds one payload after the other. ``wire`` is the dtype that a value travels in; it is
    missing or None for the value's own.
    """
    number = op.kwargs["exchange"]
    if not isinstance(number, int):
        raise InputError(f"op {op.name!r}: exchange must be a number, given {number!r}")
    several = len(op.args) > 1
    columns: list[Any] = [
        op.kwargs[k] if several else (op.kwargs[k],) for k in ("dim", "send", "receive")
    ]
    wire = op.kwargs.get("wire", (None,) * len(op.args) if several else None)
    columns.append(wire if several else (wire,))
    parts = [_Part(op, prepare, x, *rest) for x, *rest in zip(op.args, *columns, strict=True)]

    def run(values: Values) -> Received:
        request: Request = values[REQUEST_SLOT]
        if request.transport is None:
            raise InputError("this program exchanges data; give its Executor a transport")
        kept = request.kept.exchanges.get(number)
        if kept is None:
            tensors: list[Tensor] = [values[part.slot] for part in parts]
            kept = request.kept.exchanges[number] = _make_buffers(parts, tensors)
        received = Received(kept.payloads, kept.scales)
        under_way = {peer: request.receive(m, peer, number) for peer, m in kept.incoming}
        received.handles = [under_way[peer] for peer in kept.peers]
        packs = kept.packs
        if packs is None:
            packs = packs_of(values, kept, request.activations)
            if request.activations.out:
                kept.packs = packs
        for slot, pack in packs:
            pack(values[slot])
        for peer, message in kept.outgoing:
            request.send(message, peer, number)
        request.transport.flush(number)
        return received

    def packs_of(
        values: Values, kept: KeptExchange, activations: Activations
    ) -> list[tuple[int, Callable[[Tensor], None]]]:
        return [
            (part.slot, part.packing(values[part.slot], messages, activations))
            for part, messages in zip(parts, kept.packed, strict=True)
            if messages
        ]

    return Step(op.name, run, prepare.slot(op.name), kind="pack", exchange=number)


def _make_buffers(parts: Sequence[_Part], tensors: Sequence[Tensor]) -> KeptExchange:
    made = KeptExchange()
    arriving: list[dict[int, Tensor]] = [{} for _ in parts]
    leaving: list[dict[int, Tensor]] = [{} for _ in parts]
    for peer in sorted({peer for part in parts for peer in part.receive}):
        message, pieces = _message(parts, tensors, [part.receive.get(peer) for part in parts])
        made.incoming.append((peer, message))
        for found, piece in zip(arriving, pieces, strict=True):
            if piece is not None:
                found[peer] = piece
    for peer in sorted({peer for part in parts for peer in part.send}):
        message, pieces = _message(parts, tensors, [part.send.get(peer) for part in parts])
        made.outgoing.append((peer, message))
        for found, piece in zip(leaving, pieces, strict=True):
            if piece is not None:
                found[peer] = piece
    for part, x, found in zip(parts, tensors, arriving, strict=True):
        for peer, piece in found.items():
            values, scale = piece, None
            if part.scaled:
                values, scale = dk.message_views(piece, part.leading(x), part.receive[peer])
            made.payloads.append(values.movedim(-1, part.dim))
            made.scales.append(scale)
            made.peers.append(peer)
    # In the order of the part's own lists of channels.
    made.packed = [
        [found[peer] for peer in part.send] for part, found in zip(parts, leaving, strict=True)
    ]
    return made


def _message(
    parts: Sequence[_Part], tensors: Sequence[Tensor], counts: Sequence[int | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """A message's buffer, and in it the payload of each part that it has.

    One payload is a tensor of its dtype; several, whose dtypes may differ, share a buffer of bytes.
    """
    sizes = [
        0 if n is None else part.num_bytes(x, n)
        for part, x, n in zip(parts, tensors, counts, strict=True)
    ]
    steps = [
        alignment(str(part.dtype(x)).removeprefix("torch."), part.scaled)
        for part, x in zip(parts, tensors, strict=True)
    ]
    begin, num_bytes = offsets(sizes, steps)
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=tensors[0].device)
    pieces: list[Tensor | None] = []
    for part, x, n, first, size in zip(parts, tensors, counts, begin, sizes, strict=True):
        if n is None:
            pieces.append(None)
            continue
        piece = buffer[first : first + size].view(part.dtype(x))
        pieces.append(piece if part.scaled else piece.view(*part.leading(x), n))
    there = [piece for piece in pieces if piece is not None]
    return (there[0] if len(there) == 1 else buffer), pieces


def prepare_payload(op: Op, prepare: Preparation) -> Step:
    """``operator.getitem`` of an exchange: whoever reads a payload waits for it."""
    source, position = _payload_at(op, prepare)
    out = prepare.slot(op.name)
    prepare.payloads.add(out)

    def run(values: Values) -> Tensor:
        request: Request = values[REQUEST_SLOT]
        received: Received = values[source]
        request.arriving[out] = received.handles[position]
        payload = received.payloads[position]
        request.activations.keep_view(out, payload)
        return payload

    return Step(op.name, run, out)


def prepare_payload_scale(op: Op, prepare: Preparation) -> Step:
    """The scales ``[images, n]`` of an int8 payload, in the same message."""
    source, position = _payload_at(op, prepare)
    out = prepare.slot(op.name)
    prepare.payloads.add(out)

    def run(values: Values) -> Tensor | None:
        received: Received = values[source]
        values[REQUEST_SLOT].arriving[out] = received.handles[position]
        return received.scales[position]

    return Step(op.name, run, out)


def _payload_at(op: Op, prepare: Preparation) -> tuple[int, int]:
    source, position = prepare.slot_of(op.args[0], op), op.args[1]
    if not isinstance(position, int):
        raise InputError(f"op {op.name!r}: the position of a payload must be a number")
    return source, position


def prepare_widen(op: Op, prepare: Preparation) -> Step:
    """A payload in a wire dtype as a tensor of its value's dtype, for those who read no other."""
    payload, scale = prepare.slot_of(op.args[0], op), prepare.optional_slot(op.kwargs["scale"], op)
    dim, name = op.kwargs["dim"], op.kwargs["dtype"]
    if not isinstance(dim, int) or not isinstance(name, Dtype):
        raise InputError(f"op {op.name!r} ({op.kind}) needs a dim and a dtype")
    dtype, out = dtype_of(name), prepare.slot(op.name)

    def run(values: Values) -> Tensor:
        x: Tensor = values[payload]
        wide = values[REQUEST_SLOT].activations.out.get(out)
        if wide is None:
            wide = torch.empty_like(x, dtype=dtype)
        factors = None if scale is None else scale_of_images(values[scale], x.dim(), dim)
        if factors is not None and dtype != torch.float32:
            return wide.copy_(x.float() * factors)  # as kernels widen it, then rounded
        wide.copy_(x)
        return wide if factors is None else wide.mul_(factors)

    return Step(op.name, run, out, writes_out=True)


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
        request: Request = values[REQUEST_SLOT]
        shape = [evaluate_dim(size, request.symbols) for size in sizes]
        return torch.empty(shape, dtype=kind, device=request.device)

    return Step(op.name, run, prepare.slot(op.name))


def _pairs(op: Op, key: str, pairs: Any, kind: type) -> list[tuple[int, Any]]:
    if not isinstance(pairs, Sequence):
        raise InputError(f"op {op.name!r}: {key} must be pairs of a peer and what it gets")
    for peer, what in pairs:
        if not isinstance(peer, int) or not isinstance(what, kind):
            raise InputError(f"op {op.name!r}: {key} holds {peer!r}: {what!r}")
    return [(peer, what) for peer, what in pairs]
