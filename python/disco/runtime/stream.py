"""Answering "requests", "stream" and "profile": several requests in flight, and where time goes."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from disco.errors import InputError
from disco.executor import Executor, Transport, pipeline, run_pipelined
from disco.runtime.accounts import Account
from disco.runtime.messages import Message, load_tensors, save_outputs, unflatten
from disco.runtime.serve import Dialogue


class Stream:
    """One rank's executor, driven by commands.

    Args:
        executor: of the rank.
        transport: that it uses.
        dialogue: with the launcher.
    """

    def __init__(self, executor: Executor, transport: Transport, dialogue: Dialogue) -> None:
        self._executor = executor
        self._transport = transport
        self._dialogue = dialogue

    def requests(self, command: Message) -> Message:
        """Requests as they come in further commands, each with a reply of its own, up to an "end".

        The command has `in_flight` and `spans` (whether replies have them). A further one has the
        `number` of a request, a file with its `inputs`, their `structure`, and in `outputs` the
        path of the file for them but for the rank at its end. Inputs that the model refuses are so
        on all ranks, before anything is exchanged.
        """
        source = _Coming(self._executor, self._dialogue)
        with torch.inference_mode():
            for done in pipeline(
                self._executor, self._transport, source, command["in_flight"], record=True
            ):
                request = source.begun.popleft()
                assert done.record is not None
                outputs = f"{request['outputs']}{self._transport.rank}.safetensors"
                account = Account.of(done.record, done.begin_ns, done.end_ns, command["spans"])
                self._dialogue.reply(
                    {
                        "number": request["number"],
                        "outputs": outputs,
                        "structure": save_outputs(outputs, done.outputs),
                        "account": account.to_plain(),
                    }
                )
        return {"ended": True}

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
        """`warmup` requests, then one with its timeline."""
        inputs = self._inputs(command)
        with torch.inference_mode():
            for number in range(command["warmup"] + 1):
                self._executor.profile = number == command["warmup"]
                self._executor(*inputs)
        self._executor.profile = False
        timeline = self._executor.last_timeline
        assert timeline is not None
        return timeline.to_plain()

    def _inputs(self, command: Message) -> Sequence[Tensor]:
        args, kwargs = unflatten(command["structure"], load_tensors(command["inputs"]))
        return self._executor.flat_inputs(args, kwargs)


@dataclass
class _Coming:
    """The launcher's requests, as a source. `begun` are those not yet answered, in order."""

    executor: Executor
    dialogue: Dialogue
    begun: deque[Message] = field(default_factory=deque)
    _ended: bool = False

    def take(self, idle: bool) -> Sequence[Tensor] | None:
        """The next request's inputs; those that the model does not take are answered at once."""
        while not self._ended:
            request = self.dialogue.next() if idle else self.dialogue.poll()
            if request is None:
                return None
            if request["command"] == "end":
                self._ended = True
                return None
            args, kwargs = unflatten(request["structure"], load_tensors(request["inputs"]))
            try:
                self.executor.check_call(args, kwargs)
            except InputError as error:
                self.dialogue.reply({"number": request["number"], "refused": str(error)})
                continue
            self.begun.append(request)
            return self.executor.flat_inputs(args, kwargs)
        return None
