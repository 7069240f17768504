"""Which tile of `Conv2dSm90` is fastest: written by benchmarks/tune_sm90.py.

By taps, stride, nodes, output channels of the widest node and input channels of the node that reads
most: output pixels that were measured, and the tile, or None where the Triton kernel is faster.
"""

TUNED: dict[tuple[int, int, int, int, int], dict[int, str | None]] = {
    (1, 1, 1, 64, 64): {100352: None, 401408: None},
    (1, 1, 1, 64, 256): {100352: None, 401408: None},
    (1, 1, 2, 64, 136): {100352: None, 401408: None},
    (1, 1, 2, 64, 280): {25088: None, 100352: None},
    (1, 1, 2, 128, 32): {100352: None, 401408: None},
    (1, 1, 2, 128, 280): {25088: None, 100352: None},
    (1, 1, 2, 128, 560): {6272: None, 25088: None},
    (1, 1, 2, 192, 208): {6272: None, 25088: None},
    (1, 1, 2, 256, 64): {25088: None, 100352: None},
    (1, 1, 2, 256, 560): {6272: None, 25088: None},
    (1, 1, 2, 512, 136): {6272: None, 25088: None},
    (1, 1, 2, 576, 208): {6272: None, 25088: None},
    (1, 1, 2, 768, 208): {6272: None, 25088: None},
    (1, 1, 2, 1024, 280): {1568: None, 6272: None},
    (1, 2, 2, 256, 136): {25088: None, 100352: None},
    (1, 2, 2, 512, 280): {6272: None, 25088: None},
    (1, 2, 2, 1024, 560): {1568: None, 6272: None},
    (9, 1, 1, 64, 64): {100352: None, 401408: "256x64"},
    (9, 1, 2, 64, 64): {25088: None, 100352: None},
    (9, 1, 2, 128, 136): {6272: None, 25088: None},
    (9, 1, 2, 256, 280): {1568: None, 6272: None},
    (9, 2, 2, 64, 64): {25088: None, 100352: None},
    (9, 2, 2, 128, 136): {6272: None, 25088: None},
    (9, 2, 2, 256, 280): {1568: None, 6272: None},
}
