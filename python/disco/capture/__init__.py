"""From an `nn.Module` to a program: `torch.export`, then folding and fusing. See `capture`."""

from disco.capture.capture import Captured, capture
from disco.capture.on_cpu import device_of

__all__ = ["Captured", "capture", "device_of"]
