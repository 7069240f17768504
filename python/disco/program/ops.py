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
    __and__.Scalar __and__.Tensor __lshift__.Scalar __lshift__.Tensor __or__.Scalar
    __or__.Tensor __rshift__.Scalar __rshift__.Tensor __xor__.Scalar __xor__.Tensor
    _adaptive_avg_pool2d.default _log_softmax.default _native_batch_norm_legit.no_stats
    _native_batch_norm_legit_no_training.default _softmax.default _to_copy.default
    _unsafe_view.default _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec
    _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec _upsample_nearest_exact3d.vec
    _weight_norm.default abs.default acos.default acosh.default adaptive_avg_pool1d.default
    adaptive_avg_pool2d.default adaptive_avg_pool3d.default adaptive_max_pool1d.default
    adaptive_max_pool2d.default adaptive_max_pool3d.default add.Scalar add.Tensor
    addbmm.default addcdiv.default addcmul.default addmm.default addmv.default
    affine_grid_generator.default alias.default all.default all.dim amax.default amin.default
    any.default any.dim arange.default arange.start arange.start_step argmax.default
    argmin.default argsort.default argsort.stable asin.default asinh.default atan.default
    atan2.default atanh.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
    baddbmm.default batch_norm.default bilinear.default bitwise_and.Scalar bitwise_and.Tensor
    bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_not.default
    bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor
    bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar bitwise_xor.Tensor bmm.default
    broadcast_tensors.default broadcast_to.default bucketize.Tensor cat.default cdist.default
    ceil.default celu.default channel_shuffle.default chunk.default clamp.Tensor clamp.default
    clamp_max.Tensor clamp_max.default clamp_min.Tensor clamp_min.default clone.default
    col2im.default column_stack.default constant_pad_nd.default contiguous.default
    conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding
    conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input copy.default
    copysign.Scalar copysign.Tensor cos.default cosh.default cosine_similarity.default
    count_nonzero.default count_nonzero.dim_IntList cross.default cross_entropy_loss.default
    cummax.default cummin.default cumprod.default cumsum.default deg2rad.default detach.default
    diag_embed.default diagonal.default diff.default div.Scalar div.Scalar_mode div.Tensor
    div.Tensor_mode dot.default dstack.default einsum.default elu.default embedding.default
    embedding_bag.padding_idx eq.Scalar eq.Tensor erf.default erfc.default erfinv.default
    exp.default exp2.default expand.default expand_as.default expm1.default eye.default eye.m
    fill.Scalar fill.Tensor flatten.using_ints flip.default fliplr.default flipud.default
    float_power.Tensor_Scalar floor.default floor_divide.Scalar floor_divide.default
    fmax.default fmin.default fmod.Scalar fmod.Tensor frac.default frobenius_norm.dim
    full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default
    grid_sampler.default group_norm.default gru.input gt.Scalar gt.Tensor hardshrink.default
    hardsigmoid.default hardswish.default hardtanh.default heaviside.default hstack.default
    huber_loss.default hypot.default im2col.default index.Tensor index_add.default
    index_copy.default index_put.default index_select.default instance_norm.default
    isfinite.default isinf.default isnan.default kthvalue.default l1_loss.default
    layer_norm.default le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor
    lift_fresh_copy.default linalg_vector_norm.default linear.default linspace.default
    log.default log10.default log1p.default log2.default log_sigmoid.default log_softmax.int
    logaddexp.default logcumsumexp.default logical_and.default logical_not.default
    logical_or.default logical_xor.default logit.default logsumexp.default lstm.input lt.Scalar
    lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul.default max.default max.dim
    max.other max_pool1d.default max_pool2d.default max_pool2d_with_indices.default
    max_pool3d.default max_pool3d_with_indices.default max_unpool2d.default
    max_unpool3d.default maximum.default mean.default mean.dim median.default median.dim
    meshgrid.default meshgrid.indexing min.default min.dim min.other minimum.default
    mish.default mm.default movedim.int mse_loss.default mul.Scalar mul.Tensor mv.default
    nan_to_num.default narrow.default native_group_norm.default native_layer_norm.default
    ne.Scalar ne.Tensor neg.default new_full.default new_ones.default new_zeros.default
    norm.Scalar norm.ScalarOpt_dim numpy_T.default one_hot.default ones.default
    ones_like.default outer.default pad.default pairwise_distance.default permute.default
    pixel_shuffle.default pixel_unshuffle.default pow.Scalar pow.Tensor_Scalar
    pow.Tensor_Tensor prelu.default prod.default prod.dim_int rad2deg.default ravel.default
    reciprocal.default reflection_pad1d.default reflection_pad2d.default
    reflection_pad3d.default relu.default relu6.default remainder.Scalar remainder.Tensor
    repeat.default repeat_interleave.Tensor repeat_interleave.self_int
    replication_pad1d.default replication_pad2d.default replication_pad3d.default
    reshape.default rms_norm.default rnn_relu.input rnn_tanh.input roll.default rot90.default
    round.default rsqrt.default rsub.Scalar rsub.Tensor scalar_tensor.default
    scaled_dot_product_attention.default scatter.src scatter.value scatter_add.default
    scatter_reduce.two searchsorted.Tensor select.int select_scatter.default selu.default
    sgn.default sigmoid.default sign.default silu.default sin.default sinc.default sinh.default
    slice.Tensor slice_scatter.default smooth_l1_loss.default softmax.int softplus.default
    softshrink.default sort.default sort.stable split.Tensor split_with_sizes.default
    sqrt.default square.default squeeze.default squeeze.dim squeeze.dims stack.default
    std.correction std.default std.dim std_mean.correction std_mean.dim sub.Scalar sub.Tensor
    sum.default sum.dim_IntList swapaxes.default sym_size.int t.default take_along_dim.default
    tan.default tanh.default tensordot.default threshold.default tile.default to.dtype
    topk.default transpose.int tril.default triu.default trunc.default type_as.default
    unbind.int unflatten.int unfold.default unsafe_chunk.default unsafe_split.Tensor
    unsafe_split_with_sizes.default unsqueeze.default upsample_bicubic2d.default
    upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec
    upsample_linear1d.default upsample_linear1d.vec upsample_nearest1d.default
    upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec
    upsample_nearest3d.default upsample_nearest3d.vec upsample_trilinear3d.default
    upsample_trilinear3d.vec var.correction var.default var.dim var_mean.correction
    var_mean.dim vdot.default view.default vstack.default where.ScalarOther where.ScalarSelf
    where.self xlogy.Tensor zero.default zeros.default zeros_like.default
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
        "disco.payload_scale",
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
    "disco.layer_of_parts": fused.layer_of_parts,
    "disco.linear": fused.linear,
    "disco.channel_affine": fused.channel_affine,
    "disco.group_moments": statistics.group_moments,
    "disco.group_normalize": statistics.group_normalize,
    "disco.moments": statistics.moments,
    "disco.normalize": statistics.normalize,
    "disco.part_of_sum": fused.part_of_sum,
    "disco.sum_of_parts": fused.sum_of_parts,
    "disco.take": fused.take,
    "disco.widen": fused.widen,
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
