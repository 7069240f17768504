"""One rule per op kind. To add one, write a function with `@rule`; import its file here."""

from disco.partition.rules import (
    attention,
    convolution,
    elementwise,
    join,
    matrix,
    norm,
    parts,
    reduction,
    reshape,
    spatial,
)
from disco.partition.rules.registry import Lowering, RuleContext, lower, rule

__all__ = [
    "Lowering",
    "RuleContext",
    "attention",
    "convolution",
    "elementwise",
    "join",
    "lower",
    "matrix",
    "norm",
    "parts",
    "reduction",
    "reshape",
    "rule",
    "spatial",
]
