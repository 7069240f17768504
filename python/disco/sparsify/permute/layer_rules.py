"""Axes of layers, norms, element-wise ops, reductions and products."""

from __future__ import annotations

from disco.partition.rules.elementwise import BINARY_KINDS, UNARY_KINDS
from disco.program import Op, Ref, WeightRef
from disco.program.ir import Arg
from disco.sparsify.permute.inference import Dims, Inference, axis_rule

_REDUCTIONS = """
    amax.default amin.default linalg_vector_norm.default logsumexp.default mean.default mean.dim
    std.correction std.dim sum.default sum.dim_IntList var.correction var.dim
"""
_SPATIAL = """
    _adaptive_avg_pool2d.default adaptive_avg_pool2d.default avg_pool2d.default max_pool2d.default
    upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default
    upsample_bilinear2d.vec upsample_nearest2d.default upsample_nearest2d.vec
"""


@axis_rule("disco.conv2d")
def conv2d(inference: Inference, op: Op) -> Dims | None:
    """``[B, C, H, W]``; groups stay together, and are alike inside."""
    x, weight, bias, residual = op.args
    groups, axes = op.kwargs["groups"], inference.axes
    if residual is not None or not isinstance(groups, int) or len(inference.dims(x)) != 4:
        return None
    batch, channels = inference.dims(x)[:2]
    out, per_group, *kernel = inference.dims(weight)
    inference.fix((*inference.dims(x)[2:], *kernel), "is of an image")
    if groups == 1:
        inference.unify(channels, per_group, op)
    else:
        group = axes.plain(groups)
        own = axes.plain(axes.size(out) // groups)
        inference.unify(channels, axes.product((group, per_group)), op)
        inference.unify(out, axes.product((group, own)), op)
    if bias is not None:
        inference.unify(inference.dims(bias)[0], out, op)
    return [batch, out, *_of_an_image(inference, op)]


@axis_rule("disco.linear")
def linear(inference: Inference, op: Op) -> Dims | None:
    """``[.., I] -> [.., O]``."""
    x, weight, bias, residual = op.args
    if residual is not None:
        return None
    out, inputs = inference.dims(weight)
    inference.unify(inference.dims(x)[-1], inputs, op)
    if bias is not None:
        inference.unify(inference.dims(bias)[0], out, op)
    return [*inference.dims(x)[:-1], out]


@axis_rule("aten._native_batch_norm_legit_no_training.default")
def batch_norm(inference: Inference, op: Op) -> Dims | None:
    """Everything ``[C]``; the result stands for the first of the tuple."""
    dims = inference.dims(op.args[0])
    for arg in op.args[1:5]:
        for axis in inference.dims(arg):
            inference.unify(axis, dims[1], op)
    return dims


@axis_rule("aten.layer_norm.default", "aten.native_layer_norm.default", "aten.rms_norm.default")
def layer_norm(inference: Inference, op: Op) -> Dims | None:
    """Over the last dimensions, in any order, with weights of their shape."""
    dims, normalized = inference.dims(op.args[0]), op.args[1]
    if not isinstance(normalized, tuple):
        return None
    for arg in (*op.args[2:4], *op.kwargs.values()):
        for axis, own in zip(inference.dims(arg), dims[-len(normalized) :], strict=False):
            inference.unify(axis, own, op)
    return dims


@axis_rule("aten.group_norm.default", "aten.native_group_norm.default")
def group_norm(inference: Inference, op: Op) -> Dims | None:
    """Over whole groups of channels; ``group_norm(x, groups, weight, bias, eps)``."""
    x, groups, *weights = op.args
    dims, axes = inference.dims(x), inference.axes
    if op.kind != "aten.group_norm.default" or not isinstance(groups, int) or op.kwargs:
        return None
    size = axes.size(dims[1])
    if groups > 1:
        split = axes.product((axes.plain(groups), axes.plain(size // groups)))
        inference.unify(dims[1], split, op)
    for arg in weights:
        for axis in inference.dims(arg):
            inference.unify(axis, dims[1], op)
    return dims


@axis_rule("aten.prelu.default")
def prelu(inference: Inference, op: Op) -> Dims | None:
    """A weight for each entry of dim 1, or one for all."""
    dims, weight = inference.dims(op.args[0]), op.args[1]
    if inference.shape(weight) != (1,):
        inference.unify(inference.dims(weight)[0], dims[1], op)
    return dims


@axis_rule("operator.getitem")
def first_of_tuple(inference: Inference, op: Op) -> Dims | None:
    """The result of a norm that returns statistics, too."""
    source = next(op.refs())
    rank = len(inference.shape(Ref(op.name)))
    known = len(inference.dims_of_value[source]) == rank and rank > 0
    return inference.dims_of_value[source] if op.args[1] == 0 and known else None


@axis_rule(*UNARY_KINDS, "aten.dropout.default", "aten.native_dropout.default")
def unary(inference: Inference, op: Op) -> Dims | None:
    """One tensor, entry by entry."""
    tensors = [arg for arg in op.args if isinstance(arg, (Ref, WeightRef))]
    alone = len(tensors) == 1 and tensors[0] == op.args[0]
    same = alone and inference.shape(tensors[0]) == inference.shape(Ref(op.name))
    return inference.dims(tensors[0]) if same else None


@axis_rule(*BINARY_KINDS, "aten.lerp.Tensor", "aten.clamp.Tensor")
def binary(inference: Inference, op: Op) -> Dims | None:
    """Several tensors, entry by entry."""
    if any(isinstance(value, (Ref, WeightRef)) for value in op.kwargs.values()):
        return None
    return inference.broadcast(op, op.args, inference.shape(Ref(op.name)))


@axis_rule("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int")
def softmax(inference: Inference, op: Op) -> Dims | None:
    """Along any dimension the order is that of the input."""
    return inference.dims(op.args[0])


@axis_rule(*(f"aten.{name}" for name in _REDUCTIONS.split()))
def reduction(inference: Inference, op: Op) -> Dims | None:
    """What is summed up may come in any order."""
    dims, shape = inference.dims(op.args[0]), inference.shape(op.args[0])
    position = 2 if op.kind == "aten.linalg_vector_norm.default" else 1
    given = op.args[position] if len(op.args) > position else None
    named: tuple[Arg, ...] = given if isinstance(given, tuple) else (given,)
    numbers = [n % len(dims) for n in named if isinstance(n, int)]
    if op.kind.endswith((".mean.default", ".sum.default")) or given is None or given == ():
        numbers = list(range(len(dims)))
    elif len(numbers) != len(named):
        return None
    result = inference.shape(Ref(op.name))
    left = [axis for dim, axis in enumerate(dims) if dim not in numbers]
    if len(result) == len(left):
        return left
    if len(result) != len(shape):
        return None
    return [inference.fresh((1,))[0] if d in numbers else a for d, a in enumerate(dims)]


@axis_rule("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def matmul(inference: Inference, op: Op) -> Dims | None:
    """``[.., M, K] x [.., K, N]``."""
    a, b = op.args[:2]
    left, right = inference.dims(a), inference.dims(b)
    if min(len(left), len(right)) < 2:
        return None
    inference.unify(left[-1], right[-2], op)
    return [*_batches(inference, op, (a, b)), left[-2], right[-1]]


@axis_rule("aten.scaled_dot_product_attention.default")
def attention(inference: Inference, op: Op) -> Dims | None:
    """``[.., tokens, size]``: heads, tokens and sizes in any order that the operands share."""
    query, key, value, *rest = op.args
    if op.kwargs.get("enable_gqa", False) or len(rest) > 3:
        return None
    q, k, v = (inference.dims(x) for x in (query, key, value))
    if not len(q) == len(k) == len(v):
        return None
    inference.unify(q[-1], k[-1], op)
    inference.unify(k[-2], v[-2], op)
    mask = rest[0] if rest else op.kwargs.get("attn_mask")
    batches = _batches(inference, op, (query, key, value))
    if (len(rest) > 2 and rest[2]) or op.kwargs.get("is_causal", False):
        inference.fix((q[-2], k[-2]), "is of a causal mask")
    scores = (*inference.shape(query)[:-1], inference.shape(key)[-2])
    made = [*batches, q[-2], k[-2]]
    if mask is not None:
        for back, axis in enumerate(reversed(inference.dims(mask)), 1):
            if inference.shape(mask)[-back] == scores[-back]:
                inference.unify(axis, made[-back], op)
    return [*batches, q[-2], v[-1]]


def _batches(inference: Inference, op: Op, operands: tuple[Arg, ...]) -> Dims:
    """The dimensions before the last two, broadcast."""
    shape = inference.shape(Ref(op.name))[:-2]
    made: list[int | None] = [None] * len(shape)
    for arg in operands:
        dims, sizes = inference.dims(arg)[:-2], inference.shape(arg)[:-2]
        for back in range(1, len(dims) + 1):
            if sizes[-back] == 1 and shape[-back] != 1:
                continue
            found = made[-back]
            if found is None:
                made[-back] = dims[-back]
            else:
                inference.unify(found, dims[-back], op)
    return [
        inference.fresh((size,))[0] if axis is None else axis
        for axis, size in zip(made, shape, strict=True)
    ]


@axis_rule("aten.einsum.default")
def einsum(inference: Inference, op: Op) -> Dims | None:
    """A letter is an axis, once an operand."""
    equation, operands = op.args[0], op.args[1]
    if not isinstance(equation, str) or not isinstance(operands, tuple) or "." in equation:
        return None
    given, arrow, result = equation.replace(" ", "").partition("->")
    subscripts = given.split(",")
    if not arrow or any(len(set(s)) != len(s) for s in subscripts):
        return None
    of_letter: dict[str, tuple[int, int | str]] = {}
    for subscript, operand in zip(subscripts, operands, strict=True):
        sized = zip(subscript, inference.dims(operand), inference.shape(operand), strict=True)
        for letter, axis, size in sized:
            before = of_letter.setdefault(letter, (axis, size))
            if before[1] != size:
                return None
            inference.unify(before[0], axis, op)
    return [of_letter[letter][0] for letter in result]


@axis_rule(*(f"aten.{name}" for name in _SPATIAL.split()))
def spatial(inference: Inference, op: Op) -> Dims | None:
    """Channel by channel, over the last two dimensions."""
    dims = inference.dims(op.args[0])
    inference.fix(dims[-2:], "is of an image")
    return [*dims[:-2], *_of_an_image(inference, op)]


@axis_rule("aten.pixel_shuffle.default")
def pixel_shuffle(inference: Inference, op: Op) -> Dims | None:
    """``[B, C * r * r, H, W] -> [B, C, H * r, W * r]``: whole output channels."""
    x, factor = op.args[:2]
    dims, axes = inference.dims(x), inference.axes
    if not isinstance(factor, int) or len(dims) != 4:
        return None
    out = axes.plain(axes.size(dims[1]) // factor**2)
    inside = axes.plain(factor**2, "is of an image")
    inference.unify(dims[1], axes.product((out, inside)), op)
    inference.fix(dims[2:], "is of an image")
    return [dims[0], out, *_of_an_image(inference, op)]


def _of_an_image(inference: Inference, op: Op) -> Dims:
    """Height and width of a result."""
    return inference.fresh(inference.shape(Ref(op.name))[-2:], "is of an image")
