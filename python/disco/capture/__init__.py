"""From an `nn.Module` to a program: `torch.export`, then folding and fusing. See `capture`."""

from disco.capture.capture import (
    Captured,
    Exported,
    Source,
    Unfolded,
    capture,
    capture_once,
    capture_source,
    capture_unfolded,
)
from disco.capture.noise import draws, noise_modules
from disco.capture.on_cpu import device_of

__all__ = [
    "Captured",
    "Exported",
    "Source",
    "Unfolded",
    "capture",
    "capture_once",
    "capture_source",
    "capture_unfolded",
    "device_of",
    "draws",
    "noise_modules",
]
