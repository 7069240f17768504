"""Capture a model: export it, convert the graph to a program, and run the passes over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from disco.capture.convert import convert
from disco.capture.export import export
from disco.capture.fold_batch_norm import fold_batch_norm
from disco.capture.fold_constants import fold_constants
from disco.capture.fuse import fuse_epilogues, lower_convolutions_and_linears
from disco.capture.on_cpu import on_cpu
from disco.capture.parts import spell_out_parts, spell_out_shuffles
from disco.capture.prune import remove_copies, remove_dead
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
    model: nn.Module, example_inputs: Sequence[Any], dynamic_batch: bool = True
) -> Captured:
    """Capture `model` in evaluation mode as a program, batch norms folded and epilogues fused.

    Args:
        model: any module that `torch.export` can export; it is left as it is.
        example_inputs: positional inputs, tensors with the batch first. Sizes other than the batch
            are fixed by them.
        dynamic_batch: leave the batch size open (1 or more). An example of batch 1 is repeated,
            because a size of 1 would be taken for a constant.

    Raises:
        InputError: the model cannot be exported (with torch's reason), or the program would need an
            op outside the allow-list.
    """
    model, example_inputs = on_cpu(model, example_inputs)
    program, weights = convert(export(model, example_inputs, dynamic_batch))
    origins: dict[str, str] = {}
    program = fold_constants(remove_copies(program), weights)
    program = spell_out_parts(program)
    program = remove_dead(spell_out_shuffles(program, weights))
    program = lower_convolutions_and_linears(program)
    program = fold_batch_norm(program, weights, origins)
    program = fuse_epilogues(remove_dead(program))
    program.validate()
    return Captured(program, weights, origins)
