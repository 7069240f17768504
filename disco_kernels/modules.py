"""The swapped forms of ``nn.Conv2d`` and ``nn.Linear``.

A swap changes a module's class and adds state beside its own; Parameters, hooks, names and
``state_dict`` keys stay as they are. Inference runs all virtual nodes in one fused call on weights
that were packed before; training runs torch's own formulas on the live weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from disco_kernels import functional, registry
from disco_kernels.pattern import LayerPattern, Ownership, find_selected
from disco_kernels.spec import Pair

_BUFFERS = ("_disco_packed", "_disco_inputs", "_disco_outputs")


@dataclass(frozen=True)
class SwapState:
    """What a swapped module remembers. Immutable, so threads and copies may share it."""

    requested_backend: str | None
    backend: str
    layout: str


@dataclass(frozen=True)
class NodesState(SwapState):
    """Of a module that runs as virtual nodes."""

    out_ownership: Ownership
    in_ownership: Ownership
    tolerance: float
    pattern: LayerPattern
    in_splits: tuple[int, ...]
    out_splits: tuple[int, ...]


class SwappedMixin:
    """State and life cycle that the swapped classes share; see `disco_kernels.swap_`."""

    weight: Tensor
    training: bool
    _disco: SwapState
    # The Parameter that was packed, or None. Anything else in its place (assigned, handed over by
    # torch.func.functional_call, computed by a parametrization) is not what was packed; and once a
    # gradient reached it, an optimizer may have changed it.
    _disco_source: Tensor | None
    # The hook that tells when a gradient reached the Parameter, and whether there is one: there is
    # none where the Parameter took no gradient when it was packed.
    _disco_hook: RemovableHandle | None
    _disco_watched: bool
    _disco_packed: Tensor

    def repack(self) -> None:
        """Pack the live weights again, whatever channels they select by now.

        Runs by itself after ``.to()``, ``load_state_dict`` and ``.eval()``; call it after changing
        weights in place in eval mode.
        """
        self._stale()
        if not self.weight.is_meta:  # else no data to pack; torch's formulas still give shapes
            self._attach_again()

    def _attach_again(self) -> None:
        raise NotImplementedError

    def _keep(self, state: SwapState, buffers: dict[str, Tensor | None]) -> None:
        """Take this state and these buffers, made of the live weight."""
        # Reached through nn.Module's own attribute handling, hence the cast of self.
        module: Any = self
        module._disco = state
        for name, value in buffers.items():
            module.register_buffer(name, value, persistent=False)
        self._watch(module._parameters.get("weight"))

    def _watch(self, source: Tensor | None) -> None:
        """Take ``source`` as what is packed, until a gradient reaches it."""
        self._unwatch()
        # Not through nn.Module, which would register the Parameter a second time.
        self.__dict__["_disco_source"] = source
        if source is not None and source.requires_grad:
            module = weakref.ref(self)

            def reached(_: Tensor) -> None:
                watcher = module()
                if watcher is not None:
                    watcher._stale()

            self._disco_hook = source.register_post_accumulate_grad_hook(reached)
        self._disco_watched = self._disco_hook is not None

    def _unwatch(self) -> None:
        hook = self.__dict__.get("_disco_hook")
        if hook is not None:
            hook.remove()
        self._disco_hook = None

    def _detach(self) -> None:
        module: Any = self
        self._unwatch()
        for name in _BUFFERS:
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for name in ("_disco", "_disco_source", "_disco_hook", "_disco_watched"):
            module.__dict__.pop(name, None)

    # -- repacking where weights change hands

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        self.repack()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.repack()

    def train(self, mode: bool = True) -> Any:
        result = super().train(mode)  # type: ignore[misc]
        if not mode:
            self.repack()
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        old = self._disco
        weight = self.weight
        # Another machine may have other backends, or another instruction set and hence layout.
        backend = registry.resolve(old.requested_backend, weight.device, weight.dtype)
        if backend == old.backend and registry.get(backend).layout == old.layout:
            self._watch(self._disco_source)
        else:
            self.repack()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_disco_hook"] = None  # belongs to the Parameter of this module, not of a copy
        return state

    # -- forward

    def _records_gradient(self, x: Tensor) -> bool:
        module: Any = self
        bias: Tensor | None = module.bias
        bias_trains = bias is not None and bias.requires_grad
        return torch.is_grad_enabled() and (
            x.requires_grad or self.weight.requires_grad or bias_trains
        )

    def _uses_torch(self, x: Tensor) -> bool:
        """Whether what was packed may not be what the weight holds, so that torch has to run."""
        # torch.export shows a stand-in for every Parameter.
        same = self.weight is self._disco_source or torch.compiler.is_exporting()
        if self.training or self._disco_source is None or not same:
            return True
        # What the operators know nothing of: casts around every operation, and other derivatives
        # than those that a backward pass computes.
        module: Any = self
        if torch.is_autocast_enabled(x.device.type) or _is_transformed(x, module.bias):
            return True
        if self.weight.requires_grad and not self._disco_watched and self._records_gradient(x):
            # Unfrozen since it was packed: a gradient could reach it unseen.
            self._disco_source = None
            return True
        return False

    def _stale(self) -> None:
        # A compiled backward has no place for this; the hook on the Parameter tells there.
        if not torch.compiler.is_compiling():
            self._disco_source = None


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func transforms what runs, or one of these has a forward-mode derivative."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    duals = (forward_ad.unpack_dual(x) for x in tensors if x is not None)
    return any(dual.tangent is not None for dual in duals)


class NodesMixin(SwappedMixin):
    """A layer with a pattern, run as virtual nodes."""

    _disco: NodesState
    _disco_inputs: Tensor
    _disco_outputs: Tensor | None

    def _attach(
        self,
        out_ownership: Ownership,
        in_ownership: Ownership,
        tolerance: float,
        requested_backend: str | None,
    ) -> None:
        weight = self.weight.detach()
        backend = registry.resolve(requested_backend, weight.device, weight.dtype)
        selected = find_selected(weight, out_ownership, in_ownership, tolerance)
        pattern = LayerPattern(out_ownership, in_ownership, selected)
        inputs = [pattern.input_channels(rank) for rank in range(pattern.world_size)]
        outputs = [channel for owned in out_ownership.channels for channel in owned]
        packed = torch.cat(
            [
                functional.prepack(weight[list(owned)][:, list(read)], [len(read)], backend=backend)
                for owned, read in zip(out_ownership.channels, inputs, strict=True)
            ]
        )
        flat = [channel for read in inputs for channel in read]
        buffers: dict[str, Tensor | None] = {
            "_disco_packed": packed,
            "_disco_inputs": torch.tensor(flat, dtype=torch.int32, device="cpu"),
            "_disco_outputs": (
                None
                if out_ownership.is_contiguous
                else torch.tensor(outputs, dtype=torch.int32, device="cpu")
            ),
        }
        state = NodesState(
            requested_backend,
            backend,
            registry.get(backend).layout,
            out_ownership,
            in_ownership,
            tolerance,
            pattern,
            tuple(len(read) for read in inputs),
            out_ownership.counts,
        )
        self._keep(state, buffers)

    def _attach_again(self) -> None:
        old = self._disco
        self._attach(old.out_ownership, old.in_ownership, old.tolerance, old.requested_backend)

    def extra_repr(self) -> str:
        kept: str = super().extra_repr()  # type: ignore[misc]
        state = self._disco
        return (
            f"{kept}, nodes={state.pattern.world_size}, density={state.pattern.density:.3f}, "
            f"backend={state.backend}"
        )


class SwappedConv2d(NodesMixin, nn.Conv2d):
    """An ``nn.Conv2d`` computed as N virtual nodes by one fused kernel call."""

    def forward(self, input: Tensor) -> Tensor:
        if self._uses_torch(input):
            return _torch_conv2d(input, self)
        if self._records_gradient(input):
            return _Conv2dWithGradient.apply(input, self.weight, self.bias, self)
        return self._fused(input)

    def _fused(self, x: Tensor) -> Tensor:
        state = self._disco
        batched = _as_images(x)
        _check_channels(batched, 1, self.in_channels)
        y = torch.ops.disco_kernels.gather_conv2d(
            batched,
            self._disco_inputs,
            state.in_splits,
            state.out_splits,
            self._disco_outputs,
            self._disco_packed,
            self.bias,
            None,
            self.kernel_size,
            self.stride,
            conv_padding(self),
            self.dilation,
            "none",
            state.backend,
        )
        return y.squeeze(0) if x.dim() == 3 else y


class SwappedGroupedConv2d(SwappedMixin, nn.Conv2d):
    """A grouped ``nn.Conv2d`` computed by one call of the grouped kernel."""

    def _attach(self, requested_backend: str | None) -> None:
        weight = self.weight.detach()
        backend = registry.resolve(requested_backend, weight.device, weight.dtype)
        packed = functional.prepack_grouped(weight, self.groups, backend=backend)
        state = SwapState(requested_backend, backend, registry.get(backend).layout)
        self._keep(state, {"_disco_packed": packed})

    def _attach_again(self) -> None:
        self._attach(self._disco.requested_backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self._disco.backend}"

    def forward(self, input: Tensor) -> Tensor:
        if self._uses_torch(input):
            return _torch_conv2d(input, self)
        if self._records_gradient(input):
            return _Conv2dWithGradient.apply(input, self.weight, self.bias, self)
        return self._fused(input)

    def _fused(self, x: Tensor) -> Tensor:
        batched = _as_images(x)
        _check_channels(batched, 1, self.in_channels)
        y = torch.ops.disco_kernels.grouped_conv2d(
            batched,
            self._disco_packed,
            self.bias,
            None,
            self.out_channels,
            self.groups,
            self.kernel_size,
            self.stride,
            conv_padding(self),
            self.dilation,
            "none",
            self._disco.backend,
        )
        return y.squeeze(0) if x.dim() == 3 else y


class SwappedLinear(NodesMixin, nn.Linear):
    """An ``nn.Linear`` computed as N virtual nodes by one fused kernel call."""

    def forward(self, input: Tensor) -> Tensor:
        if self._uses_torch(input):
            return F.linear(input, self.weight, self.bias)
        if self._records_gradient(input):
            return _LinearWithGradient.apply(input, self.weight, self.bias, self)
        return self._fused(input)

    def _fused(self, x: Tensor) -> Tensor:
        state = self._disco
        _check_channels(x, -1, self.in_features)
        return torch.ops.disco_kernels.gather_linear(
            x,
            self._disco_inputs,
            state.in_splits,
            state.out_splits,
            self._disco_outputs,
            self._disco_packed,
            self.bias,
            None,
            "none",
            state.backend,
        )


def _torch_conv2d(x: Tensor, module: nn.Conv2d) -> Tensor:
    return F.conv2d(
        x,
        module.weight,
        module.bias,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
    )


def _as_images(x: Tensor) -> Tensor:
    if x.dim() not in (3, 4):
        raise ValueError(
            f"the layer takes images [B, C, H, W] or one [C, H, W], given {list(x.shape)}"
        )
    return x.unsqueeze(0) if x.dim() == 3 else x


def _check_channels(x: Tensor, dim: int, wanted: int) -> None:
    # The nodes read listed channels: an input with more of them would go unnoticed.
    if not x.dim() or x.shape[dim] != wanted:
        raise ValueError(f"the layer takes {wanted} channels, given {list(x.shape)}")


def conv_padding(module: nn.Conv2d) -> Pair:
    """The symmetric zero padding of a convolution, ``padding="same"`` included.

    Raises ValueError where "same" would have to pad the two sides differently.
    """
    if not isinstance(module.padding, str):
        return (module.padding[0], module.padding[1])
    if module.padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ValueError(f'padding="same" of an even window {module.kernel_size} is asymmetric')
    return (total[0] // 2, total[1] // 2)


class _Conv2dWithGradient(torch.autograd.Function):
    """Fused forward in eval mode; backward by torch's formulas on the dense weight, so gradients
    equal the unswapped layer's, zeros of the pattern included."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: SwappedConv2d | SwappedGroupedConv2d,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module = module
        ctx.has_bias = bias is not None
        return module._fused(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        module: SwappedConv2d | SwappedGroupedConv2d = ctx.module
        grad = grad_outputs[0]
        unbatched = x.dim() == 3
        if unbatched:
            x, grad = x.unsqueeze(0), grad.unsqueeze(0)
        needed = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
        if needed[1] or needed[2]:
            module._stale()
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [weight.shape[0]] if ctx.has_bias else None,
            module.stride,
            conv_padding(module),
            module.dilation,
            False,
            [0, 0],
            module.groups,
            needed,
        )
        if unbatched and grad_x is not None:
            grad_x = grad_x.squeeze(0)
        return grad_x, grad_weight, grad_bias, None


class _LinearWithGradient(torch.autograd.Function):
    """As `_Conv2dWithGradient`, for tokens."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: SwappedLinear
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module = module
        ctx.has_bias = bias is not None
        return module._fused(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            ctx.module._stale()
        return grad_x, grad_weight, grad_bias, None
