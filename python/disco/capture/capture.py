"""Capture a model: export it, convert the graph to a program, and run the passes over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from disco.capture.convert import convert
from disco.capture.examples import read_examples
from disco.capture.export import export
from disco.capture.fold_batch_norm import fold_batch_norm
from disco.capture.fold_constants import fold_constants
from disco.capture.fuse import fuse_epilogues, lower_convolutions_and_linears
from disco.capture.noise import Noise, marked_noise, take_out_noise
from disco.capture.on_cpu import on_cpu
from disco.capture.parts import spell_out_parts, spell_out_shuffles
from disco.capture.prune import remove_copies, remove_dead
from disco.capture.views import spell_out_views
from disco.program import Program


class Captured(NamedTuple):
    """A captured model.

    Attributes:
        program: the model's function, folded and fused.
        weights: what the program reads, by name, and under their own names the parameters behind
            folded weights. Unfolded tensors share memory with the model if that is on the CPU.
        origins: for every weight of the program that was folded, the model's parameter behind it.
    """

    program: Program
    weights: dict[str, Tensor]
    origins: dict[str, str]

    def raw_name(self, name: str) -> str:
        """The model's parameter behind a weight of the program."""
        return self.origins.get(name, name)


def capture(
    model: nn.Module,
    example_inputs: Sequence[Any],
    dynamic_batch: bool = True,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_size: bool = False,
) -> Captured:
    """Capture `model` in evaluation mode as a program, batch norms folded and epilogues fused.

    Args:
        model: any module that `torch.export` can export; it is left as it is.
        example_inputs: positional inputs: tensors with the batch first, also in tuples, lists and
            dicts, and constants (None, numbers, strings), which become fixed. Sizes other than the
            batch are fixed by them.
        dynamic_batch: leave the batch size open (1 or more). An example of batch 1 is repeated,
            because a size of 1 would be taken for a constant.
        example_kwargs: inputs by name, like the others.
        dynamic_size: leave height and width of images ``[B, C, H, W]`` open, too.

    Raises:
        InputError: the model cannot be exported (with torch's reason), or the program would need an
            op outside the allow-list.
    """
    exported = _functional(model, example_inputs, dynamic_batch, example_kwargs, dynamic_size)
    return exported.folded()


class Source(NamedTuple):
    """A model's function before anything is folded or fused.

    Attributes:
        program: batch norms and what is computed from weights alone are ops like others. For
            looking at a model, not for running it.
        weights: the tensors that it reads, each by its own name in the model.
    """

    program: Program
    weights: dict[str, Tensor]


class Exported(NamedTuple):
    """A model as `torch.export` gives it, once; what is read from it does not change it.

    Attributes:
        program: the functional graph, as it is.
        weights: what it reads.
    """

    program: Program
    weights: dict[str, Tensor]

    def folded(self) -> Captured:
        """As `capture` gives it."""
        return _folded(self.program, dict(self.weights))

    def source(self) -> Source:
        """As `capture_source` gives it."""
        program = spell_out_views(spell_out_parts(remove_copies(self.program)))
        program = lower_convolutions_and_linears(remove_dead(program))
        program.validate()
        return Source(program, self.weights)


def capture_once(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Exported:
    """What `capture` and `capture_source` both need, for callers that need both.

    Args:
        model, example_inputs, example_kwargs: as for `capture`.

    Raises:
        InputError: as `capture`.
    """
    return _functional(model, example_inputs, True, example_kwargs, False)


class Unfolded(NamedTuple):
    """A captured model, and the same function before anything was folded or fused.

    Attributes:
        captured: as `capture` gives it.
        source: reads the model's own parameters and buffers; what depends on these alone is
            computed by ops, batch norms are ops of their own (in evaluation mode), and so are
            residuals and activations. Every value of `captured.program` is one of `source`, too.
        noise: where training multiplies by random numbers, which is in neither program.
    """

    captured: Captured
    source: Program
    noise: Noise


def capture_unfolded(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Unfolded:
    """Capture `model` as `capture` does with an open batch, keeping what training changes apart.

    Raises:
        InputError: as `capture`.
    """
    with marked_noise(model):
        program, weights = _functional(model, example_inputs, True, example_kwargs, False)
    program, noise = take_out_noise(program)
    source = spell_out_views(spell_out_parts(program))
    source = lower_convolutions_and_linears(remove_dead(spell_out_shuffles(source, weights)))
    return Unfolded(_folded(program, dict(weights)), source, noise)


def capture_source(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Source:
    """The program of `model` before anything is folded or fused, and the tensors that it reads.

    Args:
        model, example_inputs, example_kwargs: as for `capture`.

    Raises:
        InputError: as `capture`.
    """
    return capture_once(model, example_inputs, example_kwargs=example_kwargs).source()


def _functional(
    model: nn.Module,
    example_inputs: Sequence[Any],
    dynamic_batch: bool,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_size: bool,
) -> Exported:
    model, (example_inputs, example_kwargs) = on_cpu(model, (example_inputs, example_kwargs))
    examples = read_examples(model, example_inputs, example_kwargs)
    exported = export(model, examples, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    return Exported(*convert(exported, examples.parameters))


def _folded(program: Program, weights: dict[str, Tensor]) -> Captured:
    """Adds what it folds to ``weights``."""
    origins: dict[str, str] = {}
    program = fold_constants(spell_out_parts(remove_copies(program)), weights)
    program = spell_out_views(program)
    program = remove_dead(spell_out_shuffles(program, weights))
    program = lower_convolutions_and_linears(program)
    program = fold_batch_norm(program, weights, origins)
    program = fuse_epilogues(remove_dead(program))
    program.validate()
    return Captured(program, weights, origins)
