"""The sender's side of an exchange: selected channels as one message a destination."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import channels_last, check_in_place, index_tensor, refuse_derivatives
from disco_kernels.registry import PreparedGatherPack
from disco_kernels.wire import check_wire_dtype, message_shape, num_images


class GatherPack:
    """Selected channels of an activation as one contiguous message per destination, in one pass.

    Args:
        index: per destination the channels to send, in the order of the message. Any order, and a
            channel may be listed more than once.
        wire_dtype: what messages are in: float32, float16, bfloat16 or int8 (`disco_kernels.wire`
            has the layout and the rounding), or None for that of the activation.
        backend: a name, or None for the automatic choice (made for each dtype and device that
            comes).

    Raises:
        ValueError: channels that cannot be, or another wire dtype.
        BackendUnavailable: ``backend`` does not exist.
    """

    def __init__(
        self,
        index: Sequence[Tensor | Sequence[int]],
        backend: str | None = None,
        *,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.index = [
            index_tensor(channels, 2**31 - 1, f"index[{d}]") for d, channels in enumerate(index)
        ]
        self.counts = [channels.numel() for channels in self.index]
        if wire_dtype is not None:
            check_wire_dtype(wire_dtype)
        self.wire_dtype = wire_dtype
        self.backend = backend
        self._largest = [int(channels.max()) if channels.numel() else -1 for channels in self.index]
        self._prepared: dict[tuple[torch.dtype, torch.device], PreparedGatherPack] = {}

    def __call__(self, x: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Pack.

        Args:
            x: ``[B, C, H, W]`` or ``[..., C]`` (any other number of dimensions), floating.
            out: per destination a contiguous message of the shape below, or None.

        Returns:
            The messages: ``[B, H, W, n_d]`` (``[..., n_d]``), or in int8 one row of bytes with the
            scales in it. `message_views` gives the values and scales of either.

        Raises:
            ValueError: shapes, dtypes or channels that do not fit.
            BackendUnavailable: the requested backend cannot serve ``x``.
        """
        refuse_derivatives(type(self).__name__, x, *(out or ()))
        if x.dim() == 4:
            image = channels_last(x, "x")
            leading = (x.shape[0], *x.shape[2:])
        else:
            leading = tuple(x.shape[:-1])
            image = _tokens_as_images(x, leading)
        for d, largest in enumerate(self._largest):
            if largest >= image.shape[1]:
                raise ValueError(
                    f"index[{d}] names channel {largest}; the activation has {image.shape[1]}"
                )
        if out is None:
            messages = self.empty_messages(leading, x.dtype, x.device)
        else:
            messages = list(out)
            self.check_messages(messages, leading, x.dtype, x.device)
        prepared = self._prepared.get((x.dtype, x.device)) or self._prepare(x)
        prepared.run(image, messages)
        return messages

    def bind(self, x: Tensor, out: Sequence[Tensor]) -> Callable[[], None]:
        """The call with these tensors, made ready to be repeated: nothing is checked again.

        Runs once. Raises ValueError also for an ``x`` that had to be copied (a channel stride other
        than 1).
        """
        messages = self(x, out)
        image = channels_last(x, "x") if x.dim() == 4 else _tokens_as_images(x, x.shape[:-1])
        check_in_place("x", x, image)
        return self._prepared[x.dtype, x.device].bind(image, messages)

    @property
    def channels_needed(self) -> int:
        """One more than the largest channel that is listed."""
        return max(self._largest, default=-1) + 1

    def empty_messages(
        self, leading: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """Uninitialised messages for an activation of this dtype.

        ``leading`` are its dimensions without the channels: ``(B, H, W)`` for a map.
        """
        wire = self.wire_dtype or dtype
        return [
            torch.empty(message_shape(wire, leading, count), dtype=wire, device=device)
            for count in self.counts
        ]

    def _prepare(self, x: Tensor) -> PreparedGatherPack:
        chosen = registry.get(registry.resolve(self.backend, x.device, x.dtype, "gather_pack"))
        prepared = self._prepared[x.dtype, x.device] = chosen.prepare_gather_pack(self.index)
        return prepared

    def check_messages(
        self,
        messages: Sequence[Tensor],
        leading: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raise ValueError unless these can take the messages of such an activation."""
        wire = self.wire_dtype or dtype
        shapes = [message_shape(wire, leading, count) for count in self.counts]
        if len(messages) != len(shapes):
            raise ValueError(
                f"{len(shapes)} destinations need as many messages, given {len(messages)}"
            )
        for d, (message, shape) in enumerate(zip(messages, shapes, strict=True)):
            fits = message.shape == shape and message.dtype == wire
            aligned = wire != torch.int8 or message.data_ptr() % 4 == 0
            if not (fits and aligned and message.is_contiguous() and message.device == device):
                raise ValueError(
                    f"message {d} must be a contiguous {list(shape)} {wire} on {device}"
                    + (" that begins at a multiple of 4 bytes" if wire == torch.int8 else "")
                    + f", given {list(message.shape)} {message.dtype} on {message.device} with "
                    f"strides {message.stride()} at {message.data_ptr():#x}"
                )

    # What a backend prepared holds addresses, so copies and pickles make their own.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}


def _tokens_as_images(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """``[..., C]`` as ``[images, C, tokens, 1]``; see `disco_kernels.wire` for what an image is."""
    if x.dim() < 1:
        raise ValueError("x must be [B, C, H, W] or [..., C], given a scalar")
    images = num_images(leading)
    tokens = math.prod(leading[1:]) if len(leading) > 1 else math.prod(leading)
    return channels_last(x.reshape(images, tokens, 1, x.shape[-1]).permute(0, 3, 1, 2), "x")
