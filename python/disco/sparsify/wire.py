"""Training a model for what its nodes will do to it: rounded payloads, and nodes that are lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from disco.capture import Unfolded, capture_unfolded
from disco.errors import InputError
from disco.partition import Cluster, Problem, shares_for
from disco.partition.wire import check_wire_dtype
from disco.program import flatten_inputs
from disco.sparsify.source_ops import SourceOps
from disco.sparsify.trains_alike import check_trains_alike
from disco.sparsify.wire_layout import Layout
from disco.sparsify.wire_run import WireRun


class WireSimulation:
    """Makes a model compute what the nodes of its partition will compute, with gradients.

    While it is attached, a call of the model gives what `disco.partition(model, ..., nodes,
    wire_dtype=...)` would give: what a node reads of the others' channels is rounded to the wire
    dtype, in exactly those tensors that would travel so, and its own is not. Gradients pass the
    rounding unchanged (straight through; Bengio et al., arXiv 1308.3432). Without some ranks
    (`lost`, `without`) it gives what a survivable partition answers when these nodes are gone:
    their channels are zeros, and norms and means over channels are of the others.

    Batch norms are those of the module's mode. Only in a call without some ranks they use their
    running statistics in training as well, and leave them alone: that is what nodes do, whose batch
    norms are constants of the whole model.

    Dropout and stochastic depth are those of the modules, too, in training: one draw a pass, the
    same for all nodes.

    Where nothing is to be simulated the model's own `forward` is called.

    Args:
        nodes: a number of equal nodes, or a `Cluster`, as for `disco.partition`.
        wire_dtype: "float32", "float16", "bfloat16" or "int8".
        survivable: simulate a survivable plan also while all ranks are there: its last layers read
            no payload, so nothing is rounded for them.

    Raises:
        InputError: an argument that is not allowed.
    """

    def __init__(
        self, nodes: int | Cluster, wire_dtype: str = "float32", *, survivable: bool = False
    ) -> None:
        if wire_dtype is None:
            raise InputError("wire_dtype must be the name of a dtype; given None")
        check_wire_dtype(wire_dtype)
        self._cluster = Cluster.of(nodes)
        self._wire, self._survivable = wire_dtype, survivable
        self._lost: frozenset[int] = frozenset()
        self._model: nn.Module | None = None
        self._unfolded: Unfolded | None = None
        self._source: SourceOps | None = None
        self._layouts: dict[bool, Layout] = {}
        self._checked = False

    @property
    def world_size(self) -> int:
        """How many nodes there are."""
        return self._cluster.world_size

    @property
    def attached(self) -> bool:
        return self._model is not None

    @property
    def lost(self) -> tuple[int, ...]:
        """The ranks without which the model is computed; assign ranks, or None for all there."""
        return tuple(sorted(self._lost))

    @lost.setter
    def lost(self, ranks: Sequence[int] | None) -> None:
        chosen = tuple(ranks or ())
        size = self.world_size
        for rank in chosen:
            if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < size:
                raise InputError(f"ranks are 0 to {size - 1} of {size} nodes; given {rank!r}")
        if len(set(chosen)) >= size:
            raise InputError(f"all {size} nodes would be lost: leave at least one")
        self._lost = frozenset(chosen)

    @contextmanager
    def without(self, ranks: Sequence[int]) -> Iterator[None]:
        """Within it, these ranks are lost; afterwards those that were before."""
        before = self.lost
        self.lost = ranks
        try:
            yield
        finally:
            self.lost = before

    def attach(
        self,
        model: nn.Module,
        example_inputs: Sequence[Any],
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Let calls of `model` compute what nodes would.

        The plan is made for the weights' zeros as they are now: attach when they are final.

        Args:
            model: its parameters stay where they are and keep their names; only how `forward` is
                found changes. Attached to one simulation at a time.
            example_inputs, example_kwargs: as for `disco.partition`. Other sizes than the batch's
                are fixed by them.

        Raises:
            InputError: a model that cannot be captured, whose batch norms are not torch's, or that
                is attached already; here or in the first training step one that draws other random
                numbers, or returns something else in training than in evaluation.
        """
        if self._model is not None or "forward" in vars(model):
            raise InputError(
                "the model, or this simulation, is attached already: call detach() first"
            )
        if model.training:
            check_trains_alike(model, example_inputs, example_kwargs or {})
        self._checked = model.training
        unfolded = capture_unfolded(model, example_inputs, example_kwargs=example_kwargs)
        source = SourceOps(model, unfolded)
        if model.training:
            source.check_noise()
        self._source, self._unfolded = source, unfolded
        self._layouts = {}
        self._layout(self._survivable or bool(self._lost))
        self._model = model
        # An attribute of the instance is found before the method of its class.
        model.forward = self._forward

    def detach(self) -> None:
        """Let calls of the model compute what they did before. Does nothing if not attached."""
        if self._model is not None:
            del self._model.forward
        self._model = self._source = self._unfolded = None
        self._layouts = {}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        model, source, unfolded = self._model, self._source, self._unfolded
        assert model is not None and source is not None and unfolded is not None
        layout = self._layout(self._survivable or bool(self._lost))
        if not layout.wires and not self._lost:
            return type(model).forward(model, *args, **kwargs)
        if model.training and not self._checked:
            check_trains_alike(model, args, kwargs)
            self._checked = True
        program = unfolded.captured.program
        inputs = flatten_inputs(program.signature, program.inputs, args, kwargs)
        source.begin(frozen=bool(self._lost))
        try:
            named = dict(zip(program.inputs, inputs, strict=True))
            return WireRun(source, layout, self._lost, named).outputs()
        finally:
            source.end()

    def _layout(self, survivable: bool) -> Layout:
        """The plan that is simulated."""
        if survivable not in self._layouts:
            assert self._unfolded is not None and self._source is not None
            problem = Problem(
                *self._unfolded.captured,
                {},
                partial_sums=True,
                permute=True,
                wire_dtype=self._wire,
                survivable=survivable,
            )
            # The zeros of the weights are there: the density to come is the one that is.
            decisions = problem.decide(shares_for(problem, self._cluster, 1.0))
            layout = Layout.of(decisions)
            layout.check(self._source)
            self._layouts[survivable] = layout
        return self._layouts[survivable]
