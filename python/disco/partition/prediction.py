"""What a plan predicts for a cluster; plain data, written into the plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """Of one image, by the model of `disco.partition.cost`."""

    compute_ms: float
    exchange_ms: float

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.exchange_ms


@dataclass(frozen=True)
class NodeMemory:
    """Bytes that a rank holds between and during requests of one image.

    Attributes:
        weight_bytes: packed for the kernels, computed directly (Winograd takes more).
        activation_bytes: at their peak, the input included.
        message_bytes: buffers of everything it sends and receives.
    """

    weight_bytes: int
    activation_bytes: int
    message_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.message_bytes

    def __str__(self) -> str:
        weights, activations, messages = (
            f"{n / 1e6:.2f}" for n in (self.weight_bytes, self.activation_bytes, self.message_bytes)
        )
        return (
            f"{self.total_bytes / 1e6:.2f} MB (weights {weights}, activations {activations}, "
            f"messages {messages})"
        )


@dataclass(frozen=True)
class FewerNodes:
    """The same model on the fastest nodes only.

    Attributes:
        nodes: their names.
        latency_ms: predicted, of one image.
        fits: whether it fits into their memories.
    """

    nodes: tuple[str, ...]
    latency_ms: float
    fits: bool
