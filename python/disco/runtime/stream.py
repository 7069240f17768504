"""Answering "stream" and "profile": what several requests in flight gain, and where time goes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from disco.executor import Executor, Transport, run_pipelined
from disco.runtime.messages import Message, load_tensors, unflatten


class Stream:
    """One rank's executor, driven by commands.

    Args:
        executor: of the rank.
        transport: that it uses.
    """

    def __init__(self, executor: Executor, transport: Transport) -> None:
        self._executor = executor
        self._transport = transport

    def measure(self, command: Message) -> Message:
        """`warmup` requests, then `repeats` that are timed together, `in_flight` at a time."""
        inputs = self._inputs(command)
        wanted = command["warmup"] + command["repeats"]
        outputs = run_pipelined(
            self._executor,
            self._transport,
            itertools.repeat(inputs, wanted),
            command["in_flight"],
        )
        begin = time.perf_counter()
        with torch.inference_mode():
            for done, _ in enumerate(outputs, 1):
                if done == command["warmup"]:
                    begin = time.perf_counter()
        return {"seconds": time.perf_counter() - begin}

    def profile(self, command: Message) -> Message:
        """`warmup` requests, then one with its spans: [name, kind, begin_ns, end_ns, bytes]."""
        inputs = self._inputs(command)
        with torch.inference_mode():
            for number in range(command["warmup"] + 1):
                self._executor.profile = number == command["warmup"]
                self._executor(*inputs)
        self._executor.profile = False
        timeline = self._executor.last_timeline
        assert timeline is not None
        return {"spans": [[s.name, s.kind, s.begin_ns, s.end_ns, s.bytes] for s in timeline.spans]}

    def _inputs(self, command: Message) -> Sequence[Tensor]:
        args, kwargs = unflatten(command["structure"], load_tensors(command["inputs"]))
        return self._executor.flat_inputs(args, kwargs)
