"""DISCO: vision models whose layers are split over several small devices.

`partition` cuts a model into one shard per node, `partition_submodules_` the parts of a model that
can be cut, `compile` makes it fast on one machine, `load` runs saved shards, `sparsify_` gives a
model the structure that makes the exchange small, `Sparsifier` gives it that during training,
`colocate_` puts coupled channels on one node before, `order_channels_` side by side what is read.
`WireSimulation` lets it be trained for rounded payloads and lost nodes.
Importing the package is light: model zoos and optional backends are loaded on use only.
"""

# Not lazily: `disco.partition` is a function here and a room too. Imported now, the room's name is
# bound before the function's and never again, whatever is imported later and in which order.
from disco.api import (
    Compiled,
    Partitioned,
    compile,
    load,
    partition,
    sparsify_,
    with_wire_dtype,
)
from disco.errors import DeadlineError, InputError, TransportError
from disco.partition.cluster import Cluster, Link, Node
from disco.sparsify import (
    ColocationReport,
    OrderReport,
    Sparsifier,
    WireSimulation,
    colocate_,
    order_channels_,
)
from disco.submodules import partition_submodules_, submodule_inputs

__all__ = [
    "Cluster",
    "ColocationReport",
    "Compiled",
    "DeadlineError",
    "InputError",
    "Link",
    "Node",
    "OrderReport",
    "Partitioned",
    "Sparsifier",
    "TransportError",
    "WireSimulation",
    "colocate_",
    "compile",
    "load",
    "order_channels_",
    "partition",
    "partition_submodules_",
    "sparsify_",
    "submodule_inputs",
    "with_wire_dtype",
]
