"""When weights are packed, into which memory, and with which algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from disco_kernels.memory import Pool, return_freed_memory
from disco_kernels.registry import PreparedConv2d
from disco_kernels.winograd import fit_packed_bytes


@dataclass(frozen=True)
class Alternative:
    """One way to compute a layer.

    Attributes:
        algorithm: as that of a `ConvSpec`, never "auto".
        packed_bytes: of the layer's weights.
        saved: multiplications that it saves an image, against direct convolution.
    """

    algorithm: str
    packed_bytes: int
    saved: float


class PackedKernel(ABC):
    """A kernel whose weights are packed when it is made or, with a `Packing`, when that is done.

    Attributes:
        backend: name of the one that runs it.
    """

    backend: str
    _unpacked: Any = None  # what `_pack` reads; dropped when that is done
    _finished: tuple[Tensor, PreparedConv2d] | None = None

    @property
    def packed_weight(self) -> Tensor:
        """One dimension, in the backend's own layout. RuntimeError as long as nothing is packed."""
        return self._parts()[0]

    @property
    def _prepared(self) -> PreparedConv2d:
        return self._parts()[1]

    def _parts(self) -> tuple[Tensor, PreparedConv2d]:
        if self._finished is None:
            raise RuntimeError("the kernel's weights are not packed yet: call Packing.finish first")
        return self._finished

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, the kernel's own header included."""
        return self.packed_weight.nbytes

    @property
    def last_kernel(self) -> str:
        """Which of the backend's kernels computed the latest call: of backend "triton" "triton",
        "sm90 <tile>" (CUDA C++) or "cublas"; empty for others, and before the first call."""
        return self._prepared.last_kernel

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """How it is computed: "off" (directly), "f2", "f4" (Winograd) or "int8"."""

    @abstractmethod
    def _alternatives(self) -> list[Alternative]:
        """What may be chosen, what suits the shape best first."""

    @abstractmethod
    def _pack(self, algorithm: str) -> Tensor:
        """Settle the algorithm and pack."""

    @abstractmethod
    def _prepare(self) -> PreparedConv2d:
        """The backend's part, for what has been packed."""

    def _finish(self, algorithm: str, pool: Pool | None) -> None:
        packed = self._pack(algorithm)
        if pool is not None and packed.device.type == "cpu":
            packed = pool.empty(packed.numel(), packed.dtype).copy_(packed)
        self._finished = packed, self._prepare()
        self._unpacked = None

    def _pack_in(self, packing: Packing | None) -> None:
        """Pack now, or let ``packing`` do it."""
        if packing is None:
            self._finish(self._alternatives()[0].algorithm, None)
        else:
            packing.add(self)

    # The backend's part holds addresses, so copies and pickles make their own.
    def __getstate__(self) -> dict[str, Any]:
        # A piece of a pool's block would take the whole block along.
        return {**self.__dict__, "_finished": self.packed_weight.clone()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._finished = state["_finished"], self._prepare()


class Packing:
    """Packs the weights of many kernels at once, into memory of its own, within a budget.

    Kernels are made with ``packing=`` and can be called after `finish`, which reads their weights.
    Which of them give up Winograd for the budget depends on nothing but their shapes and the order
    in which they were made.

    Args:
        limit: bytes that all packed weights may have together, or None for what suits each shape.

    Attributes:
        packed_bytes: that they have so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise ValueError(f"limit must be a whole number of bytes or None, given {limit!r}")
        self.limit = limit
        self.packed_bytes = 0
        self._kernels: list[PackedKernel] = []
        self._pool = Pool()

    def add(self, kernel: PackedKernel) -> None:
        """Have ``kernel`` packed by `finish`."""
        self._kernels.append(kernel)

    def finish(self) -> None:
        """Pack all kernels added since the last call.

        Raises:
            ValueError: they do not fit within what is left of the limit, even without Winograd
                where that is "auto". Nothing is packed then.
        """
        layers = [kernel._alternatives() for kernel in self._kernels]
        chosen = fit_packed_bytes(
            [[(a.packed_bytes, a.saved) for a in alternatives] for alternatives in layers],
            None if self.limit is None else self.limit - self.packed_bytes,
        )
        for kernel, alternatives, choice in zip(self._kernels, layers, chosen, strict=True):
            kernel._finish(alternatives[choice].algorithm, self._pool)
        self.packed_bytes += sum(kernel.packed_bytes for kernel in self._kernels)
        self._kernels = []
        return_freed_memory()
