"""Which kernel is fastest: written by benchmarks/tune_sm90.py.

By taps, stride, nodes, output channels of the widest node and input channels of the node that reads
most: output pixels that were measured, and a tile of `Conv2dSm90`, "cublas" for `DenseProduct`, or
None where the Triton kernel is faster.
"""

TUNED: dict[tuple[int, int, int, int, int], dict[int, str | None]] = {}
