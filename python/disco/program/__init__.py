"""The program IR: what captured models, plans and shards are written in. See `disco.program.ir`."""

from disco.program.buffers import overwritten_residual, plan_buffers
from disco.program.interpret import interpret
from disco.program.ir import (
    PROGRAM_VERSION,
    Arg,
    Dtype,
    Op,
    Output,
    Program,
    Ref,
    ValueInfo,
    WeightRef,
    leaves,
    map_leaves,
)
from disco.program.json_format import program_from_json, program_to_json
from disco.program.ops import is_allowed, pure_function, register_op
from disco.program.precision import lower_precision
from disco.program.ranges import input_ranges
from disco.program.signature import Parameter, Signature, flatten_inputs
from disco.program.symbols import evaluate_dim, evaluate_shape

__all__ = [
    "PROGRAM_VERSION",
    "Arg",
    "Dtype",
    "Op",
    "Output",
    "Parameter",
    "Program",
    "Ref",
    "Signature",
    "ValueInfo",
    "WeightRef",
    "evaluate_dim",
    "evaluate_shape",
    "flatten_inputs",
    "input_ranges",
    "interpret",
    "is_allowed",
    "leaves",
    "lower_precision",
    "map_leaves",
    "overwritten_residual",
    "plan_buffers",
    "program_from_json",
    "program_to_json",
    "pure_function",
    "register_op",
]
