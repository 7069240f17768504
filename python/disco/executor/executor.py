"""Runs one rank's program. Everything that can be done once is done when the Executor is made."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from disco.errors import InputError
from disco.executor import exchange, kernels
from disco.executor.activations import Placed
from disco.executor.losses import (
    depends_on_counts,
    prepare_counted,
    senders_of_values,
    zero_if_lost,
)
from disco.executor.request import BufferPool, Request, ShapeKey
from disco.executor.steps import REQUEST_SLOT, Preparation, Step, Values, prepare_pure
from disco.executor.timeline import PROGRESS, WAIT, Recorder, Timeline
from disco.executor.transport import Handle, Transport
from disco.executor.two_passes import first_pass
from disco.program import (
    Op,
    Program,
    Ref,
    ValueInfo,
    WeightRef,
    evaluate_dim,
    flatten_inputs,
    map_leaves,
    overwritten_residual,
    plan_buffers,
)
from disco.program.symbols import first_failing, solve_dim, symbols_of
from disco_kernels import InputBytes, Packing

DEADLINE_S = 30.0

_PREPARE: dict[str, Callable[[Op, Preparation], Step]] = {
    "aten.adaptive_avg_pool2d.default": kernels.prepare_global_avg_pool2d,
    "aten.max_pool2d.default": kernels.prepare_max_pool2d,
    "aten.mean.dim": kernels.prepare_global_avg_pool2d,
    "disco.assemble": exchange.prepare_assemble,
    "disco.conv2d": kernels.prepare_conv2d,
    "disco.empty": exchange.prepare_empty,
    "disco.exchange": exchange.prepare_exchange,
    "disco.gather_conv2d": kernels.prepare_gather_conv2d,
    "disco.gather_linear": kernels.prepare_gather_linear,
    "disco.linear": kernels.prepare_linear,
    "disco.partial_conv2d": kernels.prepare_partial_conv2d,
    "disco.partial_linear": kernels.prepare_partial_linear,
    "disco.payload_scale": exchange.prepare_payload_scale,
    "disco.widen": exchange.prepare_widen,
}


class Executor:
    """One program made ready to run, for inference.

    Args:
        program: a rank's program, or a whole one (then there is nothing to exchange).
        weights: what it reads. They are packed or copied here; the given tensors are not kept.
        transport: to the other ranks; None for a program without exchanges, or to be given later.
        backend: of the kernels, or None for the automatic choice.
        deadline_s: longest wait for any one message.
        winograd: for 3 x 3 convolutions, as in `disco_kernels.ConvSpec`.
        packed_bytes: that all packed weights may have together, as for `disco_kernels.Packing`.
        input_bytes: the convolutions (without groups) and linears to multiply in 8-bit integers, by
            the value that they compute, and what their input's bytes stand for.
        overlap: compute while payloads travel (`disco.executor.two_passes`); the outputs' bits are
            the same without.
        device: where to compute: weights are moved there, and every request's inputs; its outputs
            are where its inputs were. None for where the weights are, and inputs have to be.

    Attributes:
        device: where it computes, or None where there is no weight to tell.
        packed_bytes: of the packed weights.
        profile: set it to True to have calls leave their `Timeline` in `last_timeline`.
        last_record: of the last call that was profiled and returned, as it was taken down.
        last_timeline: the same made sense of; it is made when it is asked for, and costs nothing
            before.

    Raises:
        InputError: the program cannot be prepared, or its packed weights do not fit.

    Calls from several threads are safe; with a transport they take turns, because messages are
    matched by the order of requests.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        transport: Transport | None = None,
        backend: str | None = None,
        deadline_s: float = DEADLINE_S,
        winograd: str = "off",
        packed_bytes: int | None = None,
        input_bytes: Mapping[str, InputBytes] | None = None,
        overlap: bool = True,
        device: torch.device | None = None,
    ) -> None:
        if device is not None:
            weights = {name: weight.to(device) for name, weight in weights.items()}
        self._moves = device is not None
        self.device = device or next((w.device for w in weights.values()), None)
        self.inputs = {name: program.values[name] for name in program.inputs}
        self._signature = program.signature
        self._conditions = program.conditions
        self._holding: set[tuple[int, ...]] = set()  # sizes for which the conditions hold
        self.transport = transport
        self.deadline_s = deadline_s
        packing = Packing(packed_bytes)
        prepare = Preparation(
            weights,
            backend,
            program.values,
            winograd,
            input_bytes or {},
            packing,
            device=self.device,
        )
        self._input_slots = [prepare.slot(name) for name in program.inputs]
        exchanges = {op.name for op in program.ops if op.kind == "disco.exchange"}
        self._steps = [_prepare(op, prepare, exchanges) for op in program.ops]
        senders = senders_of_values(program)
        self._steps = [
            zero_if_lost(step, senders[op.name]) if op.name in senders else step
            for op, step in zip(program.ops, self._steps, strict=True)
        ]
        try:
            packing.finish()
        except ValueError as error:
            raise InputError(str(error)) from error
        self.packed_bytes = packing.packed_bytes
        self._kernels = prepare.kernels
        self._outputs = map_leaves(program.outputs, lambda leaf: _output(leaf, prepare))
        _free_at_last_use(program, self._steps, prepare)
        kept = {
            op.name: overwritten_residual(op)
            for op, step in zip(program.ops, self._steps, strict=True)
            if step.writes_out
        }
        self._num_slots = len(prepare.slots) + 1
        if overlap:
            self._steps = _with_first_passes(self._steps, unused_slot=self._num_slots)
        self._num_slots += 1
        buffers = plan_buffers(program, kept)
        self._buffer_of = {prepare.slot(name): number for name, number in buffers.items()}
        self._buffers = BufferPool(self._buffer_of)
        self.profile = False
        self._last_record: Recorder | None = None
        self._requests = itertools.count()
        self._turn = threading.Lock()

    @property
    def kernel_backends(self) -> dict[str, str]:
        """Backend of every convolution and linear, by the value it computes."""
        return {name: kernel.backend for name, kernel in self._kernels.items()}

    @property
    def last_kernels(self) -> dict[str, str]:
        """`last_kernel` of every convolution and linear."""
        return {name: kernel.last_kernel for name, kernel in self._kernels.items()}

    @property
    def algorithms(self) -> dict[str, str]:
        """`algorithm` of the kernel of every convolution and linear."""
        return {name: kernel.algorithm for name, kernel in self._kernels.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one request and return its outputs, fresh tensors in the program's nesting.

        Args:
            args, kwargs: as for the model that was captured.

        Raises:
            InputError: inputs that do not fit the program.
            TransportError: the exchange failed; DeadlineError: it took too long.
        """
        inputs = self.flat_inputs(args, kwargs)
        if self.transport is None:
            return self._run(inputs, None, 0)
        with self._turn:
            return self._run(inputs, self.transport, self.next_request())

    def skip_to(self, number: int) -> None:
        """Give the next request this number; ranks agree on one after a request that failed."""
        self._requests = itertools.count(number)

    @property
    def last_record(self) -> Recorder | None:
        return self._last_record

    @property
    def last_timeline(self) -> Timeline | None:
        return None if self._last_record is None else self._last_record.timeline()

    def next_request(self) -> int:
        """A number that no request over this executor's transport had; ranks that run the same
        requests in the same order get the same."""
        return next(self._requests)

    def flat_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors in a call's arguments, in the order of the program's inputs.

        Raises:
            InputError: arguments that are not nested as the captured ones.
        """
        return flatten_inputs(self._signature, tuple(self.inputs), args, kwargs)

    def check_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise InputError unless the program takes these arguments."""
        self._check(self.flat_inputs(args, kwargs))

    def _run(self, inputs: Sequence[Tensor], transport: Transport | None, request: int) -> Any:
        record = Recorder() if self.profile else None
        running = self.start(inputs, transport, request, record)
        with torch.no_grad():
            while True:
                try:
                    handle = next(running)
                except StopIteration as finished:
                    if record is not None:
                        self._last_record = record
                    return finished.value
                assert transport is not None
                transport.wait(handle, self.deadline_s)

    def start(
        self,
        inputs: Sequence[Tensor],
        transport: Transport | None,
        number: int,
        record: Recorder | None = None,
    ) -> Generator[Handle, None, Any]:
        """One request as a generator: yields a handle when it must wait, returns the outputs.

        The caller runs it with gradients off, and resumes it once the handle is done. Several
        requests may be under way: each has memory of its own. One that is closed before its end
        keeps its memory from later ones, since a transport may still write there.

        Args:
            inputs: as from `flat_inputs`.
            transport: to the other ranks.
            number: the same on all ranks, of no other request under way (`next_request`).
            record: to write into, or None.

        Raises:
            InputError: inputs that do not fit the program.
        """
        symbols = self._check(inputs)
        shapes = tuple(tuple(x.shape) for x in inputs)
        kept = self._buffers.take(shapes)
        request = Request(number, transport, symbols, kept, record, self.device)
        running = self._through_steps(inputs, request, shapes)
        if self.device is not None and self.device.type == "cuda":
            return _with_current_device(running, self.device)
        return running

    def _through_steps(
        self, inputs: Sequence[Tensor], request: Request, shapes: ShapeKey
    ) -> Generator[Handle, None, Any]:
        values: Values = [None] * self._num_slots
        layout: dict[int, Placed] = {}
        first = not request.activations.out
        values[REQUEST_SLOT] = request
        given = inputs[0].device if inputs else None
        for slot, x in zip(self._input_slots, inputs, strict=True):
            values[slot] = x.to(self.device) if self._moves else x
        request.post_receives()

        record, clock = request.record, time.perf_counter_ns
        begin = end = 0
        for step in self._steps:
            for slot in step.awaits:
                handle = request.arriving[slot]
                if not handle.done:
                    begin = clock()
                    yield handle
                    if record is not None:
                        record.marks.append((step.name, WAIT, begin, clock(), None, handle))
            if record is None:
                value = values[step.out] = step.run(values)
            else:
                begin = clock()
                value = values[step.out] = step.run(values)
                end = clock()
                record.marks.append((step.name, step.kind, begin, end, step.exchange, None))
            if first and step.out in self._buffer_of:
                layout[step.out] = (value.shape, value.stride(), value.dtype, value.device)
            for slot in step.free:
                values[slot] = None
            if step.progress and request.transport is not None:
                request.transport.progress()
                if record is not None:
                    record.marks.append((step.name, PROGRESS, end, clock(), None, None))

        outputs = map_leaves(self._outputs, lambda fetch: fetch(values))
        if self._moves:
            outputs = map_leaves(outputs, lambda leaf: _moved(leaf, given))
        for handle in request.handles:
            if not handle.done:
                begin = clock()
                yield handle
                if record is not None:
                    record.marks.append(("end", WAIT, begin, clock(), None, handle))
        self._buffers.give_back(shapes, request.kept, layout)
        return outputs

    def _check(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        """Raise InputError unless the inputs fit; else the sizes of the program's symbols."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(self.inputs)
            raise InputError(
                f"the model takes {len(self.inputs)} inputs ({names}), given {len(inputs)}"
            )
        symbols: dict[str, int] = {}
        for (name, info), x in zip(self.inputs.items(), inputs, strict=True):
            wanted = _wanted(info, symbols)
            if not isinstance(x, Tensor):
                raise InputError(
                    f"input {name!r} must be a tensor {wanted}, given {type(x).__name__}"
                )
            given = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            fits = x.dim() == len(info.shape) and str(x.dtype) == f"torch.{info.dtype}"
            for size, dim in zip(x.shape, info.shape, strict=False):
                if isinstance(dim, int):
                    fits = fits and dim == size
                elif dim.isidentifier():
                    fits = fits and symbols.setdefault(dim, size) == size
                else:
                    symbols.update(solve_dim(dim, size, symbols))
                    fits = fits and _fits(dim, size, symbols)
            if not fits:
                raise InputError(f"input {name!r} must be {wanted}, given {given}")
            if x.requires_grad and torch.is_grad_enabled():
                raise InputError(
                    f"input {name!r} requires a gradient; this model is for inference: detach the "
                    f"input, or train the original model"
                )
        self._check_conditions(symbols)
        return symbols

    def _check_conditions(self, symbols: Mapping[str, int]) -> None:
        if not self._conditions:
            return
        sizes = tuple(symbols.values())
        if sizes in self._holding:
            return
        failing = first_failing(self._conditions, symbols)
        if failing is not None:
            raise InputError(
                f"the model was captured for sizes with {failing}, and here "
                f"{self._sizes_in(failing, symbols)}: capture it with an example of these sizes"
            )
        self._holding.add(sizes)

    def _sizes_in(self, condition: str, symbols: Mapping[str, int]) -> str:
        """Which sizes the symbols of a condition are, and what they are now."""
        places = {
            dim: f"dimension {number} of {name!r}"
            for name, info in self.inputs.items()
            for number, dim in enumerate(info.shape)
        }
        names = symbols_of((condition,))
        return ", ".join(f"{n} = {symbols[n]} ({places.get(n, 'derived')})" for n in names)

    def __deepcopy__(self, memo: dict[int, Any]) -> Executor:
        # Nothing in here changes after construction, so copies may share it, packed weights
        # included.
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "an Executor holds packed kernels and cannot be pickled; keep the model's state_dict, "
            "or save the partitioned model, and prepare it again"
        )


def _with_current_device(
    running: Generator[Handle, None, Any], device: torch.device
) -> Generator[Handle, None, Any]:
    """The same, run with `device` as the current one, which is where kernels are launched."""
    try:
        while True:
            with torch.cuda.device(device):
                try:
                    handle = next(running)
                except StopIteration as finished:
                    return finished.value
            yield handle
    finally:
        running.close()


def _moved(leaf: Any, device: torch.device | None) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _wanted(info: ValueInfo, known: Mapping[str, int]) -> str:
    """What an input must be, sizes that are open by name."""
    names = dict.fromkeys(d for d in info.shape if isinstance(d, str) and d.isidentifier())
    notes = [f"{name} is {known[name]} before" for name in names if name in known]
    free = [name for name in names if name not in known]
    if free:
        notes.append(f"{', '.join(free)}: any size")
    shape = f"[{', '.join(map(str, info.shape))}] {info.dtype}"
    return f"{shape} ({', '.join(notes)})" if notes else shape


def _fits(dim: str, size: int, symbols: Mapping[str, int]) -> bool:
    known = all(name in symbols for name in symbols_of((dim,)))
    return known and evaluate_dim(dim, symbols) == size


def _prepare(op: Op, prepare: Preparation, exchanges: Set[str]) -> Step:
    source = op.args[0] if op.args else None
    make = prepare_counted if depends_on_counts(op) else _PREPARE.get(op.kind, prepare_pure)
    if op.kind == "operator.getitem" and isinstance(source, Ref) and source.name in exchanges:
        make = exchange.prepare_payload
    if op.kind == "disco.payload_scale" and not (
        isinstance(source, Ref) and source.name in exchanges
    ):
        raise InputError(f"op {op.name!r} ({op.kind}) takes the result of an exchange")
    try:
        step = make(op, prepare)
        read = (prepare.slot(name) for name in op.refs())
        step.awaits = tuple(slot for slot in read if slot in prepare.payloads)
        return step
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        # A program is read from a file, so what does not fit in it is the file's mistake.
        raise InputError(
            f"op {op.name!r} ({op.kind}) cannot be prepared: {type(error).__name__} {error}; "
            f"partition the model again"
        ) from error


def _with_first_passes(steps: Sequence[Step], unused_slot: int) -> list[Step]:
    """In front of layers over payloads, once weights are packed, what they can do without."""
    made: list[Step] = []
    for step in steps:
        if step.local is not None and step.local.in_two_passes:
            made.append(first_pass(step, step.local, unused_slot))
        made.append(step)
    return made


def _output(leaf: Any, prepare: Preparation) -> Callable[[Values], Any]:
    if isinstance(leaf, Ref):
        slot = prepare.slot(leaf.name)
        return lambda values: values[slot]
    if isinstance(leaf, WeightRef):
        weight = prepare.weights[leaf.name].clone()
        return lambda values: weight.clone()
    return lambda values: leaf


def _free_at_last_use(program: Program, steps: list[Step], prepare: Preparation) -> None:
    """Let every step drop what no later step and no output reads."""
    kept = {prepare.slot(name) for name in program.output_names()}
    for op, step in zip(reversed(program.ops), reversed(steps), strict=True):
        read = {prepare.slot(name) for name in op.refs()} | {step.out}
        step.free = tuple(sorted(read - kept))
        kept |= read
