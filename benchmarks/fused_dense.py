"""The dense model fused as ours is: cuDNN's convolutions with bias, residual and ReLU in them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_RELUS = (F.relu, torch.relu, torch.relu_)
_ADDS = (operator.add, operator.iadd, torch.add)


class FusedConv2d(nn.Module):
    """``relu(conv(x) + residual)``, by one call of cuDNN."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._window = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self._window)
        return torch.cudnn_convolution_add_relu(
            x, self.weight, residual, 1.0, self.bias, *self._window
        )


def fuse_convolutions(traced: nn.Module) -> fx.GraphModule | None:
    """A traced model with batch norms folded, its ReLUs in the convolutions before them, sums in
    between included; None if nothing in it can be. Shares the parameters."""
    if not isinstance(traced, fx.GraphModule):
        return None
    fused = fx.GraphModule(traced, _copy_of(traced.graph))
    modules = dict(fused.named_modules())
    count = 0
    for node in list(fused.graph.nodes):
        if not _is_relu(node, modules):
            continue
        before = node.args[0]
        conv, residual = before, None
        if _calls(before, _ADDS) and len(before.users) == 1 and len(before.args) == 2:
            operands = [a for a in before.args if isinstance(a, fx.Node)]
            convs = [a for a in operands if _is_conv(a, modules) and len(a.users) == 1]
            if len(operands) != 2 or not convs:
                continue
            conv = convs[0]
            (residual,) = [a for a in operands if a is not conv]
        elif not _is_conv(before, modules) or len(before.users) != 1:
            continue
        name = f"fused_{count}"
        fused.add_module(name, FusedConv2d(modules[conv.target]))
        given = (conv.args[0],) if residual is None else (conv.args[0], residual)
        with fused.graph.inserting_before(node):
            new = fused.graph.call_module(name, given)
        node.replace_all_uses_with(new)
        for gone in dict.fromkeys((node, before, conv)):
            fused.graph.erase_node(gone)
        count += 1
    if count == 0:
        return None
    fused.graph.lint()
    fused.recompile()
    return fused


def _copy_of(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _is_conv(node: Any, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(node.target) if _calls_module(node) else None
    return (
        isinstance(module, nn.Conv2d)
        and module.bias is not None
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if _calls_module(node):
        return isinstance(modules.get(str(node.target)), nn.ReLU)
    return _calls(node, _RELUS) or (node.op == "call_method" and node.target in ("relu", "relu_"))


def _calls_module(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module"


def _calls(node: Any, functions: tuple[Any, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions
