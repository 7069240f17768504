"""From an `nn.Module` to a program: `torch.export`, then folding and fusing. See `capture`."""

from disco.capture.capture import Captured, capture

__all__ = ["Captured", "capture"]
