"""One engine in a process of its own: `python -m disco.bench.engine`, started by `LocalEngine`.

In a process of its own, because thread pools that share the cores spin against each other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import disco
import disco_kernels as dk
from disco.bench.dense_engines import MAKERS
from disco.errors import InputError
from disco.runtime.children import ChildSpec
from disco.runtime.launched import START_TIMEOUT_S, Launched
from disco.runtime.messages import Message, load_tensors, unflatten
from disco.runtime.passes import Passes
from disco.runtime.serve import Handlers, serve
from disco.zoo import build_model

_COMPILED = {
    "compiled": torch.float32,
    "compiled_bf16": torch.bfloat16,
    "compiled_int8": torch.int8,
}
ENGINES = (*MAKERS, "swapped", *_COMPILED)
# Of the noise that ranges of 8-bit integers are taken from: not that of the measurements.
_EXAMPLE_SEED = 20_000


class LocalEngine(Launched):
    """The whole model in one other process. Use as a context manager.

    Args:
        engine: one of `ENGINES`.
        source, name: the model in the zoo.
        weights: a safetensors file with its weights.
        nodes: number of nodes that its zero pattern is for.
        pattern: the recorded pattern, for "swapped".
        image_size: of the square inputs, in pixels.
        threads: how many it may use.
        batch: images of a pass; some engines are made for one size.
        start_timeout_s: until it is ready. Compiling takes longest.
    """

    def __init__(
        self,
        engine: str,
        *,
        source: str,
        name: str,
        weights: str | Path,
        nodes: int,
        pattern: str | Path | None,
        image_size: int,
        threads: int,
        batch: int = 1,
        timeout_s: float = 30.0,
        start_timeout_s: float = START_TIMEOUT_S,
        popen: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(timeout_s, start_timeout_s)
        assert engine in ENGINES, engine
        self._engine = engine
        self._threads = threads
        self._popen = popen
        self._args = {
            "--engine": engine,
            "--source": source,
            "--name": name,
            "--weights": os.path.abspath(weights),
            "--nodes": str(nodes),
            "--image-size": str(image_size),
            "--threads": str(threads),
            "--batch": str(batch),
        }
        if pattern is not None:
            self._args["--pattern"] = os.path.abspath(pattern)

    def run(self, *inputs: torch.Tensor) -> Any:
        """One pass; returns what the model returns."""
        (reply,) = self._ask(inputs, {"command": "run"}, 1)
        return unflatten(reply["structure"], load_tensors(reply["outputs"]))

    def specs(self, folder: str) -> list[ChildSpec]:
        """The one child."""
        args = {**self._args, "--folder": folder}
        flat = tuple(word for pair in args.items() for word in pair)
        return [ChildSpec(self._engine, "disco.bench.engine", flat, self._threads, self._popen)]


def prepare(args: argparse.Namespace) -> tuple[Message, Handlers]:
    """Build the model and turn it into the engine."""
    torch.set_num_threads(args.threads)
    model: nn.Module = build_model(args.source, args.name, weights=args.weights)
    generator = torch.Generator().manual_seed(_EXAMPLE_SEED)
    example = torch.randn(args.batch, 3, args.image_size, args.image_size, generator=generator)
    ready: Message = {"threads": args.threads, "backends": ["torch"]}
    function: Callable[..., Any] = model
    if args.engine == "swapped":
        ready["backends"] = _swap(model, args)
    elif args.engine in _COMPILED:
        dtype = _COMPILED[args.engine]
        compiled = disco.compile(model, nodes=args.nodes, example_inputs=(example,), dtype=dtype)
        function = compiled
        ready["backends"] = sorted(set(compiled.kernel_backends.values()))
        ready["gathered"] = list(compiled.gathered)
        ready["packed_bytes"] = compiled.packed_bytes
    else:
        engine = MAKERS[args.engine](model, example, args.folder)
        function, ready["threads"] = engine.function, engine.threads
        if args.engine.startswith(("onnxruntime", "openvino")):
            ready["backends"] = [args.engine]
    passes = Passes(function, os.path.join(args.folder, "outputs.safetensors"))
    return ready, passes.handlers()


def _swap(model: nn.Module, args: argparse.Namespace) -> list[str]:
    """Swap layers in place; the backends of the new ones."""
    pattern = None if args.pattern is None else dk.Pattern.load(args.pattern)
    report = dk.swap_(model, args.nodes, pattern=pattern)
    if not report.swapped:
        raise InputError(
            f"no layer of {args.name} has a pattern for {args.nodes} nodes: sparsify it first"
        )
    return sorted({row.backend for row in report.swapped if row.backend is not None})


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stdin ends. See `disco.runtime.serve` for the exit codes."""
    parser = argparse.ArgumentParser(prog="python -m disco.bench.engine", description=__doc__)
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--source", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--pattern")
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--folder", required=True, help="private; outputs are written there")
    args = parser.parse_args(argv)
    return serve(lambda _: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
