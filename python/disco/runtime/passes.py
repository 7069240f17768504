"""Answering "run" and "measure": passes of a function over tensors that lie in files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from disco.errors import InputError
from disco.runtime.messages import Message, load_tensors, save_outputs, unflatten
from disco.runtime.serve import Handlers


@dataclass
class Passes:
    """A function of tensors, served.

    Attributes:
        function: the model.
        outputs_path: file that a "run" writes its outputs to, over those of the last one.
        counters: current totals; a "run" replies by how much each grew.
    """

    function: Callable[..., Any]
    outputs_path: str
    counters: Callable[[], dict[str, int]] = dict

    def handlers(self) -> Handlers:
        """The commands, for `serve`."""
        return {"run": self.run, "measure": self.measure}

    def run(self, command: Message) -> Message:
        """One pass: inputs from a file, outputs to a file, when it ran, the counters.

        Inputs that the model does not take are refused before anything is exchanged, so that the
        next pass may be right.
        """
        args, kwargs = unflatten(command["structure"], load_tensors(command["inputs"]))
        before = self.counters()
        with torch.inference_mode():
            began_ns = time.perf_counter_ns()
            try:
                value = self.function(*args, **kwargs)
            except InputError as error:
                return {"refused": str(error)}
            ended_ns = time.perf_counter_ns()
        growth = {name: total - before[name] for name, total in self.counters().items()}
        structure = save_outputs(self.outputs_path, value)
        return {
            "outputs": self.outputs_path,
            "structure": structure,
            "latency_ms": (ended_ns - began_ns) / 1e6,
            "began_ns": began_ns,
            "ended_ns": ended_ns,
            **growth,
        }

    def measure(self, command: Message) -> Message:
        """Time passes in ms: `warmup` untimed ones, then `repeats` that are timed one by one."""
        args, kwargs = unflatten(command["structure"], load_tensors(command["inputs"]))
        latencies_ms: list[float] = []
        with torch.inference_mode():
            for index in range(command["warmup"] + command["repeats"]):
                begin = time.perf_counter()
                self.function(*args, **kwargs)
                if index >= command["warmup"]:
                    latencies_ms.append((time.perf_counter() - begin) * 1e3)
        return {"latency_ms": latencies_ms}
