"""The functions that users call. Each is a few lines over the rooms that do the work."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disco.capture import Captured, capture, device_of
from disco.errors import InputError
from disco.executor import Executor, run_together
from disco.partition import (
    Cluster,
    Plan,
    Problem,
    RankProgram,
    decide,
    plan_for,
)
from disco.partition import with_wire_dtype as rewrite_wire_dtype
from disco.partition.one_machine import one_machine_program
from disco.partition.read_groups import ChannelsRead
from disco.partition.shards import load_manifest, load_shard, save_artifact
from disco.partition.wire import check_wire_dtype
from disco.program import flatten_inputs, input_ranges, lower_precision
from disco.sparsify import (
    check_density,
    check_group_size,
    find_groups,
    sparsify_weights_,
    tensors_of,
)
from disco.untraced import untraced
from disco_kernels import WINOGRAD, InputBytes, Ownership, Pattern, choose_int8, registry
from disco_kernels.pattern import parameter_of

PathLike = str | os.PathLike[str]

# Kernels are prepared at the first call, once, whichever thread makes it.
_preparing = threading.Lock()


class Partitioned(nn.Module):
    """A model cut into one program per rank, all of which run in this process. For inference.

    A drop-in for the model: the same inputs, the same outputs up to rounding, any batch size. It
    has no parameters: the ranks' weights are packed for their kernels.

    Attributes:
        plan: who computes, holds and sends what; print it.
        ranks: per rank its program and weights.
    """

    def __init__(self, plan: Plan, ranks: Sequence[RankProgram]) -> None:
        super().__init__()
        self.plan = plan
        self.ranks = tuple(ranks)
        self._executors: list[Executor] | None = None
        self.eval()  # nothing in it trains

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, as rank 0 has them. InputError for inputs that do not fit."""
        return self.run_ranks(*args, **kwargs)[0]

    @untraced
    def run_ranks(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The outputs of every rank: each has the whole."""
        executors = self._prepared()
        return run_together(executors, executors[0].flat_inputs(args, kwargs))

    def save(
        self,
        directory: PathLike,
        model_description: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write `manifest.json` and one `rank-<r>.safetensors` per rank, all or nothing.

        Args:
            directory: must not exist, unless `overwrite` is set and it holds an older partition.
            model_description: anything in JSON that tells a reader which model this is.
        """
        save_artifact(directory, self.plan, self.ranks, model_description, overwrite)

    def _prepared(self) -> list[Executor]:
        if self._executors is None:
            with _preparing:
                if self._executors is None:
                    self._executors = [Executor(r.program, r.weights) for r in self.ranks]
        return self._executors


class Compiled(nn.Module):
    """A whole model on one machine, folded, fused and packed. For inference; any batch size.

    It has no parameters: changes to the original model do not reach it.

    Attributes:
        channels_read: of the layers that skip the zeros of a pattern, by the value that they
            compute, how many channels of other nodes have weights, and how many are read.
    """

    def __init__(
        self, executor: Executor, channels_read: Mapping[str, ChannelsRead] | None = None
    ) -> None:
        super().__init__()
        self._executor = executor
        self.channels_read = dict(channels_read or {})
        self.eval()  # nothing in it trains

    @property
    def gathered(self) -> tuple[str, ...]:
        """The values whose layers skip the zeros of a pattern."""
        return tuple(self.channels_read)

    @property
    def effective_density(self) -> float:
        """Channels of other nodes that these layers read, over those that there are."""
        return sum(self.channels_read.values(), ChannelsRead()).effective_density

    @property
    def kernel_backends(self) -> dict[str, str]:
        """Backend of every convolution and linear, by the value it computes."""
        return self._executor.kernel_backends

    @property
    def last_kernels(self) -> dict[str, str]:
        """Which of its backend's kernels computed each of them last: on a GPU "triton", "sm90
        <tile>" (CUDA C++) or, where that was measured to be faster, NVIDIA's "cublas"; empty for
        backends that have one, and before the first call."""
        return self._executor.last_kernels

    @property
    def algorithms(self) -> dict[str, str]:
        """How each of them is computed: "off" (directly), "f2", "f4" (by Winograd) or "int8"."""
        return self._executor.algorithms

    @property
    def packed_bytes(self) -> int:
        """Of all packed weights, which the model keeps in memory."""
        return self._executor.packed_bytes

    @untraced
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs. InputError for inputs that do not fit."""
        return self._executor(*args, **kwargs)


def partition(
    model: nn.Module,
    example_inputs: Sequence[Any],
    nodes: int | Cluster = 2,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_size: bool = False,
    ownership: Mapping[str, Ownership] | None = None,
    pattern: Pattern | None = None,
    tolerance: float = 0.0,
    dense_exchange: bool = False,
    partial_sums: bool = True,
    permute: bool = True,
    wire_dtype: torch.dtype | None = None,
    survivable: bool = False,
) -> Partitioned:
    """Cut `model` into `nodes` parts that together compute what it computes (arXiv 2302.11180).

    What is zero in the weights is not exchanged; what is not zero is, so the result is exact. Nodes
    that differ get parts that differ: as much of each layer as makes the predicted latency lowest
    and fits into each node's memory. `plan` tells what is predicted, also for fewer nodes; all that
    were asked for are used.

    Args:
        model: any module that `torch.export` can capture; it is not changed.
        example_inputs: positional inputs: tensors with the batch first, also in tuples, lists and
            dicts, and constants; sizes other than the batch are fixed by them.
        nodes: a number of equal nodes, 1 or more, or a `Cluster` that describes them.
        example_kwargs: inputs by name, like the others.
        dynamic_size: leave height and width of images ``[B, C, H, W]`` open, too. The plan counts
            bytes and FLOPs of an image of the example's size.
        ownership: layer ("layer1.0.conv1") -> who computes which of its outputs, where that is
            not to be chosen.
        pattern: a recorded one, whose ownership is used and which the weights must keep.
        tolerance: a weight counts as zero up to this. Above 0 the result is not exact.
        dense_exchange: exchange every channel, whatever the weights are: the baseline.
        partial_sums: let a layer exchange partial sums of its outputs where those are fewer bytes
            than its inputs; False for inputs only.
        permute: let nodes hold a layer's outputs in an order in which those that they send are
            runs; False for that of the model. An order given in `ownership` is kept.
        wire_dtype: what payloads travel in where that is fewer bytes than their own dtype:
            torch.float32, float16, bfloat16 or int8 (scales in the message, one an image and
            channel); None for their own. The model's output and the statistics of norms always
            travel in their own. Other than float32 the result is not exact (docs/wire-dtypes.md).
        survivable: add up the last layers' parts over the nodes, instead of splitting their
            outputs: nodes that are left can then answer over all outputs from the channels that
            they own (docs/running.md).

    Raises:
        InputError: the model cannot be captured, another wire dtype, weights that contradict the
            pattern (naming layer, block and largest value), an ownership that does not fit, a node
            without the memory for its part (with need and limit) or left without any work.
    """
    cluster = Cluster.of(nodes)
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance must be a number, 0 or more; given {tolerance!r}")
    _check_kinds(ownership, pattern)
    wire = _wire_name(wire_dtype)
    captured = capture(
        model, example_inputs, example_kwargs=example_kwargs, dynamic_size=dynamic_size
    )
    fixed = _fixed_ownership(captured, cluster.world_size, ownership or {}, pattern, tolerance)
    problem = Problem(
        *captured,
        fixed,
        tolerance,
        dense_exchange,
        partial_sums=partial_sums,
        permute=permute,
        kept_order=tuple(ownership or ()),
        wire_dtype=wire,
        survivable=survivable,
    )
    return Partitioned(*plan_for(problem, cluster, idle_allowed=bool(ownership)))


def compile(
    model: nn.Module,
    nodes: int = 2,
    *,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_size: bool = False,
    backend: str | None = None,
    winograd: str = "auto",
    dtype: torch.dtype = torch.float32,
    packed_bytes: int | None = None,
    group_size: int = 1,
) -> Compiled:
    """Make `model` fast on one machine: batch norms folded, epilogues fused, one layout.

    Layers whose zeros are the pattern of `nodes` nodes skip them; others run dense. It runs where
    the model's parameters are, on the CPU or on a GPU, and takes inputs there.

    Args:
        model: any module that `torch.export` can capture; it is not changed.
        nodes: number of nodes that the weights' zero pattern is for.
        example_inputs, example_kwargs, dynamic_size: as for `partition`.
        backend: of the kernels, or None for the automatic choice.
        winograd: how 3 x 3 convolutions of stride 1 are computed: "auto" (what suits the shape),
            "off", "f2" or "f4". Winograd is faster and rounds more; docs/architecture.md says how
            much.
        dtype: to compute in, `torch.float32`, `torch.bfloat16` or `torch.int8`. Inputs and outputs
            are float32 in all, and sums inside a kernel are float32 or exact. With `torch.int8`
            convolutions and linears multiply 8-bit integers where that pays (weights with a scale a
            channel, inputs with one a layer), and all else is in bfloat16. The inputs' ranges are
            those that `example_inputs` give, zero included, and what lies outside is clipped (NaN
            to the lowest): give examples of what will come. `winograd` is not for these layers.
        packed_bytes: that all packed weights may have together, or None for what is fastest. With
            `winograd` "auto" the layers where Winograd saves least a byte give it up first; see
            `Compiled.packed_bytes` and `Compiled.algorithms` for what came of it.
        group_size: 1, 2, 4 or 8: layers that skip zeros read their inputs so many neighbours at a
            time, beginning at multiples of it, and multiply what they have no weights for by zero.
            For GPUs, which load 16 bytes at once (8 channels in bfloat16, 4 in float32), and models
            whose channels were not chosen in such groups: `disco.order_channels_` first puts those
            that are read side by side; `Compiled.effective_density` tells what is left to skip.

    Raises:
        InputError: the model cannot be captured, `winograd`, `dtype` or `group_size` is none of
            these, or the weights do not fit into `packed_bytes`.
        disco_kernels.BackendUnavailable: `backend` was asked for and cannot serve, or `torch.int8`
            was and the CPU has no instructions for it.
    """
    _check_nodes(nodes)
    if winograd not in WINOGRAD:
        raise InputError(f"winograd is one of {', '.join(WINOGRAD)}, given {winograd!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise InputError(f"dtype is torch.float32, torch.bfloat16 or torch.int8, given {dtype}")
    if packed_bytes is not None:
        _check_whole("packed_bytes", packed_bytes)
    check_group_size(group_size)
    device = device_of(model)
    if dtype == torch.int8:
        # Before the work of capturing, not after it.
        registry.require_int8(registry.resolve(backend, device, torch.float32))
    captured = capture(
        model, example_inputs, example_kwargs=example_kwargs, dynamic_size=dynamic_size
    )
    program, channels_read = one_machine_program(decide(*captured, nodes), group_size)
    # Copies: what is not packed would otherwise follow the model when that is trained on.
    names = program.weight_names()
    weights = {name: captured.weights[name].to(device, copy=True) for name in names}
    input_bytes = None
    if dtype == torch.int8:
        signature, names = captured.program.signature, captured.program.inputs
        examples = flatten_inputs(signature, names, example_inputs, example_kwargs or {})
        input_bytes = _input_bytes(captured, examples)
    if dtype != torch.float32:
        program, weights = lower_precision(program, weights, torch.bfloat16)
    executor = Executor(
        program,
        weights,
        backend=backend,
        winograd=winograd,
        packed_bytes=packed_bytes,
        input_bytes=input_bytes,
    )
    return Compiled(executor, channels_read)


def _input_bytes(captured: Captured, examples: Sequence[Tensor]) -> dict[str, InputBytes]:
    """By the layers that are to multiply 8-bit integers, what their inputs' bytes stand for."""
    program, weights = captured.program, captured.weights
    chosen = []
    for op in program.ops:
        groups = op.kwargs.get("groups", 1)
        if op.kind not in ("disco.conv2d", "disco.linear") or not isinstance(groups, int):
            continue
        weight = weights[next(op.weight_refs())]
        if weight.dtype == torch.float32 and choose_int8(weight, groups):
            chosen.append(op.name)
    ranges = input_ranges(program, weights, examples, chosen)
    return {name: InputBytes.of_range(*found) for name, found in ranges.items()}


def load(directory: PathLike) -> Partitioned:
    """All ranks of a saved partition, in this process. InputError if anything in it is damaged."""
    plan = load_manifest(directory).plan
    shards = [load_shard(directory, rank) for rank in range(plan.world_size)]
    return Partitioned(plan, [RankProgram(shard.program, shard.weights) for shard in shards])


def with_wire_dtype(partitioned: Partitioned, wire_dtype: torch.dtype | None) -> Partitioned:
    """The same partition with payloads in another wire dtype. Neither model nor weights change.

    Args:
        partitioned: from `partition` or `load`; it is not changed, and shares its weights with the
            result.
        wire_dtype: as for `partition`, which may in addition choose other layers to exchange
            partial sums: it plans for the bytes of the wire dtype.

    Raises:
        InputError: another wire dtype, a plan of version 1.2 or older, or no partition.
    """
    if not isinstance(partitioned, Partitioned):
        raise InputError(
            f"with_wire_dtype takes what disco.partition or disco.load returned, given "
            f"{type(partitioned).__name__}"
        )
    return Partitioned(
        *rewrite_wire_dtype(partitioned.plan, partitioned.ranks, _wire_name(wire_dtype))
    )


def _wire_name(wire_dtype: torch.dtype | None) -> str | None:
    if wire_dtype is not None and not isinstance(wire_dtype, torch.dtype):
        raise InputError(
            "wire_dtype must be torch.float32, torch.float16, torch.bfloat16, torch.int8 or None, "
            f"given {wire_dtype!r}"
        )
    name = None if wire_dtype is None else str(wire_dtype).removeprefix("torch.")
    check_wire_dtype(name)
    return name


def sparsify_(
    model: nn.Module,
    nodes: int | Cluster,
    density: float,
    example_inputs: Sequence[Any],
    score: str = "l2",
    group_size: int = 1,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Pattern:
    """Give `model` DISCO structure in place: one-shot magnitude, no training.

    Of every exchanged tensor, each receiver keeps floor(density x owned) channels of each sender,
    the same ones for all layers that read it there; the other columns of its remote blocks become
    zero. Tensors that travel whole anyway (an op without a rule reads them) are left dense.

    Args:
        model: its parameters are changed; gradients are not recorded.
        nodes: number of equal nodes, or a `Cluster`: the shares of a layer's outputs are those that
            make the predicted latency lowest at this density and fit into its memories.
        density: in [0, 1].
        example_inputs, example_kwargs: as for `partition`.
        score: "l2" or "l1", of a channel's weights in the blocks that read it.
        group_size: 1, 2, 4 or 8: channels are chosen so many neighbours at a time, so that what is
            sent are runs whatever else is tied to them; as many groups as fit into that number of
            channels. What is left over at the end of a sender's channels is a smaller group.

    Returns:
        The selection; save it beside the weights.

    Raises:
        InputError: a density outside [0, 1], another score or group size, or a model that exchanges
        nothing that could be dropped.
    """
    cluster = Cluster.of(nodes)
    check_density(density)
    groups = find_groups(model, cluster, density, example_inputs, example_kwargs)
    return sparsify_weights_(tensors_of(model), groups, density, score, group_size)


def _fixed_ownership(
    captured: Captured,
    nodes: int,
    ownership: Mapping[str, Ownership],
    pattern: Pattern | None,
    tolerance: float,
) -> dict[str, Ownership]:
    """Who computes which outputs, where the user or a recorded pattern says so."""
    fixed: dict[str, Ownership] = {}
    if pattern is not None:
        for name, layer in pattern.layers.items():
            if layer.world_size != nodes:
                raise InputError(
                    f"the pattern of layer {name!r} is for {layer.world_size} nodes, and the model "
                    f"is partitioned for {nodes}: give that number, or another pattern"
                )
        parameters = {name: parameter_of(name, captured.weights) for name in pattern.layers}
        strangers = [name for name, parameter in parameters.items() if parameter is None]
        if strangers:
            raise InputError(
                f"the pattern is of another model: it names {len(strangers)} layers that this one "
                f"lacks ({strangers[0]!r}); give the pattern that was made with these weights"
            )
        contradictions = pattern.contradictions(captured.weights, tolerance)
        if contradictions:
            more = (
                f" (and {len(contradictions) - 1} more layers)" if len(contradictions) > 1 else ""
            )
            raise InputError(contradictions[0][1] + more)
        for name, layer in pattern.layers.items():
            parameter = parameters[name]
            assert parameter is not None
            fixed[parameter.rpartition(".")[0] or parameter] = layer.out_ownership
    fixed.update(ownership)
    layers = {
        captured.raw_name(name).rpartition(".")[0] for name in captured.program.weight_names()
    }
    for name in fixed:
        if name not in layers:
            raise InputError(
                f"an ownership is given for {name!r}, which is no layer of the captured model; "
                f"layers are called like {', '.join(repr(layer) for layer in sorted(layers)[:3])}"
            )
    return fixed


def _check_kinds(ownership: Mapping[str, Ownership] | None, pattern: Pattern | None) -> None:
    if pattern is not None and not isinstance(pattern, Pattern):
        raise InputError(
            f"pattern must be a disco_kernels.Pattern (Pattern.load reads a file), given "
            f"{type(pattern).__name__}"
        )
    if ownership is not None and not isinstance(ownership, Mapping):
        raise InputError(
            "ownership must be a dict of layers and their disco_kernels.Ownership, given "
            f"{type(ownership).__name__}"
        )
    for name, owned in (ownership or {}).items():
        if not isinstance(owned, Ownership):
            raise InputError(
                f"the ownership of layer {name!r} must be a disco_kernels.Ownership, given "
                f"{type(owned).__name__}"
            )


def _check_nodes(nodes: int) -> None:
    _check_whole("nodes", nodes)


def _check_whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number, 1 or more; given {value!r}")
