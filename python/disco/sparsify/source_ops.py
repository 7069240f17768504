"""A model's function as its own parameters compute it, value by value of a plan's program.

A plan's program is folded and fused. Here each of its values is computed by the ops that were there
before that, from the model's live parameters, so that gradients reach them and batch norms and
dropout are those of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from disco.capture import Unfolded, draws
from disco.errors import InputError
from disco.program import Op, Program, Ref, WeightRef, map_leaves, pure_function
from disco.program.interpret import dtype_of
from disco.program.ir import Dtype
from disco.sparsify.find_groups import tensors_of

BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
MATRIX_KINDS = frozenset(
    {"disco.conv2d", "disco.linear", "aten.conv2d.default", "aten.linear.default"}
)

# Gives a value of the plan's program by its name.
Read = Callable[[str], Any]


class SourceOps:
    """The ops behind each value of the folded program.

    Args:
        model: whose parameters are read; it is not changed, but for the statistics of batch norms
            in training.
        unfolded: the model, captured.

    Raises:
        InputError: a batch norm that is no module's of torch.
    """

    def __init__(self, model: nn.Module, unfolded: Unfolded) -> None:
        self._model = model
        self._source: Program = unfolded.source
        self._constants = {
            name: tensor
            for name, tensor in unfolded.captured.weights.items()
            if name not in tensors_of(model)
        }
        self._made = {op.name: op for op in self._source.ops}
        self._boundary = {*self._source.inputs, *(o.name for o in unfolded.captured.program.ops)}
        self._of_weights = _weights_only(self._source, self._boundary)
        self._norms = {
            op.name: self._norm_module(op) for op in self._source.ops if op.kind == BATCH_NORM
        }
        self._noise: dict[str, tuple[nn.Module, ...]] = {}
        self._noise_elsewhere = list(unfolded.noise.elsewhere)
        for name, paths in unfolded.noise.modules.items():
            if name in self._made and name not in self._computed_names:
                self._noise[name] = tuple(model.get_submodule(path) for path in paths)
            else:
                self._noise_elsewhere += paths
        self._factors: dict[str, Tensor] = {}
        self._chains: dict[str, tuple[Op, ...]] = {}
        self._weights: dict[str, Tensor] = {}
        self._computed: dict[str, Any] = {}
        self._frozen, self._recording = False, True

    def begin(self, frozen: bool) -> None:
        """Take the parameters as they are now. frozen: batch norms neither use nor keep the
        statistics of this batch, whatever their mode. InputError as `check_noise`."""
        self.check_noise()
        self._weights = tensors_of(self._model)
        self._computed, self._factors, self._frozen = {}, {}, frozen
        for op in self._of_weights:
            made = self._apply(op, self._computed.__getitem__)
            # Captured programs name no device, so what they make of nothing is on the CPU.
            self._computed[op.name] = made.to(self._device) if isinstance(made, Tensor) else made

    def check_noise(self) -> None:
        """Raise InputError for random numbers that are drawn now and multiply no value's own."""
        for path in self._noise_elsewhere:
            if draws(self._model.get_submodule(path)):
                raise InputError(
                    f"the module {path!r} draws random numbers in training for what is read "
                    "without them, too, or is an input or made of parameters alone, which cannot "
                    "be simulated: set its rate to 0"
                )

    @contextmanager
    def recording(self, wanted: bool) -> Iterator[None]:
        """Whether batch norms keep the statistics of what is computed within."""
        before, self._recording = self._recording, wanted
        try:
            yield
        finally:
            self._recording = before

    def end(self) -> None:
        """Forget what `begin` and the ops after it have made."""
        self._weights, self._computed, self._factors = {}, {}, {}

    def chain(self, value: str) -> tuple[Op, ...]:
        """The ops that compute a value of the program from others of it and from weights."""
        if value not in self._chains:
            if value not in self._made:
                raise InputError(
                    f"the value {value!r} of the plan is none that the model computes: it cannot "
                    "be simulated; report the model"
                )
            needed, pending = set(), [value]
            while pending:
                name = pending.pop()
                needed.add(name)
                known = self._boundary | needed | self._computed_names
                pending += [r for r in self._made[name].refs() if r not in known]
            self._chains[value] = tuple(op for op in self._source.ops if op.name in needed)
        return self._chains[value]

    def matrix(self, value: str) -> Op:
        """The convolution or linear among them."""
        (found,) = [op for op in self.chain(value) if op.kind in MATRIX_KINDS]
        return found

    def has_batch_norm(self, value: str) -> bool:
        return any(op.name in self._norms for op in self.chain(value))

    def evaluate(
        self,
        value: str,
        read: Read,
        known: Mapping[str, Any] | None = None,
        *,
        noiseless: bool = False,
    ) -> Any:
        """Compute a value.

        Args:
            read: gives other values of the program.
            known: results of ops of the chain that are not to be computed.
            noiseless: leave it to the caller to call `with_noise` on the value itself.
        """
        inside = dict(known or {})

        def find(name: str) -> Any:
            return inside[name] if name in inside else self._read(name, read)

        for op in self.chain(value):
            if op.name not in inside:
                result = self._apply(op, find)
                kept = noiseless and op.name == value
                inside[op.name] = result if kept else self.with_noise(op.name, result)
        return inside[value]

    def with_noise(self, value: str, result: Any) -> Any:
        """A value's result as dropout and stochastic depth in training leave it.

        The random numbers are drawn once a pass, so they are the same wherever a value is computed
        anew. Result: a tensor where the value has any.
        """
        modules = [module for module in self._noise.get(value, ()) if draws(module)]
        if not modules:
            return result
        if value not in self._factors:
            with torch.no_grad():
                factor = torch.ones_like(result)
                for module in modules:
                    # Of its class: while the model is watched, an instance may have another.
                    factor = type(module).forward(module, factor)
            self._factors[value] = factor
        return result * self._factors[value]

    def arguments(self, op: Op, read: Read) -> tuple[Any, ...]:
        """The arguments of an op of the source."""
        found: tuple[Any, ...] = self._resolve(op.args, lambda name: self._read(name, read))
        return found

    def outputs(self, read: Read) -> Any:
        """The model's outputs."""
        return self._resolve(self._source.outputs, lambda name: self._read(name, read))

    @property
    def _computed_names(self) -> set[str]:
        return {op.name for op in self._of_weights}

    def _read(self, name: str, read: Read) -> Any:
        return self._computed[name] if name in self._computed else read(name)

    def _resolve(self, tree: Any, find: Read) -> Any:
        def resolve(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return find(leaf.name)
            if isinstance(leaf, WeightRef):
                return self._weight(leaf.name)
            return dtype_of(leaf) if isinstance(leaf, Dtype) else leaf

        return map_leaves(tree, resolve)

    def _weight(self, name: str) -> Tensor:
        if name in self._weights:
            return self._weights[name]
        constant = self._constants[name] = self._constants[name].to(self._device)
        return constant

    @property
    def _device(self) -> torch.device:
        return next((w.device for w in self._weights.values()), torch.device("cpu"))

    def _apply(self, op: Op, find: Read) -> Any:
        args = self._resolve(op.args, find)
        if op.name in self._norms:
            return (self._normalised(self._norms[op.name], *args),)
        kwargs = {key: self._resolve(value, find) for key, value in op.kwargs.items()}
        return pure_function(op.kind)(*args, **kwargs)

    def _normalised(self, module: _BatchNorm, x: Tensor, *args: Any) -> Tensor:
        weight, bias, mean, variance, _, eps = args
        batch = module.training and not self._frozen
        if batch and not self._recording:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        momentum = module.momentum
        if batch and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(module.num_batches_tracked)
        return F.batch_norm(x, mean, variance, weight, bias, batch, momentum or 0.0, eps)

    def _norm_module(self, op: Op) -> _BatchNorm:
        mean = op.args[3]
        path = mean.name.rpartition(".")[0] if isinstance(mean, WeightRef) else ""
        module = self._model.get_submodule(path) if path else None
        if not isinstance(module, _BatchNorm) or isinstance(module, nn.SyncBatchNorm):
            raise InputError(
                f"the batch norm {op.name!r} ({path or 'of no module'}) is not one of "
                "torch.nn.BatchNorm2d and its like, so how it trains is not known: use one of "
                "these, or train without a simulation"
            )
        return module


def _weights_only(program: Program, boundary: set[str]) -> tuple[Op, ...]:
    """The ops that read weights alone and are no values of the folded program."""
    known: dict[str, Op] = {}
    for op in program.ops:
        if op.name not in boundary and all(ref in known for ref in op.refs()):
            known[op.name] = op
    return tuple(known.values())
