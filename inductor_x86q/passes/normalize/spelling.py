"""Rules of the normalize stage: q/dq nodes, weights, linears and activations get the one spelling that later stages look for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import layers, operators, qdq, weights
from inductor_x86q.graph.operators import CONVERT, MOVEMENTS, PRODUCTS, RESHAPES, ROW_MOVEMENTS
from inductor_x86q.graph.reasons import No
from inductor_x86q.graph.weights import Weight
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# --- quantize and dequantize ------------------------------------------------------------------------------------------


def _find_constant_parameters(node: fx.Node) -> qdq.QParams | No:
    parameters = qdq.qparams(node)
    scale, zero_point = (qdq.constant(p) if isinstance(p, fx.Node) else torch.tensor(p)
                         for p in (parameters.scale, parameters.zero_point))  # fmt: skip
    if scale is None or zero_point is None or scale.numel() != 1 or zero_point.numel() != 1:
        return No("its scale or zero point is computed at run time", tuple(node.all_input_nodes[1:]))
    return dataclasses.replace(parameters, scale=float(scale), zero_point=int(zero_point))


def _rewrite_constant_parameters(node: fx.Node, parameters: qdq.QParams) -> fx.Node:
    """Tensor parameters that are constants become numbers."""
    if qdq.is_quantize(node):
        return qdq.quantize(node.args[0], parameters, like=node)
    return qdq.dequantize(node.args[0], parameters, qdq.out_dtype(node), like=node)


def _find_short_weight(node: fx.Node) -> Weight | No:
    tensor, parameters = qdq.constant(node.args[0]), qdq.qparams(node)
    if tensor is None or tensor.dim() < 2:
        return No("it dequantizes no weight")
    if parameters.axis is not None and parameters.zero_point is not None:
        return No("it has a scale and a zero point for each channel")
    scale = torch.tensor(parameters.scale) if parameters.axis is None else qdq.constant(parameters.scale)
    if scale is None:
        return No("its scales are computed at run time")
    axis = parameters.axis or 0
    zero_points = torch.full(tensor.shape[axis : axis + 1], parameters.zero_point or 0)
    others = (axis, parameters.quant_min, parameters.quant_max, parameters.dtype, qdq.out_dtype(node))
    return Weight(tensor, scale.expand(zero_points.shape), zero_points, *others)


def _rewrite_weight(node: fx.Node, weight: Weight) -> fx.Node:
    """A weight with one scale, without zero points, or moved: one with a scale and a zero point for each channel."""
    return weights.emit(weight, like=node)


def _find_cast(node: fx.Node) -> fx.Node | No:
    source, dtype = qdq.operand(node), node.args[1]
    if qdq.is_dequantize(source) and dtype in FLOATS:
        return source
    users = tuple(node.users)
    if users and all(qdq.is_quantize(user) for user in users) and qdq.value(source).dtype in FLOATS:
        return source if dtype == torch.float32 else No("it rounds before a quantize", users)
    return No("no dequantize before it, no quantize behind it", (source, *users))


def _rewrite_cast(node: fx.Node, source: fx.Node) -> fx.Node:
    """A cast behind a dequantize becomes its output type; a widening cast in front of a quantize goes away."""
    if not qdq.is_dequantize(source):
        return source
    return qdq.dequantize(source.args[0], qdq.qparams(source), qdq.value(node).dtype, like=source)


def _find_constant_view(node: fx.Node) -> Weight | No:
    weight = weights.read(node.args[0])
    if weight is None:
        return No("it moves no weight", tuple(node.all_input_nodes[:1]))
    if len(node.all_input_nodes) > 1:
        return No("its size is not known when compiling", tuple(node.all_input_nodes[1:]))
    if node.target is aten.clone.default:  # moves nothing: what is left of a change of layout
        return weight
    channel = torch.arange(weight.integers.shape[weight.axis])
    shape = [1] * weight.integers.dim()
    shape[weight.axis] = -1
    moved_channel = _moved(node, channel.view(shape).expand(weight.integers.shape))
    if not moved_channel.numel():
        return No("it leaves no element")
    axis = _varying_axis(moved_channel)
    if axis is None:
        return No("its channels do not stay along one dimension")
    channels = moved_channel.movedim(axis, -1).reshape(-1, moved_channel.shape[axis])[0]
    scale, zero_point = weight.scale[channels], weight.zero_point[channels]
    moved = _moved(node, weight.integers)
    return dataclasses.replace(weight, integers=moved, scale=scale, zero_point=zero_point, axis=axis)


def _moved(move: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
    return qdq.evaluate(move, tensor, *move.args[1:], **move.kwargs)


def _varying_axis(tensor: torch.Tensor) -> int | None:
    """The one dimension along which the values differ (0 where none does), None where more than one does."""
    # A dimension that is expanded does not vary; most moves keep it so, and need no look at the values.
    varying = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 and tensor.stride(d) != 0]
    if len(varying) > 1:
        varying = [d for d in varying if not torch.equal(tensor, tensor.narrow(d, 0, 1).expand_as(tensor))]
    return None if len(varying) > 1 or tensor.dim() == 0 else (varying or [0])[0]


# --- linear -----------------------------------------------------------------------------------------------------------


def _without_batch(weight: fx.Node) -> fx.Node:
    """The one matrix that is expanded to a batch, whose dimensions may be merged behind; else `weight` itself."""
    source = weight
    while source.target in (*RESHAPES, aten.expand.default, aten.clone.default):
        inner = qdq.operand(source)
        if list(qdq.value(source).shape[-2:]) != list(qdq.value(inner).shape[-2:]):
            return weight
        source = inner
    return source if source is weight or list(qdq.value(source).shape[:-2]) in ([], [1]) else weight


@dataclasses.dataclass(frozen=True)
class _Product:
    x: fx.Node
    weight: Weight
    bias: fx.Node | None


def _find_matrix_product(node: fx.Node) -> _Product | No:
    arguments = qdq.schema_arguments(node)
    x, factor = operators.factors(node)
    weight = weights.read(_without_batch(factor))
    if weight is None:
        return No("its second operand is not a dequantized constant", (factor,))
    if arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1:
        return No("it scales by alpha or beta")
    matrix, axis = weight.integers, weight.axis
    if matrix.dim() == 3 and not torch.equal(matrix, matrix[:1].expand_as(matrix)):
        return No("it multiplies each batch by a matrix of its own")
    if axis != matrix.dim() - 1 and not weight.has_one_grid:
        return No("its weight is quantized along another dimension than that of its outputs")
    return _Product(x, weight, arguments["self"] if "beta" in arguments else None)


def _rewrite_matrix_product(node: fx.Node, product: _Product) -> fx.Node:
    """mm, addmm, bmm and baddbmm with a dequantized constant become linear."""
    weight, bias = product.weight, product.bias
    matrix = weight.integers[(0,) * (weight.integers.dim() - 2)].t()
    outputs = matrix.shape[:1]
    scale, zero_point = weight.scale, weight.zero_point
    if weight.has_one_grid:
        scale, zero_point = scale[:1].expand(outputs), zero_point[:1].expand(outputs)
    transposed = dataclasses.replace(weight, integers=matrix, scale=scale, zero_point=zero_point, axis=0)
    # A vector of one element is added to each output; the kernels want one for each.
    as_vector = qdq.constant(bias) is not None and qdq.value(bias).shape == outputs
    new_weight = weights.emit(transposed, like=node)
    new = qdq.call(aten.linear.default, product.x, new_weight, bias if as_vector else None, like=node)
    return new if bias is None or as_vector else qdq.call(aten.add.Tensor, new, bias, like=node)


def keeps_rows(node: fx.Node) -> bool:
    """Whether one of ROW_MOVEMENTS moves whole rows: what lies along its argument's last dimension stays together."""
    before, after = qdq.value(node.args[0]).shape, qdq.value(node).shape
    if not before or len(after) < 2 or not fake_tensors.known(before[-1] == after[-1]):
        return False
    arguments, last = qdq.schema_arguments(node), len(before) - 1
    if node.target is aten.permute.default:
        return arguments["dims"][-1] % len(before) == last
    return "dim" not in arguments or arguments["dim"] % len(before) != last


def move_rows(x: fx.Node, move: fx.Node) -> fx.Node:
    """`x`, whose rows may be of another length, with its rows moved as `move` moves those of its first argument."""
    arguments: Any = move.args[1:]
    if move.target in RESHAPES:
        arguments = ([*arguments[0][:-1], qdq.value(x).shape[-1]],)
    return qdq.call(move.target, x, *arguments, like=move, **move.kwargs)


def _find_moved_rows(node: fx.Node) -> fx.Node | No:
    linear = qdq.operand(node)
    if linear.target is not aten.linear.default or len(linear.users) != 1:
        return No("its input is not a linear of one user", (linear,))
    if weights.read(linear.args[1]) is None:
        return No("the linear is not quantized", (linear,))
    return linear if keeps_rows(node) else No("it takes rows apart")


def _rewrite_moved_rows(node: fx.Node, linear: fx.Node) -> fx.Node:
    """move(linear(x)) → linear(move(x)) where whole rows move: what follows then stands next to the linear."""
    moved = move_rows(qdq.operand(linear), node)
    return qdq.call(aten.linear.default, moved, *linear.args[1:], like=linear)


def _find_view_of_view(node: fx.Node) -> fx.Node | No:
    source = qdq.operand(node)
    if fake_tensors.same_shape(qdq.value(source).shape, qdq.value(node).shape):
        return source
    if source.target not in RESHAPES or len(source.users) != 1:
        return No("its input is no view of one user", (source,))
    return qdq.operand(source)


def _rewrite_view_of_view(node: fx.Node, source: fx.Node) -> fx.Node:
    """A view of a view is a view; a view to the same shape is nothing."""
    if fake_tensors.same_shape(qdq.value(source).shape, qdq.value(node).shape):
        return source
    return qdq.call(aten.reshape.default, source, node.args[1], like=node)


@dataclasses.dataclass(frozen=True)
class _Bias:
    linear: fx.Node
    vector: torch.Tensor


def _find_bias(node: fx.Node) -> _Bias | No:
    if qdq.schema_arguments(node).get("alpha", 1) != 1:
        return No("it scales by alpha")
    for linear, bias in qdq.operands(node):
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default or len(linear.users) != 1:
            continue
        tensor, shape = qdq.constant(bias), qdq.value(linear).shape
        if tensor is None or layers.read(linear).bias is not None:
            continue
        if 1 <= tensor.dim() <= len(shape) and tensor.numel() == tensor.shape[-1] == shape[-1]:
            return _Bias(linear, tensor)
    return No("it adds no constant vector to a linear without bias")


def _rewrite_bias(node: fx.Node, found: _Bias) -> fx.Node:
    """A constant vector added behind a linear becomes its bias."""
    bias = qdq.new_constant(found.vector.detach().reshape(-1), like=node)
    return qdq.call(aten.linear.default, *found.linear.args[:2], bias, like=found.linear)


# --- pools ------------------------------------------------------------------------------------------------------------


def _find_average_of_all(node: fx.Node) -> list[int] | No:
    arguments, dimensions = qdq.schema_arguments(node), operators.image_dimensions(node)
    window, padding = (layers.full(arguments[name], dimensions) for name in ("kernel_size", "padding"))
    images, divisor = qdq.value(arguments["self"]).shape[-dimensions:], arguments["divisor_override"]
    if not fake_tensors.same_shape(images, window) or any(padding) or divisor is not None:
        return No("its window is not the whole image")
    return list(range(-dimensions, 0))


def _rewrite_average_of_all(node: fx.Node, dimensions: list[int]) -> fx.Node:
    """An average pool whose window is the whole image is a mean, of which Inductor makes one kernel with its q/dq."""
    return qdq.call(aten.mean.dim, node.args[0], dimensions, True, like=node)


# --- convolutions -----------------------------------------------------------------------------------------------------


def _find_single_column(node: fx.Node) -> int | No:
    """How many columns of its input it reads; one that it does not read, where padding is all it reads."""
    layer = layers.read(node)
    _, inputs, *kernel = qdq.value(layer.weight).shape
    geometry = layer.geometry
    if geometry is None or inputs != 1 or geometry.stride[-1] == 1 or layer.transposed:
        return No("it has several input channels a group, or no stride along its rows")
    if fake_tensors.guarded(qdq.value(node).shape[-1] > 1):
        return No("it gives more than one column")
    return max(geometry.dilation[-1] * (kernel[-1] - 1) + 1 - geometry.padding[-1], 1)


def _rewrite_single_column(node: fx.Node, columns: int) -> fx.Node:
    """A stride along rows that give one column means nothing, and oneDNN gives wrong numbers then, int8 and float32."""
    x, weight, bias, stride, *others = node.args
    last = qdq.value(node).dim() - 1
    stride = [*layers.full(stride, last - 1)[:-1], 1]
    read = qdq.call(aten.slice.Tensor, x, last, 0, columns, like=node)
    new = qdq.call(node.target, read, weight, bias, stride, *others, like=node)
    return qdq.call(aten.slice.Tensor, new, last, 0, 1, like=node)


# --- activations written out ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Activation:
    operator: Any
    arguments: tuple[Any, ...]


def _find_clamp(node: fx.Node) -> _Activation | No:
    low, high = (qdq.schema_arguments(node).get(name) for name in ("min", "max"))
    if not qdq.value(node).dtype.is_floating_point or isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return No("it clips no float tensor by numbers")
    if high is None and low == 0:
        return _Activation(aten.relu.default, node.args[:1])
    if low is None or high is None:
        return No("it clips on one side only")
    # Of bounds in the wrong order clamp gives the upper one, and kernels refuse them.
    return _Activation(aten.hardtanh.default, (node.args[0], min(low, high), high))


_GATED = {aten.sigmoid.default: aten.silu.default, aten.hardsigmoid.default: aten.hardswish.default}


def _find_gated(node: fx.Node) -> _Activation | No:
    """x·sigmoid(x) is silu, x·hardsigmoid(x) is hardswish."""
    for x, gate in qdq.operands(node):
        if isinstance(gate, fx.Node) and gate.target in _GATED and gate.args[0] is x and len(gate.users) == 1:
            return _Activation(_GATED[gate.target], (x,))
    return No("it does not multiply a tensor by its own sigmoid or hardsigmoid")


def _rewrite_activation(node: fx.Node, found: _Activation) -> fx.Node:
    return qdq.call(found.operator, *found.arguments, like=node)


def _find_expand(node: fx.Node) -> fx.Node | No:
    x = qdq.operand(node)
    same = fake_tensors.same_shape(qdq.value(x).shape, qdq.value(node).shape)
    return x if same else No("it repeats elements")


def _rewrite_expand(node: fx.Node, x: fx.Node) -> fx.Node:
    """An expand to the shape that there is, as products of batches have it, goes away."""
    return x


_TENSOR_SPELLINGS = tuple(t for t in (*qdq.QUANTIZES, *qdq.DEQUANTIZES) if "tensor" in t._overloadname)

CAST = Rule("cast", (CONVERT,), _find_cast, _rewrite_cast)

RULES = (
    Rule("constant parameters", _TENSOR_SPELLINGS, _find_constant_parameters, _rewrite_constant_parameters),
    Rule("weight spelled short", (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL), _find_short_weight, _rewrite_weight),
    CAST,
    Rule("view of a weight", MOVEMENTS, _find_constant_view, _rewrite_weight),
    Rule("matrix product", PRODUCTS, _find_matrix_product, _rewrite_matrix_product),
    Rule("rows moved behind a linear", ROW_MOVEMENTS, _find_moved_rows, _rewrite_moved_rows),
    Rule("expand of nothing", (aten.expand.default,), _find_expand, _rewrite_expand),
    Rule("view of a view", RESHAPES, _find_view_of_view, _rewrite_view_of_view),
    Rule("bias behind a linear", (aten.add.Tensor,), _find_bias, _rewrite_bias),
    Rule(
        "average of a whole image",
        (aten.avg_pool2d.default, aten.avg_pool3d.default),
        _find_average_of_all,
        _rewrite_average_of_all,
    ),
    Rule("stride of one column", (aten.convolution.default,), _find_single_column, _rewrite_single_column),
    Rule("clamp", (aten.clamp.default, aten.clamp_min.default), _find_clamp, _rewrite_activation),
    Rule("gated by itself", (aten.mul.Tensor,), _find_gated, _rewrite_activation),
)
