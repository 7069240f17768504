"""Import torchvision beside a torch that its binary operators do not fit.

torchvision's wheel carries compiled operators. Where they do not load (a wheel for CUDA on a
CPU-only torch), its import fails although no classification model needs one of them: it registers
shape functions for operators that nobody defined. Defining their schemas first is enough for the
import. Detectors need one operator more: `torchvision.ops.nms` is then done in NumPy. The others
still raise torchvision's own error.

This file is the only place that does so, and it does nothing where torchvision's own operators
load. Import torchvision, and timm, which imports it, through it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import threading
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from disco.errors import InputError

# The operators whose shape functions torchvision registers without asking whether they exist.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_lock = threading.Lock()
# torch drops a library's definitions when its handle goes.
_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Import torchvision, with its operators' schemas defined where its own do not load.

    Returns:
        the module `torchvision`, with `torchvision.models` imported.

    Raises:
        InputError: torchvision is not installed, or cannot be imported for another reason.
    """
    global _library
    with _lock:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise InputError(
                "this needs torchvision, which is not installed: "
                "install the extra with `pip install 'disco-kernels[demo]'`"
            )
        if _library is None and not _own_operators_load(os.path.dirname(spec.origin)):
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name, schema in _SCHEMAS.items():
                if not hasattr(torch.ops.torchvision, name):
                    library.define(schema)
            _library = library
        try:
            importlib.import_module("torchvision.models")
            if _library is not None:
                for name in ("torchvision.ops.boxes", "torchvision.ops"):
                    importlib.import_module(name).nms = nms  # type: ignore[attr-defined]
            return importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"torchvision cannot be imported with torch {torch.__version__}: {error}. "
                "Install the torchvision that pairs with this torch"
            ) from error


def own_operators() -> bool:
    """True if torchvision runs on its own operators, False if only their schemas exist."""
    import_torchvision()
    return _library is None


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression, as `torchvision.ops.nms` defines it.

    Args:
        boxes: ``[N, 4]`` as x1, y1, x2, y2.
        scores: ``[N]``.
        iou_threshold: of two boxes that overlap more than this the one that scores less is dropped.

    Returns:
        int64 indices of the boxes that are kept, the highest score first.
    """
    order = scores.detach().argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes.detach()[order].cpu().double().numpy().T
    area = (x2 - x1) * (y2 - y1)
    left = np.arange(len(order))
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left])
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left])
        shared = width.clip(0) * height.clip(0)
        left = left[~(shared > iou_threshold * (area[best] + area[left] - shared))]
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


def _own_operators_load(folder: str) -> bool:
    """Load torchvision's operators as its own import would; False where that fails."""
    finder = importlib.machinery.FileFinder(
        folder,
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
    )
    spec = finder.find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError:
        return False
    return True
