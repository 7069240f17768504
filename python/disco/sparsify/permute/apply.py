"""Writing a permutation into a model's tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from disco.sparsify.permute.axes import Indices
from disco.sparsify.permute.classes import Permutable


@torch.no_grad()
def permute_(
    tensors: Mapping[str, Tensor], permutable: Permutable, orders: Mapping[int, Indices]
) -> None:
    """Reorder the entries of axes, in place, in every tensor that has them.

    Args:
        tensors: parameters and buffers by name, on any device.
        permutable: of the model whose they are.
        orders: per plain axis the old place of what comes to each place, int64 ``[size]``.
    """
    for name, dims in permutable.dims.items():
        for dim in range(len(dims)):
            order = permutable.order(name, dim, orders)
            if not np.array_equal(order, np.arange(len(order))):
                tensor = tensors[name]
                index = torch.from_numpy(order).to(tensor.device)
                tensor.copy_(tensor.index_select(dim, index))
