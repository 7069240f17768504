"""Who owns which channels, and which channels a layer takes from other nodes.

Terms (DISCO, arXiv 2302.11180, section 3): rank ``i`` computes the output channels ``O_i`` from
the input channels ``I_j`` of every rank ``j``. Block ``(i, j)`` is ``weight[O_i, I_j]``; it is
*local* for ``i == j`` and *remote* otherwise. ``selected[i][j]`` lists the channels of ``I_j``
whose column in the remote block ``(i, j)`` is not all zero: what rank ``j`` has to send to rank
``i``.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

Selected = tuple[tuple[tuple[int, ...], ...], ...]

_FORMAT = "disco-pattern"
_VERSION = 1


@dataclass(frozen=True)
class Ownership:
    """Per rank an ordered list of global channels: disjoint, together ``range(num_channels)``.

    A rank may own no channel (three attention heads on eight nodes), and the channels of a rank
    need not be contiguous.
    """

    channels: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("an ownership needs at least one rank, given none")
        object.__setattr__(self, "channels", _plain(self.channels))
        flat = [channel for owned in self.channels for channel in owned]
        if sorted(flat) != list(range(len(flat))):
            raise ValueError(
                f"an ownership must list every channel of range({len(flat)}) exactly once over its "
                f"{len(self.channels)} ranks; given {_abbreviate(flat)}"
            )

    @classmethod
    def contiguous(cls, num_channels: int, world_size: int) -> Ownership:
        """Equal contiguous shares; where they do not divide, the first ranks own one more."""
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, given {world_size}")
        if num_channels < 0:
            raise ValueError(f"num_channels must not be negative, given {num_channels}")
        base, extra = divmod(num_channels, world_size)
        bounds = [rank * base + min(rank, extra) for rank in range(world_size + 1)]
        return cls(tuple(tuple(range(bounds[r], bounds[r + 1])) for r in range(world_size)))

    @property
    def world_size(self) -> int:
        return len(self.channels)

    @property
    def num_channels(self) -> int:
        return sum(len(owned) for owned in self.channels)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(owned) for owned in self.channels)

    @property
    def is_contiguous(self) -> bool:
        """True if the ranks' channels, one rank after the other, are 0, 1, 2, ..."""
        flat = [channel for owned in self.channels for channel in owned]
        return flat == list(range(len(flat)))


@dataclass(frozen=True)
class LayerPattern:
    """Ownership of a layer's two channel dimensions and the selected channels of every block."""

    out_ownership: Ownership
    in_ownership: Ownership
    selected: Selected

    def __post_init__(self) -> None:
        object.__setattr__(self, "selected", tuple(_plain(row) for row in self.selected))
        world_size = self.out_ownership.world_size
        if self.in_ownership.world_size != world_size:
            raise ValueError(
                f"outputs are owned by {world_size} ranks and inputs by "
                f"{self.in_ownership.world_size}; both must have the same number of ranks"
            )
        if len(self.selected) != world_size or any(len(r) != world_size for r in self.selected):
            raise ValueError(
                f"selected must be a {world_size} x {world_size} table of channel lists"
            )
        for i, row in enumerate(self.selected):
            for j, channels in enumerate(row):
                if i == j and channels:
                    raise ValueError(
                        f"selected[{i}][{i}] must be empty: a rank sends itself nothing"
                    )
                strangers = sorted(set(channels) - set(self.in_ownership.channels[j]))
                if strangers:
                    raise ValueError(
                        f"selected[{i}][{j}] lists channels that rank {j} does not own: "
                        f"{_abbreviate(strangers)}"
                    )
                if len(set(channels)) != len(channels):
                    raise ValueError(f"selected[{i}][{j}] lists a channel twice")

    @property
    def world_size(self) -> int:
        return self.out_ownership.world_size

    @property
    def density(self) -> float:
        """Selected channels over those that the senders own, over all remote blocks (0 to 1).

        Blocks whose receiver owns no output count as not needed.
        """
        owned = sum(
            len(self.in_ownership.channels[j]) * (self.world_size - 1)
            for j in range(self.world_size)
        )
        sent = sum(len(channels) for row in self.selected for channels in row)
        return sent / owned if owned else 0.0

    def input_channels(self, rank: int) -> tuple[int, ...]:
        """The global channels that ``rank`` reads: in order where they are one run, else its own,
        then each sender's selected ones."""
        remote = (c for channels in self.selected[rank] for c in channels)
        read = (*self.in_ownership.channels[rank], *remote)
        return tuple(sorted(read)) if read and max(read) - min(read) + 1 == len(read) else read

    def off_pattern_max(self, weight: Tensor) -> tuple[float, int, int]:
        """Largest ``|weight|`` outside the pattern, and the block ``(i, j)`` that holds it.

        Args:
            weight: ``[O, I, *kernel]``.

        Returns:
            ``(value, i, j)``; ``(0.0, -1, -1)`` if the weights keep the pattern exactly.
        """
        worst = (0.0, -1, -1)
        magnitude = column_magnitude_per_output(weight)
        for i, outputs in enumerate(self.out_ownership.channels):
            for j, inputs in enumerate(self.in_ownership.channels):
                chosen = set(self.selected[i][j])
                unselected = [k for k in inputs if k not in chosen]
                if i == j or not unselected or not outputs:
                    continue
                value = float(magnitude[list(outputs)][:, unselected].max())
                if value > worst[0] or value != value:
                    worst = (value, i, j)
        return worst


def column_magnitude_per_output(weight: Tensor) -> Tensor:
    """Largest absolute value over the kernel window: ``[O, I, *kernel]`` -> ``[O, I]``."""
    window = math.prod(weight.shape[2:])
    return weight.detach().abs().reshape(weight.shape[0], weight.shape[1], window).amax(dim=2)


def check_ownership(
    weight: Tensor, out_ownership: Ownership, in_ownership: Ownership, name: str = "weight"
) -> None:
    """Raise ValueError unless both ownerships fit ``weight`` ``[O, I, *kernel]``."""
    given = (out_ownership.num_channels, in_ownership.num_channels)
    if tuple(weight.shape[:2]) != given:
        raise ValueError(
            f"{name} has {weight.shape[0]} output and {weight.shape[1]} input channels, but the "
            f"ownership covers {given[0]} and {given[1]}; give an ownership of the layer's channels"
        )
    if out_ownership.world_size != in_ownership.world_size:
        raise ValueError(
            f"outputs are owned by {out_ownership.world_size} ranks and inputs by "
            f"{in_ownership.world_size}; both must have the same number of ranks"
        )


def find_selected(
    weight: Tensor,
    out_ownership: Ownership,
    in_ownership: Ownership,
    tolerance: float = 0.0,
) -> Selected:
    """Read the selected channels off the zeros of a weight.

    Args:
        weight: ``[O, I, *kernel]``, any floating dtype.
        out_ownership: who computes which of the O outputs.
        in_ownership: who owns which of the I inputs.
        tolerance: a column counts as zero if no ``|value|`` is larger than this.

    Returns:
        ``selected[i][j]``: global channels of rank j that rank i needs, in rank j's order;
        ``selected[i][i]`` is empty. NaN counts as not zero.
    """
    check_ownership(weight, out_ownership, in_ownership)
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, given {tolerance}")
    return selected_by(used_columns(weight, tolerance), out_ownership, in_ownership)


def used_columns(weight: Tensor, tolerance: float = 0.0) -> Tensor:
    """Which inputs each output reads: ``[O, I, *kernel]`` -> bool ``[O, I]``; NaN is read."""
    if not weight.numel():
        return weight.detach().new_zeros(weight.shape[:2]).bool()
    return ~(column_magnitude_per_output(weight) <= tolerance)


def selected_by(used: Tensor, out_ownership: Ownership, in_ownership: Ownership) -> Selected:
    """`find_selected` of a layer whose `used_columns` are known."""
    table: list[tuple[tuple[int, ...], ...]] = []
    for i, outputs in enumerate(out_ownership.channels):
        needed: list[bool] = [False] * in_ownership.num_channels
        if outputs:
            needed = used[list(outputs)].any(dim=0).tolist()
        table.append(
            tuple(
                () if i == j else tuple(k for k in inputs if needed[k])
                for j, inputs in enumerate(in_ownership.channels)
            )
        )
    return tuple(table)


@dataclass
class Pattern:
    """A recorded pattern: per layer (by its weight's owner in ``named_modules``) a LayerPattern.

    Kept in a sidecar file beside the weights, never inside the ``state_dict``.
    """

    layers: dict[str, LayerPattern] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as JSON. The file appears whole or not at all."""
        target = Path(path)
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "layers": {
                name: {
                    "out_ownership": layer.out_ownership.channels,
                    "in_ownership": layer.in_ownership.channels,
                    "selected": layer.selected,
                }
                for name, layer in self.layers.items()
            },
        }
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Pattern:
        """Read what `save` wrote. Raises ValueError for any other file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a recorded pattern: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f'{path} is not a recorded pattern: no "format": "{_FORMAT}" in it')
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{path} is a pattern of version {content.get('version')}; this release reads "
                f"version {_VERSION}"
            )
        try:
            layers = {str(n): _layer_from_json(v) for n, v in content["layers"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged pattern file: {error}") from error
        return cls(layers)

    def contradictions(
        self, state_dict: Mapping[str, Tensor], tolerance: float = 0.0
    ) -> list[tuple[str, str]]:
        """Layers whose weights hold values outside the recorded pattern, or do not fit it.

        Returns:
            ``(layer name, message)`` pairs; empty if every recorded layer keeps its pattern.
        """
        found: list[tuple[str, str]] = []
        for name, layer in self.layers.items():
            parameter = parameter_of(name, state_dict)
            if parameter is None:
                found.append((name, f"the pattern names layer {name!r}, which has no weight here"))
                continue
            message = contradiction(name, layer, state_dict[parameter], tolerance)
            if message:
                found.append((name, message))
        return found


def parameter_of(layer: str, state_dict: Mapping[str, Tensor]) -> str | None:
    """The weight that a pattern's layer names: ``layer.weight``, or a parameter of another name
    (``in_proj_weight`` of attention) by itself. None if there is neither."""
    return next((name for name in (f"{layer}.weight", layer) if name in state_dict), None)


def contradiction(
    name: str, layer: LayerPattern, weight: Tensor, tolerance: float = 0.0
) -> str | None:
    """Why ``weight`` does not keep the recorded pattern of layer ``name``, or None if it does."""
    try:
        check_ownership(weight, layer.out_ownership, layer.in_ownership, f"layer {name!r}")
    except ValueError as error:
        return str(error)
    value, i, j = layer.off_pattern_max(weight)
    if value <= tolerance:
        return None
    return (
        f"layer {name!r}: block ({i}, {j}) holds |{value:.3g}| outside the recorded pattern "
        f"(allowed: {tolerance:g}); pass a tolerance, or weights that keep the pattern"
    )


def _plain(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Lists, arrays or tensors of channels as what compares, hashes and saves the same: tuples."""
    try:
        return tuple(tuple(operator.index(channel) for channel in row) for row in rows)
    except TypeError as error:
        raise ValueError(f"channels are given as lists of whole numbers: {error}") from error


def _layer_from_json(value: Any) -> LayerPattern:
    return LayerPattern(
        Ownership(_lists(value["out_ownership"])),
        Ownership(_lists(value["in_ownership"])),
        tuple(_lists(row) for row in value["selected"]),
    )


def _lists(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(_channel(c) for c in row) for row in rows)


def _channel(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a channel must be a whole number, given {value!r}")
    return value


def _abbreviate(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return f"[{shown}, ...] ({len(values)} values)" if len(values) > 8 else f"[{shown}]"
