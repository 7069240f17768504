"""One exchanged tensor as the plan describes it: who sends which channels, and how many bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from disco.program.message_layout import alignment, item_bytes, offsets, payload_bytes

Channels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class GatherRuns:
    """What the senders of an exchange read, over all its messages, for one pixel or token.

    Attributes:
        channels: that are sent.
        runs: of neighbouring channels that they lie in.
        lines: of 64 bytes that hold them, where each pixel begins with a line.
    """

    channels: int = 0
    runs: int = 0
    lines: int = 0


@dataclass(frozen=True)
class DenseInputs:
    """What a layer that sends partial sums would read, had every rank sent all of its inputs.

    Attributes:
        elements_per_channel, scales_per_channel: of one image, as of an `ExchangePlan`.
        counts: per rank its channels.
    """

    elements_per_channel: int
    scales_per_channel: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ExchangePlan:
    """One exchanged tensor.

    Attributes:
        number: its place in the order of exchanges, the same on all ranks.
        value, dim, dtype: what is exchanged, and which of its dimensions holds the channels.
        bytes_per_channel: of one image, as it travels; in int8 with its scales.
        ownership: per rank its channels.
        sent: ``sent[i][j]``: channels that rank j sends rank i.
        consumers: layers that read received channels.
        gathered_by: ops that need the value whole ("output" for the model's result).
        form: "inputs" of layers, or "partial sums" of one layer's outputs, which the receiver adds.
        dense_bytes: of one image, had every rank got all channels of the others; None for what
            follows from the ownership.
        statistics: values that travel in the same messages, and are small.
        statistics_bytes: ``[receiver][sender]``, of one image; empty for none.
        gather: what senders read; zeros for values that travel whole and for partial sums.
        gather_before: the same, had channels not been put into an order for it.
        wire_dtype: that the channels travel in (statistics: always `dtype`); empty for `dtype`.
        narrows: whether they may travel in another dtype than `dtype`: not so the model's output,
            statistics, and what is not of floats.
        elements_per_channel: of one image.
        scales_per_channel: of one image in int8; 0 for what has no images to scale one by one.
        dense_inputs: of the layer that the partial sums are of, unless they are exchanged, too.
    """

    number: int
    value: str
    dim: int
    dtype: str
    bytes_per_channel: int
    ownership: Channels
    sent: tuple[Channels, ...]
    consumers: tuple[str, ...]
    gathered_by: tuple[str, ...]
    form: str = field(default="inputs", metadata={"since": (1, 2)})
    dense_bytes: int | None = field(default=None, metadata={"since": (1, 2)})
    statistics: tuple[str, ...] = field(default=(), metadata={"since": (1, 2)})
    statistics_bytes: Channels = field(default=(), metadata={"since": (1, 2)})
    gather: GatherRuns = field(default=GatherRuns(), metadata={"since": (1, 2)})
    gather_before: GatherRuns = field(default=GatherRuns(), metadata={"since": (1, 2)})
    wire_dtype: str = field(default="", metadata={"since": (1, 3)})
    narrows: bool = field(default=False, metadata={"since": (1, 3)})
    elements_per_channel: int = field(default=0, metadata={"since": (1, 3)})
    scales_per_channel: int = field(default=0, metadata={"since": (1, 3)})
    dense_inputs: DenseInputs | None = field(default=None, metadata={"since": (1, 3)})

    @property
    def wire(self) -> str:
        """The dtype that the channels travel in."""
        return self.wire_dtype or self.dtype

    @property
    def is_narrow(self) -> bool:
        """Whether they travel in another dtype than their own."""
        return self.wire != self.dtype

    def bytes_between(self, receiver: int, sender: int, batch: int = 1) -> int:
        """Bytes of the message from `sender` to `receiver`, for so many images."""
        statistics = self.statistics_bytes[receiver][sender] if self.statistics else 0
        return self._message_bytes(len(self.sent[receiver][sender]), statistics, batch)

    def bytes_for(self, batch: int) -> int:
        """Over all pairs of ranks, for so many images: int8 is padded once a message."""
        ranks = range(len(self.ownership))
        return sum(self.bytes_between(i, j, batch) for i in ranks for j in ranks)

    @property
    def bytes_per_image(self) -> int:
        """Over all pairs of ranks, for a batch of 1."""
        return self.bytes_for(1)

    def _message_bytes(self, channels: int, statistics: int, batch: int) -> int:
        if not self.is_narrow:
            return batch * (channels * self.bytes_per_channel + statistics)
        scales = self.scales_per_channel if self.wire == "int8" else 0
        values = batch * channels * self.elements_per_channel
        payload = payload_bytes(self.wire, values, batch * channels * scales)
        steps = (alignment(self.wire, bool(scales)), item_bytes(self.dtype))
        return offsets((payload, batch * statistics), steps)[1]

    @property
    def bytes_dense(self) -> int:
        """The same, had every rank got all channels of the others."""
        if self.dense_bytes is not None:
            return self.dense_bytes
        statistics = self.statistics_bytes or ((0,) * len(self.ownership),) * len(self.ownership)
        return sum(
            self._message_bytes(len(owned), row[sender], 1)
            for receiver, row in enumerate(statistics)
            for sender, owned in enumerate(self.ownership)
            if receiver != sender
        )
