"""TorchMetrics, imported when a metric is wanted."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from disco.errors import InputError
from disco.torchvision_compat import import_torchvision


def import_torchmetrics(module: str) -> Any:
    """A module of it: ``classification``, ``functional.image``.

    Raises InputError if it is not installed.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise InputError(
            "this metric needs TorchMetrics, which is not installed: `pip install torchmetrics`"
        )
    # It imports torchvision where that is installed, whose operators may not load.
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    return importlib.import_module(f"torchmetrics.{module}")
