"""Swap the layers of a DISCO model for the fused operators, in place, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from disco_kernels import registry
from disco_kernels.modules import (
    SwappedConv2d,
    SwappedGroupedConv2d,
    SwappedLinear,
    SwappedMixin,
    conv_padding,
)
from disco_kernels.pattern import (
    LayerPattern,
    Ownership,
    Pattern,
    check_ownership,
    contradiction,
    find_selected,
)

# A model without a pattern is no DISCO model, and stays as it is. In one, grouped layers follow for
# their kernel: MobileNetV2, one thread, density 0.2, takes 12.4 ms in torch, 9.5 with its pointwise
# layers swapped and 9.2 with the depthwise ones, too.
_ALONE = "grouped: it is swapped with other layers of the model, and there are none to swap"

LayerFilter = Callable[[str, nn.Module], bool]
OwnershipPair = tuple[Ownership, Ownership]

_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SwappedConv2d,
    nn.Linear: SwappedLinear,
}
_ORIGINAL: dict[type, type[nn.Module]] = {
    SwappedGroupedConv2d: nn.Conv2d,
    **{swapped: original for original, swapped in _SWAPPED.items()},
}


@dataclass(frozen=True)
class SwapRow:
    """One layer of a `SwapReport`. ``density`` is over the remote blocks (1.0 = dense); None where
    there are none, as in a grouped convolution."""

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float | None
    backend: str | None
    skipped: str | None

    @property
    def swapped(self) -> bool:
        return self.skipped is None


@dataclass(frozen=True)
class SwapReport:
    """What `swap_` did, a row a layer; ``print`` it."""

    nodes: int
    rows: tuple[SwapRow, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def swapped(self) -> tuple[SwapRow, ...]:
        return tuple(row for row in self.rows if row.swapped)

    @property
    def skipped(self) -> tuple[SwapRow, ...]:
        return tuple(row for row in self.rows if not row.swapped)

    def __str__(self) -> str:
        head = ("layer", "kind", "weight", "density", "backend or why skipped")
        table = [head]
        for row in self.rows:
            density = "-" if row.density is None else f"{row.density:.3f}"
            outcome = row.backend or "" if row.swapped else f"skipped: {row.skipped}"
            shape = "x".join(str(n) for n in row.shape)
            table.append((row.name or "(the model)", row.kind, shape, density, outcome))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]])
            for line in table
        ]
        lines.append(
            f"{len(self.swapped)} of {len(self.rows)} layers swapped for {self.nodes} nodes"
        )
        return "\n".join([*lines, *self.notes])


def swap_(
    model: nn.Module,
    nodes: int,
    *,
    backend: str | None = None,
    ownership: Mapping[str, OwnershipPair] | None = None,
    pattern: Pattern | None = None,
    tolerance: float = 0.0,
    filter: LayerFilter | None = None,
) -> SwapReport:
    """Swap ``nn.Conv2d`` and ``nn.Linear`` layers that have a DISCO pattern, in place.

    A layer has a pattern if, for ``nodes`` nodes, some columns of its remote weight blocks are all
    zero (arXiv 2302.11180, section 3). Its outputs stay the same up to rounding. Grouped and
    depthwise convolutions of the model take nothing of other nodes; they are swapped with the
    others, for the kernel. Parameters, hooks and ``state_dict`` keys stay; deepcopy, pickle,
    ``.to()`` and ``load_state_dict`` work. In training mode, under autocast, under `torch.func`'s
    transforms and with forward-mode derivatives torch's own operators run, on the same weights.

    Args:
        model: any module; a layer may be the model itself.
        nodes: number of nodes the model was made for, at least 1.
        backend: ``"cpu"``, ``"reference"``, or None for DISCO_KERNELS_BACKEND or the automatic
            choice.
        ownership: per layer name ``(outputs, inputs)``. Without it, and without ``pattern``,
            contiguous equal shares of each layer's channels are assumed.
        pattern: a recorded pattern. A layer whose weights contradict it is skipped, and reported.
        tolerance: a column counts as zero if no ``|weight|`` in it is larger.
        filter: ``filter(name, module)``; False leaves the layer alone.

    Returns:
        A report with a row a layer. Check ``report.swapped``: a model without a pattern has none.

    Raises:
        TypeError: ``model`` is no module, ``nodes`` no whole number, or ``pattern`` or
            ``ownership`` something else than described.
        ValueError: ``nodes`` below 1, a negative tolerance, names of layers that do not exist.
        BackendUnavailable: ``backend`` was given and cannot serve the weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, given {type(model).__name__}")
    if not isinstance(nodes, int):
        raise TypeError(f"nodes must be a whole number, given {nodes!r}")
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, given {nodes}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, given {tolerance}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    if not isinstance(pattern, Pattern | None):
        raise TypeError(f"pattern must be a disco_kernels.Pattern, given {type(pattern).__name__}")
    _check_owned(ownership)
    recorded = dict(pattern.layers) if pattern is not None else {}
    owned = dict(ownership) if ownership is not None else {}
    strangers = sorted((set(recorded) | set(owned)) - set(layers))
    if strangers:
        raise ValueError(
            f"the pattern or ownership names layers that the model does not have: "
            f"{', '.join(strangers[:4])}"
        )
    # All looked at before one is changed: an error leaves the model as it was.
    examined = {
        name: _examine(name, module, nodes, tolerance, recorded, owned, filter)
        for name, module in layers.items()
    }
    taken = [name for name, (reason, _) in examined.items() if reason is None]
    others = any(not _is_grouped(layers[name]) for name in taken) or any(
        isinstance(module, SwappedMixin) for module in layers.values()
    )
    for name in taken:
        if _is_grouped(layers[name]):
            examined[name] = (_grouped_stays(layers[name], others, backend), None)
    _require_backend(
        backend, [layers[name] for name, (reason, _) in examined.items() if not reason]
    )

    rows = []
    assumed = 0
    for name, module in layers.items():
        skipped, found = examined[name]
        if skipped is None and _is_grouped(module):
            _change_class(module, SwappedGroupedConv2d)
            assert isinstance(module, SwappedGroupedConv2d)
            module._attach(backend)
        elif skipped is None and found is not None:
            _change_class(module, _SWAPPED[type(module)])
            assert isinstance(module, SwappedConv2d | SwappedLinear)
            module._attach(found.out_ownership, found.in_ownership, tolerance, backend)
            assumed += name not in recorded and name not in owned
        rows.append(
            SwapRow(
                name,
                "conv2d" if isinstance(module, nn.Conv2d) else "linear",
                _shape(module.weight),
                None if found is None else found.density,
                module._disco.backend if isinstance(module, SwappedMixin) else None,
                skipped,
            )
        )
    notes = []
    if assumed:
        notes.append(
            f"ownership of {assumed} layers was not given: contiguous equal shares of their "
            "channels were assumed (ownership= takes others)"
        )
    return SwapReport(nodes, tuple(rows), tuple(notes))


def unswap_(model: nn.Module) -> int:
    """Undo `swap_`, in place: the same objects, bit for bit as before. Returns how many layers.

    Raises ValueError, and changes nothing, if the class of a swapped layer was changed since.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, SwappedMixin)]
    for name, module in layers:
        if type(module) not in _ORIGINAL:
            raise ValueError(
                f"layer {name!r} became a {type(module).__name__} after it was swapped; undo that "
                "first (for example parametrize.remove_parametrizations)"
            )
    for _, module in layers:
        _unswap_one(module)
    return len(layers)


@contextlib.contextmanager
def swapped(model: nn.Module, nodes: int, **options: object) -> Iterator[SwapReport]:
    """``with swapped(model, nodes=2) as report:`` — swapped inside, as before afterwards.

    Layers that were swapped already stay swapped. Options are those of `swap_`.
    """
    report = swap_(model, nodes, **options)  # type: ignore[arg-type]
    names = {row.name for row in report.swapped}
    try:
        yield report
    finally:
        for name, module in model.named_modules():
            if name in names and isinstance(module, SwappedMixin):
                _unswap_one(module)


def repack_(model: nn.Module) -> int:
    """Pack the live weights of every swapped layer again. Returns how many layers."""
    count = 0
    for module in model.modules():
        if isinstance(module, SwappedMixin):
            module.repack()
            count += 1
    return count


def backend_of(module: nn.Module) -> str:
    """The backend that runs a layer: ``"cpu"``, ``"reference"``, ..., or ``"torch"`` if unswapped.

    A layer in training mode runs torch's formulas on the live weights, whatever it says here.
    """
    return module._disco.backend if isinstance(module, SwappedMixin) else "torch"


def _unswap_one(module: SwappedMixin) -> None:
    module._detach()
    assert isinstance(module, nn.Module)
    _change_class(module, _ORIGINAL[type(module)])


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # The object stays the same: whoever holds it, its hooks and its Parameters sees the change.
    module.__class__ = cls


def _shape(weight: object) -> tuple[int, ...]:
    # The weight of a lazy layer that has not run yet has no shape to ask for.
    if not isinstance(weight, torch.Tensor) or nn.parameter.is_lazy(weight):
        return ()
    return tuple(weight.shape)


def _require_backend(backend: str | None, layers: Sequence[nn.Conv2d | nn.Linear]) -> None:
    """An explicit request that cannot be met raises before anything was changed."""
    if backend is not None:
        registry.get(backend)
    for module in layers:
        registry.resolve(backend, module.weight.device, module.weight.dtype)


def _check_owned(ownership: Mapping[str, OwnershipPair] | None) -> None:
    pairs = {} if ownership is None else ownership
    wanted = "a dict of layers and their (outputs, inputs), both disco_kernels.Ownership"
    if not isinstance(pairs, Mapping):
        raise TypeError(f"ownership must be {wanted}; given {type(pairs).__name__}")
    for name, pair in pairs.items():
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or not all(isinstance(one, Ownership) for one in pair):
            raise TypeError(f"ownership must be {wanted}; for layer {name!r} it is {pair!r}")


def _examine(
    name: str,
    module: nn.Module,
    nodes: int,
    tolerance: float,
    recorded: Mapping[str, LayerPattern],
    owned: Mapping[str, OwnershipPair],
    filter: LayerFilter | None,
) -> tuple[str | None, LayerPattern | None]:
    """Why a layer is left alone (or None), and its pattern as far as one was found."""
    reason = _unsupported(module)
    if reason is None and filter is not None and not filter(name, module):
        reason = "left out by the filter"
    if reason is not None:
        return reason, None
    if _is_grouped(module):
        return "one node: there is no remote block" if nodes == 1 else None, None
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if name in recorded:
        layer = recorded[name]
        if layer.world_size != nodes:
            return f"its pattern is for {layer.world_size} nodes, not {nodes}", None
        message = contradiction(name, layer, weight, tolerance)
        if message is not None:
            return message, None
        pair = (layer.out_ownership, layer.in_ownership)
    elif name in owned:
        pair = owned[name]
        try:
            check_ownership(weight, *pair, f"layer {name!r}")
        except ValueError as error:
            return str(error), None
        if pair[0].world_size != nodes:
            return f"its ownership is for {pair[0].world_size} nodes, not {nodes}", None
    else:
        pair = (
            Ownership.contiguous(weight.shape[0], nodes),
            Ownership.contiguous(weight.shape[1], nodes),
        )
    found = LayerPattern(*pair, find_selected(weight, *pair, tolerance))
    if nodes == 1:
        return "one node: there is no remote block", found
    if all(
        len(found.selected[i][j]) == len(found.in_ownership.channels[j])
        for i in range(nodes)
        for j in range(nodes)
        if i != j
    ):
        return "no remote block has a zero column: a dense layer stays in torch", found
    return None, found


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups != 1


def _grouped_stays(module: nn.Module, others: bool, backend: str | None) -> str | None:
    """Why a grouped convolution, which takes no channels of other nodes, stays in torch, or None:
    there is nothing to skip, so it depends on the kernel, and on whether others are swapped."""
    if not others:
        return _ALONE
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    chosen = registry.resolve(backend, weight.device, weight.dtype)
    if chosen == "reference":
        return "grouped: the reference backend would do what torch does"
    return None


def _unsupported(module: nn.Module) -> str | None:
    if isinstance(module, SwappedMixin):
        return "swapped already (unswap_ first)"
    if type(module) not in _SWAPPED:
        return f"{type(module).__name__} is a class of its own"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}: only zeros"
        try:
            conv_padding(module)
        except ValueError as error:
            return str(error)
    if "weight" not in module._parameters:
        # Its hook computes the weight at each call, after swap_ and the repacking hooks looked.
        return "its weight is computed (weight_norm, pruning, ...): make it a parameter first"
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or not weight.dtype.is_floating_point:
        return "its weight is no floating-point tensor"
    if weight.is_meta:
        return "its weight has no data yet (meta device)"
    return None
