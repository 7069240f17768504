"""Kernels and drop-in PyTorch operators for DISCO models: distributed inference with sparse
communications (arXiv 2302.11180).
"""

from pkgutil import extend_path

# After a plain (not editable) install, Python started in a checkout's root finds the sources before
# the installed package; the compiled extension is then still found, in the latter.
__path__ = extend_path(__path__, __name__)

from disco_kernels import backends as backends
from disco_kernels.functional import (
    gather_conv2d,
    gather_linear,
    gather_pack_,
    grouped_conv2d,
    partial_conv2d,
    partial_conv2d_,
    partial_linear,
    prepack,
    prepack_grouped,
)
from disco_kernels.gather_kernels import GatherConv2d, GatherLinear
from disco_kernels.grouped import GroupedConv2d
from disco_kernels.packing import GatherPack
from disco_kernels.partial_kernels import PartialConv2d, PartialLinear
from disco_kernels.pattern import (
    LayerPattern,
    Ownership,
    Pattern,
    contradiction,
    find_selected,
)
from disco_kernels.pooling import GlobalAvgPool2d, MaxPool2d
from disco_kernels.precompile import Precompiled, precompile
from disco_kernels.prepacking import Packing
from disco_kernels.quantisation import InputBytes, choose_int8
from disco_kernels.registry import BackendUnavailable
from disco_kernels.spec import ACTIVATIONS, WINOGRAD, ConvSpec
from disco_kernels.swap import (
    SwapReport,
    SwapRow,
    backend_of,
    repack_,
    swap_,
    swapped,
    unswap_,
)
from disco_kernels.winograd import choose_winograd
from disco_kernels.wire import message_numel, message_views

__all__ = [
    "ACTIVATIONS",
    "WINOGRAD",
    "BackendUnavailable",
    "ConvSpec",
    "GatherConv2d",
    "GatherLinear",
    "GatherPack",
    "GlobalAvgPool2d",
    "GroupedConv2d",
    "InputBytes",
    "LayerPattern",
    "MaxPool2d",
    "Ownership",
    "Packing",
    "PartialConv2d",
    "PartialLinear",
    "Pattern",
    "Precompiled",
    "SwapReport",
    "SwapRow",
    "backend_of",
    "choose_int8",
    "choose_winograd",
    "contradiction",
    "find_selected",
    "gather_conv2d",
    "gather_linear",
    "gather_pack_",
    "grouped_conv2d",
    "message_numel",
    "message_views",
    "partial_conv2d",
    "partial_conv2d_",
    "partial_linear",
    "precompile",
    "prepack",
    "prepack_grouped",
    "repack_",
    "swap_",
    "swapped",
    "unswap_",
]
