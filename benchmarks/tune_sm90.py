"""Writes disco_kernels/cuda/tuned.py from what `benchmarks.bench_triton_tiles` measured.

python -m benchmarks.bench_triton_tiles --sm90-alone --linears --batches 1,32,128 --json FILE
python -m benchmarks.tune_sm90 FILE disco_kernels/cuda/tuned.py
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from disco_kernels.cuda.choice import CUBLAS

# A kernel has to be this much faster than Triton's to be taken: what measurements scatter.
LEAST_GAIN = 0.02

HEAD = '''"""Which kernel is fastest: written by benchmarks/tune_sm90.py.

By taps, stride, nodes, output channels of the widest node and input channels of the node that reads
most: output pixels that were measured, and a tile of `Conv2dSm90`, "cublas" for `DenseProduct`, or
None where the Triton kernel is faster.
"""

TUNED: dict[tuple[int, int, int, int, int], dict[int, str | None]] = {
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured")
    parser.add_argument("target")
    args = parser.parse_args()
    found: dict[tuple[int, ...], dict[int, str | None]] = defaultdict(dict)
    for row in json.loads(Path(args.measured).read_text())["rows"]:
        shape = row["shape"]
        side = (shape["size"] - 1) // shape["stride"] + 1
        times = {
            name.removeprefix("sm90 "): ms
            for name, ms in row["times_ms"].items()
            if name.startswith("sm90 ") or name == CUBLAS
        }
        best = min(times, key=lambda name: times[name], default=None)
        faster = best is not None and times[best] < (1 - LEAST_GAIN) * row["chosen_ms"]
        found[tuple(row["key"])][row["batch"] * side**2] = best if faster else None
    lines = [
        f"    {key}: {{{', '.join(f'{p}: {json.dumps(t)}' for p, t in sorted(tiles.items()))}}},\n"
        for key, tiles in sorted(found.items())
    ]
    text = HEAD + "".join(lines).replace("null", "None") + "}\n"
    Path(args.target).write_text(text)


if __name__ == "__main__":
    main()
