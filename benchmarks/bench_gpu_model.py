"""A whole model on a GPU: `disco.compile` against the dense model, both replayed as CUDA graphs.

    python -m benchmarks.bench_gpu_model --model resnet50 --batches 1,32,128 --json FILE

The dense sides are those of `benchmarks.gpu_models`. Outputs are compared with the dense model in
float64 on the same input, and the error of the dense side with it.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import disco
from benchmarks.gpu_models import (
    DTYPES,
    NODES,
    dense_sides,
    exact_model,
    exact_of,
    example_of,
    image_batch,
    measure,
    parser_of,
    print_row,
    read_groups,
    relative_error,
    set_precision,
    sparse_model,
    write_report,
)
from disco_kernels.cuda.conv2d_sm90 import Conv2dSm90
from disco_kernels.cuda.dense_product import DenseProduct


def main() -> None:
    parser = parser_of(__doc__, batches="1,32,128")
    parser.add_argument(
        "--triton-alone", action="store_true", help="also without CUDA C++ convolutions and cuBLAS"
    )
    args = parser.parse_args()
    set_precision(args)
    model = sparse_model(args).cuda()
    options: dict[str, Any] = {
        "example_inputs": example_of(args),
        "dtype": DTYPES[args.dtype],
        "group_size": read_groups(args),
    }
    ours = disco.compile(model, NODES, **options)
    sides = {"disco": ours, **dense_sides(model, args)}
    if args.triton_alone:
        others = [
            mock.patch.object(c, "make", return_value=None) for c in (Conv2dSm90, DenseProduct)
        ]
        with others[0], others[1]:
            sides["disco_triton"] = disco.compile(model, NODES, **options)
    oracle = exact_model(model)
    rows = []
    for batch in (int(b) for b in args.batches.split(",")):
        x = image_batch(args, batch)
        row, outputs = measure(x, "disco", sides, args.rounds)
        wanted = exact_of(oracle, x)
        row["relative_error"] = {name: relative_error(y, wanted) for name, y in outputs.items()}
        row["kernels"] = ours.last_kernels
        rows.append(row)
        print_row(args, row)
    write_report(args, rows, effective_density=ours.effective_density)


if __name__ == "__main__":
    main()
