"""Which layers have to agree on the channels that they take: the readers of one exchanged tensor.

Layers that share a parameter have to agree as well, since the zeros are the parameter's; so groups
are joined over shared tensors and shared parameters alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disco_kernels.pattern import Ownership


@dataclass(frozen=True)
class Reader:
    """One layer that reads an exchanged tensor.

    Attributes:
        tensor: the exchanged value.
        parameter: name of its weight in the model.
        out_ownership, in_ownership: who computes its outputs and owns its inputs.
        gathered: True if the tensor is needed whole anyway, by an op without a rule.
        bytes_per_channel: of one image of the tensor, in its own dtype.
    """

    tensor: str
    parameter: str
    out_ownership: Ownership
    in_ownership: Ownership
    gathered: bool
    bytes_per_channel: int = 0


@dataclass(frozen=True)
class Group:
    """Layers that share one selection of the channels of `in_ownership`.

    Attributes:
        in_ownership: who owns the channels of the tensors that they read.
        out_ownership: by parameter who computes the layer's outputs.
        bytes_per_channel: of one image, over all tensors whose channels are selected here.
    """

    in_ownership: Ownership
    out_ownership: Mapping[str, Ownership]
    bytes_per_channel: int = 0

    @property
    def world_size(self) -> int:
        return self.in_ownership.world_size

    @property
    def receivers(self) -> tuple[int, ...]:
        """The ranks that compute outputs of any of the layers; the others need no channels."""
        ranks = range(self.world_size)
        return tuple(i for i in ranks if any(o.channels[i] for o in self.out_ownership.values()))


def groups_of(readers: Sequence[Reader]) -> list[Group]:
    """Readers joined into groups; left out are those whose selection could save nothing.

    That is where the tensor travels whole for another reader, where one parameter would need two
    ownerships, and where joined tensors are owned differently.
    """
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for reader in readers:
        leader[find(f"parameter {reader.parameter}")] = find(f"tensor {reader.tensor}")
    joined: dict[str, list[Reader]] = {}
    for reader in readers:
        joined.setdefault(find(f"tensor {reader.tensor}"), []).append(reader)
    found = (_group(members) for members in joined.values())
    return [group for group in found if group is not None]


def _group(members: Sequence[Reader]) -> Group | None:
    first = members[0]
    out: dict[str, Ownership] = {}
    for reader in members:
        same = out.setdefault(reader.parameter, reader.out_ownership) == reader.out_ownership
        if reader.gathered or not same or reader.in_ownership != first.in_ownership:
            return None
    tensors = {reader.tensor: reader.bytes_per_channel for reader in members}
    return Group(first.in_ownership, out, sum(tensors.values()))
