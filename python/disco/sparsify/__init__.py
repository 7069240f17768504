"""Giving a dense model the structure that makes its exchange small."""

from disco.program.message_layout import WIRE_DTYPES
from disco.sparsify.colocate import ColocatedClass, ColocationReport, colocate_
from disco.sparsify.find_groups import find_groups, tensors_of
from disco.sparsify.one_shot import sparsify_weights_
from disco.sparsify.run_order import OrderReport, order_channels_
from disco.sparsify.settings import GROUP_SIZES, check_density, check_group_size
from disco.sparsify.sparsifier import Sparsifier
from disco.sparsify.wire import WireSimulation

__all__ = [
    "GROUP_SIZES",
    "WIRE_DTYPES",
    "ColocatedClass",
    "ColocationReport",
    "OrderReport",
    "Sparsifier",
    "WireSimulation",
    "check_density",
    "check_group_size",
    "colocate_",
    "find_groups",
    "order_channels_",
    "sparsify_weights_",
    "tensors_of",
]
