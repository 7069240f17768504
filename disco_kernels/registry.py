"""The backends, below torch's dispatcher, and the choice among them.

``reference`` and ``cpu`` share a dispatch key, so torch cannot choose between them; this does. The
choice is made when weights are packed, never by timing.
"""

from __future__ import annotations

import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from disco_kernels.spec import Conv2dDescriptor, ConvSpec, GroupedDescriptor, Part

BACKEND_VARIABLE = "DISCO_KERNELS_BACKEND"


# What a backend is wanted for: a layer of a model, or the messages of an exchange.
Work = Literal["layer", "gather_pack"]


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot do what was asked."""


@dataclass(frozen=True)
class Outgoing:
    """Messages that a kernel writes beside its output.

    Attributes:
        messages: as of `PreparedGatherPack.run`, one for each of the lists of channels that the
            kernel was prepared with.
        images: rows of scales of an int8 message (`disco_kernels.wire.num_images`).
    """

    messages: Sequence[Tensor]
    images: int


class PreparedConv2d(ABC):
    """A descriptor made ready by one backend; holds no weights, so it can be shared by threads."""

    @abstractmethod
    def run(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        accumulate: bool,
        scales: Sequence[Tensor | None] | None = None,
        outgoing: Outgoing | None = None,
    ) -> None:
        """Write (or add onto) ``out`` ``[B, O, OH, OW]``, channel stride 1.

        Sources may be in a wire dtype (`disco_kernels.wire`), int8 with its scale ``[G, C]`` at the
        same place of ``scales``. ``outgoing`` gets what a `PreparedGatherPack` would make of
        ``out``.
        """

    def bind(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        outgoing: Outgoing | None = None,
        scales: Sequence[Tensor | None] | None = None,
    ) -> Callable[[], None]:
        """`run` for these tensors, to be called again and again, by one thread at a time.

        It reads and writes their memory as it is at each call, and keeps it alive.
        """

        def run() -> None:
            self.run(sources, packed_weight, bias, residual, out, False, scales, outgoing)

        return run

    @property
    def last_kernel(self) -> str:
        """Which of a backend's kernels computed the latest call; empty where there is one only."""
        return ""

    @property
    def sums_in_parts(self) -> bool:
        """Whether `bind_part` works: a sum that is broken off and continued has the same bits."""
        return False

    def bind_part(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        part: Part,
        outgoing: Outgoing | None = None,
        scales: Sequence[Tensor | None] | None = None,
    ) -> Callable[[], None]:
        """As `bind`, for a part of the sum. Computes nothing yet; other segments are not read."""
        raise NotImplementedError("sums_in_parts is False")


class PreparedGatherPack(ABC):
    """Lists of channels made ready by one backend; can be shared by threads."""

    @abstractmethod
    def run(self, x: Tensor, messages: Sequence[Tensor]) -> None:
        """Write the listed channels of ``x`` ``[B, C, H, W]``, channel stride 1, to the messages:
        contiguous, all in one wire dtype, of the size that `disco_kernels.wire` says."""

    def bind(self, x: Tensor, messages: Sequence[Tensor]) -> Callable[[], None]:
        """`run` for these tensors, to be called again and again; keeps them alive."""

        def run() -> None:
            self.run(x, messages)

        return run


class Backend(ABC):
    """What a backend provides. All tensors are ``[B, C, H, W]`` with a channel stride of 1,
    but for sources of few channels, which may lie in any way (`disco_kernels.core.as_sources`)."""

    name: str

    @property
    def layout(self) -> str:
        """What the layout of a packed weight depends on besides the weight."""
        return self.name

    @property
    def automatic(self) -> bool:
        """Whether the automatic choice may take it; an explicit request always may."""
        return True

    def lacks(self, work: Work) -> str | None:
        """Why it has no kernels for this work, or None if it has."""
        return None

    @abstractmethod
    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot be served, or None if they can."""

    def int8_refusal(self) -> str | None:
        """Why 8-bit integers cannot be multiplied, or None if they can."""
        return "it has no products of 8-bit integers"

    @abstractmethod
    def packed_numel(
        self,
        out_channels: int,
        segment_channels: Sequence[int],
        taps: int,
        dtype: torch.dtype,
        algorithm: str = "off",
    ) -> int:
        """Elements of one node's packed weight, which is of the weight's dtype."""

    @abstractmethod
    def prepack(
        self, weight: Tensor, segment_channels: Sequence[int], algorithm: str = "off"
    ) -> Tensor:
        """``[O, K, kh, kw]`` -> ``[packed_numel]``, K in the order of the segments.

        Raises ValueError if the backend has no such algorithm (that of a `ConvSpec`).
        """

    @abstractmethod
    def prepare(
        self,
        descriptor: Conv2dDescriptor,
        dtype: torch.dtype,
        pack: Sequence[Tensor] = (),
    ) -> PreparedConv2d:
        """``dtype`` is that of the weights, and of every tensor of the calls; ``pack`` has per
        message that a call may write beside its output the channels of it (int32)."""

    def dense_is_faster(self, descriptor: Conv2dDescriptor, dtype: torch.dtype) -> bool:
        """Whether the virtual nodes of a layer run faster as one that reads every channel."""
        return False

    def dense_beside(
        self, descriptor: Conv2dDescriptor, dtype: torch.dtype, device: torch.device
    ) -> bool:
        """Whether some calls of a layer do, for which the weights of such a node are packed, too,
        behind those of the others."""
        return False

    # A grouped convolution is a set of virtual nodes. A backend that has better overrides these.

    def groups_as_nodes(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> bool:
        """Whether the groups run as virtual nodes."""
        return True

    def grouped_numel(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> int:
        """Elements of a grouped convolution's packed weight, which is of the weight's dtype."""
        (kh, kw), inputs = descriptor.spec.kernel_size, descriptor.in_per_group
        outputs, algorithm = descriptor.out_per_group, descriptor.spec.algorithm
        return descriptor.groups * self.packed_numel(outputs, (inputs,), kh * kw, dtype, algorithm)

    def prepack_grouped(self, weight: Tensor, descriptor: GroupedDescriptor) -> Tensor:
        """``[O, I / groups, kh, kw]`` -> ``[grouped_numel]``."""
        counts, algorithm = (descriptor.in_per_group,), descriptor.spec.algorithm
        groups = weight.detach().split(descriptor.out_per_group)
        return torch.cat([self.prepack(group, counts, algorithm) for group in groups])

    def prepare_grouped(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> PreparedConv2d:
        """``dtype`` is that of the weights, and of every tensor of the calls."""
        return self.prepare(descriptor.as_nodes(), dtype)

    @abstractmethod
    def max_pool2d_(self, x: Tensor, window: ConvSpec, out: Tensor) -> None:
        """Write the largest value of every window of ``x`` to ``out``, channel stride 1."""

    @abstractmethod
    def global_avg_pool2d_(self, x: Tensor, out: Tensor) -> Callable[[], None]:
        """Write the mean of every channel of ``x`` to ``out`` ``[B, C, 1, 1]``, channel stride 1.

        What it returns does so again, for what ``x`` holds by then.
        """

    @abstractmethod
    def prepare_gather_pack(self, index: Sequence[Tensor]) -> PreparedGatherPack:
        """For one message of the channels ``index[d]`` (int32) a destination."""


# The order in which the automatic choice asks.
_ORDER = ("cuda", "triton", "cpu", "reference")

_backends: dict[str, Backend] = {}
_said: set[str] = set()
_said_lock = threading.Lock()


def register(backend: Backend) -> None:
    _backends[backend.name] = backend


def names() -> tuple[str, ...]:
    """Every backend name that may be asked for."""
    return _ORDER


def get(name: str) -> Backend:
    """The backend called ``name``. Raises BackendUnavailable, saying why, if there is none."""
    backend = _backends.get(name)
    if backend is None:
        raise BackendUnavailable(f"backend {name!r}: {_missing(name)}")
    return backend


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, work: Work = "layer"
) -> str | None:
    """Why ``name`` refuses such work on tensors of this device and dtype, or None."""
    backend = _backends.get(name)
    if backend is None:
        return _missing(name)
    return backend.lacks(work) or backend.refusal(device, dtype)


def resolve(
    requested: str | None, device: torch.device, dtype: torch.dtype, work: Work = "layer"
) -> str:
    """Choose a backend.

    Args:
        requested: a name, or None for DISCO_KERNELS_BACKEND if set, else the automatic choice.
        device, dtype: of the weights.
        work: what for.

    Raises:
        BackendUnavailable: the requested backend refuses; names every backend and its reason.
    """
    name = requested or os.environ.get(BACKEND_VARIABLE) or None
    if name is not None:
        reason = refusal(name, device, dtype, work)
        if reason is None:
            return name
        raise BackendUnavailable(_explain(name, device, dtype, work))
    passed_over: list[str] = []
    for candidate in _ORDER:
        reason = refusal(candidate, device, dtype, work)
        if reason is None and get(candidate).automatic:
            if candidate == "reference":
                _say_once(
                    f"disco_kernels: {dtype} on {device.type} runs on the plain-torch reference",
                    "; ".join(passed_over),
                )
            return candidate
        if reason is not None and get(candidate).lacks(work) is None:
            passed_over.append(f"{candidate}: {reason}")
    raise BackendUnavailable(_explain("any", device, dtype, work))


def require_int8(name: str) -> None:
    """Raise BackendUnavailable, saying why, if the backend has no products of 8-bit integers."""
    reason = get(name).int8_refusal()
    if reason is not None:
        raise BackendUnavailable(
            f"backend {name!r} cannot multiply 8-bit integers: {reason}; compute in bfloat16 or "
            "float32"
        )


def _missing(name: str) -> str:
    return f"no such backend; allowed: {', '.join(_ORDER)}"


def _explain(name: str, device: torch.device, dtype: torch.dtype, work: Work) -> str:
    lines = [f"backend {name!r} was asked for, but cannot serve {dtype} tensors on {device}:"]
    known = _ORDER if name in _ORDER or name == "any" else (*_ORDER, name)
    for candidate in known:
        lines.append(f"  {candidate}: {refusal(candidate, device, dtype, work) or 'available'}")
    lines.append(f"ask for an available one (backend= or {BACKEND_VARIABLE}), or for none")
    return "\n".join(lines)


def _say_once(message: str, reasons: str) -> None:
    with _said_lock:
        if message in _said:
            return
        _said.add(message)
    warnings.warn(f"{message} ({reasons})", RuntimeWarning, stacklevel=3)
