"""The allow-list: the operations that a program may name, and the pure function behind each.

Captured models use functional ATen ops, Python arithmetic on sizes, and after fusion the ops of
`disco.program.fused`. A file can only name what is listed here; a user extends the list in code
with `register_op`. An op with no function of its own (`EXECUTOR_KINDS`) belongs to a rank's program
and is understood by the executor alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from disco.errors import InputError
from disco.program import fused, statistics

Function = Callable[..., Any]

_ATEN_NAMES = """
    _log_softmax.default _native_batch_norm_legit.no_stats
    _native_batch_norm_legit_no_training.default _softmax.default
    _to_copy.default _unsafe_view.default abs.default adaptive_avg_pool1d.default
    adaptive_avg_pool2d.default adaptive_max_pool2d.default add.Scalar add.Tensor
    addcmul.default addmm.default alias.default amax.default amin.default any.dim arange.default
    arange.start arange.start_step argmax.default avg_pool1d.default avg_pool2d.default
    avg_pool3d.default baddbmm.default batch_norm.default bitwise_and.Tensor bitwise_not.default
    bitwise_or.Tensor bmm.default cat.default ceil.default chunk.default clamp.default
    clamp_max.default clamp_min.default clone.default col2im.default constant_pad_nd.default
    contiguous.default copy.default
    conv1d.default conv2d.default conv2d.padding conv3d.default conv_transpose1d.default
    conv_transpose2d.input conv_transpose3d.input cos.default cumsum.default detach.default
    div.Scalar div.Tensor div.Tensor_mode einsum.default elu.default embedding.default eq.Scalar
    eq.Tensor erf.default exp.default expand.default expand_as.default expm1.default fill.Scalar
    fill.Tensor flatten.using_ints flip.default floor.default floor_divide.default full.default
    full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default
    grid_sampler.default group_norm.default gt.Scalar gt.Tensor hardsigmoid.default
    hardswish.default hardtanh.default im2col.default index.Tensor index_select.default
    instance_norm.default layer_norm.default le.Scalar le.Tensor leaky_relu.default lerp.Scalar
    lift_fresh_copy.default linalg_vector_norm.default linear.default log.default log1p.default
    log_softmax.int logical_and.default logical_not.default logical_or.default lt.Scalar
    lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul.default max.dim max_pool1d.default
    max_pool2d.default max_pool3d.default maximum.default mean.default mean.dim min.dim
    minimum.default mish.default mm.default movedim.int mul.Scalar mul.Tensor narrow.default
    native_group_norm.default native_layer_norm.default ne.Scalar ne.Tensor neg.default
    new_full.default new_ones.default new_zeros.default norm.ScalarOpt_dim ones.default
    ones_like.default pad.default permute.default pixel_shuffle.default pixel_unshuffle.default
    pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default reciprocal.default
    reflection_pad2d.default relu.default relu6.default repeat.default
    repeat_interleave.Tensor repeat_interleave.self_int replication_pad2d.default
    reshape.default roll.default round.default rsqrt.default rsub.Scalar rsub.Tensor
    scalar_tensor.default scaled_dot_product_attention.default select.int select_scatter.default
    selu.default sigmoid.default sign.default silu.default sin.default slice.Tensor
    slice_scatter.default softmax.int softplus.default split.Tensor split_with_sizes.default
    sqrt.default squeeze.default squeeze.dim squeeze.dims stack.default std.correction std.dim
    sub.Scalar sub.Tensor sum.default sum.dim_IntList sym_size.int t.default tan.default
    tanh.default to.dtype topk.default transpose.int tril.default triu.default type_as.default
    unbind.int unflatten.int unfold.default unsqueeze.default upsample_bicubic2d.vec
    upsample_bilinear2d.default upsample_bilinear2d.vec upsample_nearest2d.default
    upsample_nearest2d.vec var.correction var.dim view.default where.ScalarOther where.ScalarSelf
    where.self zero.default zeros.default zeros_like.default
"""
_ATEN = frozenset("aten." + name for name in _ATEN_NAMES.split())

_PYTHON: dict[str, Function] = {
    "operator.getitem": operator.getitem,
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.truediv": operator.truediv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
    "math.ceil": lambda value: -int(-value // 1),
    "math.floor": lambda value: int(value // 1),
}

# Views were captured from contiguous tensors. Programs run in other layouts (channels last), where
# the same view may need a copy; reshape is the view where there is one and the copy where not.
_RESHAPED = ("aten.view.default", "aten._unsafe_view.default")

EXECUTOR_KINDS = frozenset(
    {
        "disco.empty",
        "disco.exchange",
        "disco.assemble",
        "disco.partial_conv2d",
        "disco.partial_linear",
        "disco.gather_conv2d",
        "disco.gather_linear",
    }
)

_functions: dict[str, Function] = {
    **_PYTHON,
    "disco.add_partial_sums": fused.add_partial_sums,
    "disco.conv2d": fused.conv2d,
    "disco.linear": fused.linear,
    "disco.channel_affine": fused.channel_affine,
    "disco.group_moments": statistics.group_moments,
    "disco.group_normalize": statistics.group_normalize,
    "disco.moments": statistics.moments,
    "disco.normalize": statistics.normalize,
    "disco.part_of_sum": fused.part_of_sum,
    "disco.sum_of_parts": fused.sum_of_parts,
    "disco.take": fused.take,
}


def register_op(kind: str, function: Function) -> None:
    """Allow `kind` in programs of this process.

    Args:
        kind: a dotted name that is not taken, e.g. ``"mymodel.my_op.default"``.
        function: pure: no side effect, no randomness, fresh results, tensors and numbers only.
    """
    if is_allowed(kind):
        raise InputError(f"op {kind!r} is registered already; choose another name")
    _functions[kind] = function


def is_allowed(kind: str) -> bool:
    """True if a program may name this op."""
    return kind in _functions or kind in _ATEN or kind in EXECUTOR_KINDS


def check_allowed(kind: str, name: str) -> None:
    """Raise InputError unless a program may name this op; `name` is the value it computes."""
    if not is_allowed(kind):
        raise InputError(
            f"op {kind!r} (value {name!r}) is not in the allow-list; if it is a pure function, "
            f"allow it in code with disco.program.register_op({kind!r}, function)"
        )


def pure_function(kind: str) -> Function:
    """The function behind an allowed op; InputError for any other."""
    found = _functions.get(kind)
    if found is None:
        if kind in EXECUTOR_KINDS:
            raise InputError(f"op {kind!r} belongs to a rank's program; run that with an Executor")
        check_allowed(kind, kind)
        found = _functions[kind] = _aten_function(kind)
    return found


def _aten_function(kind: str) -> Function:
    if kind in _RESHAPED:
        kind = "aten.reshape.default"
    if kind == "aten.sym_size.int":
        return Tensor.size  # without the dispatcher, which knows no more
    _, name, overload = kind.split(".")
    function: Function = getattr(getattr(torch.ops.aten, name), overload)
    return function
