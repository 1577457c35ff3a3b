"""The normalize stage: one spelling for everything that the later stages look for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q import _torch, qgraph
from inductor_x86q.passes.movement import MOVEMENTS, RESHAPES, is_movement
from inductor_x86q.passes.stage import No, Rule

aten = torch.ops.aten
prims = torch.ops.prims

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# --- quantize and dequantize ------------------------------------------------------------------------------------------


def _find_constant_parameters(node: fx.Node) -> Any:
    parameters = qgraph.qparams(node)
    scale, zero_point = (qgraph.constant(p) if isinstance(p, fx.Node) else torch.tensor(p)
                         for p in (parameters.scale, parameters.zero_point))  # fmt: skip
    if scale is None or zero_point is None or scale.numel() != 1 or zero_point.numel() != 1:
        return No("its scale or zero point is computed at run time")
    return float(scale), int(zero_point)


def _rewrite_constant_parameters(node: fx.Node, found: tuple[float, int]) -> None:
    """Tensor parameters that are constants become numbers."""
    parameters = qgraph.qparams(node)
    arguments = (node.args[0], *found, parameters.quant_min, parameters.quant_max, parameters.dtype)
    target = qgraph.QUANTIZE if qgraph.is_quantize(node) else qgraph.DEQUANTIZE
    _replace(node, target, arguments, node.kwargs)


def _find_per_tensor_weight(node: fx.Node) -> Any:
    tensor = qgraph.constant(node.args[0])
    if tensor is None or tensor.dim() < 2:
        return No("it dequantizes no constant")
    return tensor


def _rewrite_per_tensor_weight(node: fx.Node, tensor: torch.Tensor) -> None:
    """A weight with one scale gets that scale for each of its first dimension's elements."""
    parameters = qgraph.qparams(node)
    scale = torch.full((tensor.shape[0],), parameters.scale, dtype=torch.float32)
    zero_point = torch.full((tensor.shape[0],), parameters.zero_point, dtype=torch.int64)
    with node.graph.inserting_before(node):
        scale_node, zero_point_node = (qgraph.new_constant(node.graph, t, node) for t in (scale, zero_point))
    arguments = (
        node.args[0],
        scale_node,
        zero_point_node,
        0,
        parameters.quant_min,
        parameters.quant_max,
        parameters.dtype,
    )
    _replace(node, qgraph.DEQUANTIZE_CHANNEL, arguments, node.kwargs)


def _find_missing_zero_points(node: fx.Node) -> Any:
    parameters = qgraph.qparams(node)
    scale = qgraph.constant(parameters.scale)
    if parameters.zero_point is not None or scale is None:
        return No("it has zero points, or its scales are computed at run time")
    return torch.zeros(scale.shape, dtype=torch.int64)


def _rewrite_missing_zero_points(node: fx.Node, zero_points: torch.Tensor) -> None:
    """A weight without zero points has zeros."""
    with node.graph.inserting_before(node):
        node.update_arg(2, qgraph.new_constant(node.graph, zero_points, node))


def _find_cast(node: fx.Node) -> Any:
    source, dtype = node.args[0], node.args[1]
    if qgraph.is_dequantize(source) and dtype in FLOATS:
        return "dequantize"
    users = list(node.users)
    if users and all(qgraph.is_quantize(user) for user in users) and qgraph.value(source).dtype in FLOATS:  # type: ignore[arg-type]
        return "quantize" if dtype == torch.float32 else No("it rounds before a quantize")
    return No("no dequantize before it, no quantize behind it")


def _rewrite_cast(node: fx.Node, found: str) -> None:
    """A cast behind a dequantize becomes its output type; a widening cast in front of a quantize goes away."""
    source: Any = node.args[0]
    if found == "quantize":
        node.replace_all_uses_with(source)
        qgraph.erase_dead(node)
        return
    with node.graph.inserting_before(node):
        new = qgraph.dequantize(node.graph, source.args[0], qgraph.qparams(source), node.args[1], like=source)  # type: ignore[arg-type]
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _find_constant_view(node: fx.Node) -> Any:
    source: Any = node.args[0]
    if not qgraph.is_dequantize(source):
        return No("its input is not dequantized")
    parameters = qgraph.qparams(source)
    tensor = qgraph.constant(source.args[0])
    if tensor is None or parameters.axis is None:
        return No("it moves no weight")
    scale, zero_point = qgraph.constant(parameters.scale), qgraph.constant(parameters.zero_point)
    if scale is None or zero_point is None or not is_movement(node):
        return No("its scales are computed at run time")
    if len(node.all_input_nodes) > 1:
        return No("its size is not known when compiling")
    if node.target is aten.clone.default:  # moves nothing: what is left of a change of layout
        return tensor.contiguous(), scale, zero_point, parameters.axis
    channel = torch.arange(tensor.shape[parameters.axis])
    shape = [1] * tensor.dim()
    shape[parameters.axis] = -1
    moved_channel = node.target(channel.view(shape).expand(tensor.shape), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    if not moved_channel.numel():
        return No("it leaves no element")
    axis = _varying_axis(moved_channel)
    if axis is None:
        return No("its channels do not stay along one dimension")
    channels = moved_channel.movedim(axis, 0)[(slice(None), *[0] * (moved_channel.dim() - 1))]
    moved = node.target(tensor, *node.args[1:], **node.kwargs).contiguous()  # type: ignore[operator]
    return moved, scale[channels], zero_point[channels], axis


def _varying_axis(tensor: torch.Tensor) -> int | None:
    """The one dimension along which the values differ (0 where none does), None where more than one does."""
    # A dimension that is expanded does not vary; most moves keep it so, and need no look at the values.
    varying = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 and tensor.stride(d) != 0]
    if len(varying) > 1:
        varying = [d for d in varying if not torch.equal(tensor, tensor.narrow(d, 0, 1).expand_as(tensor))]
    return None if len(varying) > 1 or tensor.dim() == 0 else (varying or [0])[0]


def _rewrite_constant_view(node: fx.Node, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> None:
    """A view, slice or permute of a dequantized weight becomes a weight of its own."""
    source: Any = node.args[0]
    tensor, scale, zero_point, axis = found
    parameters = qgraph.qparams(source)
    with node.graph.inserting_before(node):
        nodes = [qgraph.new_constant(node.graph, t, source) for t in (tensor, scale, zero_point)]
    arguments = (*nodes, axis, parameters.quant_min, parameters.quant_max, parameters.dtype)
    _replace(node, qgraph.DEQUANTIZE_CHANNEL, arguments, source.kwargs)


# --- linear -----------------------------------------------------------------------------------------------------------


def _dequantized_matrix(node: Any) -> bool:
    return qgraph.is_dequantize(node) and qgraph.constant(node.args[0]) is not None


def _without_batch(weight: Any) -> Any:
    """The one matrix that is expanded to a batch, whose dimensions may be merged behind; else `weight` itself."""
    source = weight
    while isinstance(source, fx.Node) and source.target in (*RESHAPES, aten.expand.default, aten.clone.default):
        inner: Any = source.args[0]
        if list(qgraph.value(source).shape[-2:]) != list(qgraph.value(inner).shape[-2:]):
            return weight
        source = inner
    return source if source is weight or list(qgraph.value(source).shape[:-2]) in ([], [1]) else weight


def _find_matrix_product(node: fx.Node) -> Any:
    arguments = qgraph.schema_arguments(node)
    x, weight = (
        arguments.get("mat1", arguments.get("batch1", arguments.get("self"))),
        arguments.get("mat2", arguments.get("batch2")),
    )
    bias = arguments["self"] if "beta" in arguments else None
    weight = _without_batch(weight)
    if not _dequantized_matrix(weight):
        return No("its second operand is not a dequantized constant")
    if arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1:
        return No("it scales by alpha or beta")
    parameters = qgraph.qparams(weight)
    tensor = qgraph.constant(weight.args[0])
    assert tensor is not None
    if tensor.dim() == 3 and not torch.equal(tensor, tensor[:1].expand_as(tensor)):
        return No("it multiplies each batch by a matrix of its own")
    if parameters.axis is None:
        return No("its weight's scale is not spelled per channel (yet)")
    if parameters.axis != tensor.dim() - 1 and not _uniform(parameters):
        return No("its weight is quantized along another dimension than that of its outputs")
    return x, weight, bias


def _uniform(parameters: qgraph.QParams) -> bool:
    scale, zero_point = qgraph.constant(parameters.scale), qgraph.constant(parameters.zero_point)
    return bool(scale is not None and zero_point is not None
                and (scale == scale[:1]).all() and (zero_point == zero_point[:1]).all())  # fmt: skip


def _rewrite_matrix_product(node: fx.Node, found: tuple[fx.Node, fx.Node, fx.Node | None]) -> None:
    """mm, addmm, bmm and baddbmm with a dequantized constant become linear."""
    x, weight, bias = found
    parameters = qgraph.qparams(weight)
    tensor, scale, zero_point = (qgraph.constant(n) for n in (weight.args[0], parameters.scale, parameters.zero_point))
    assert tensor is not None and scale is not None and zero_point is not None
    matrix = (tensor[0] if tensor.dim() == 3 else tensor).t().contiguous()
    if parameters.axis != tensor.dim() - 1:
        scale, zero_point = (t[:1].expand(matrix.shape[0]).contiguous() for t in (scale, zero_point))
    graph = node.graph
    with graph.inserting_before(node):
        nodes = [qgraph.new_constant(graph, t, node) for t in (matrix, scale, zero_point)]
        arguments = (*nodes, 0, parameters.quant_min, parameters.quant_max, parameters.dtype)
        new_weight = qgraph.call(graph, qgraph.DEQUANTIZE_CHANNEL, arguments, weight.kwargs, like=weight)
        # A vector of one element is added to each output; the kernels want one for each.
        as_vector = qgraph.constant(bias) is not None and tuple(qgraph.value(bias).shape) == (matrix.shape[0],)  # type: ignore[arg-type]
        new = qgraph.call(graph, aten.linear.default, (x, new_weight, bias if as_vector else None), like=node)
        if bias is not None and not as_vector:
            new = qgraph.call(graph, aten.add.Tensor, (new, bias), like=node)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _last(node: fx.Node, dimension: Any) -> bool:
    """Whether a dimension of the node's first argument is its last."""
    rank = qgraph.value(node.args[0]).dim()  # type: ignore[arg-type]
    return dimension % rank == rank - 1


def keeps_rows(node: fx.Node) -> bool:
    """Whether the node moves whole rows of its first argument: what lies along the last dimension stays together."""
    before, after = qgraph.value(node.args[0]).shape, qgraph.value(node).shape  # type: ignore[arg-type]
    if len(before) < 2 or len(after) < 2 or not _torch.known(before[-1] == after[-1]):
        return False
    arguments: Any = node.args
    if node.target in RESHAPES or node.target is aten.clone.default:
        return True
    if node.target is aten.permute.default:
        return _last(node, arguments[1][-1])
    if node.target is aten.transpose.int:
        return not _last(node, arguments[1]) and not _last(node, arguments[2])
    if node.target in (aten.select.int, aten.slice.Tensor):
        return not _last(node, arguments[1] if len(arguments) > 1 else 0)
    return False


def _find_moved_rows(node: fx.Node) -> Any:
    linear: Any = node.args[0]
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default or len(linear.users) != 1:
        return No("its input is not a linear of one user")
    if not _dequantized_matrix(linear.args[1]):
        return No("the linear is not quantized")
    return linear if keeps_rows(node) else No("it takes rows apart")


def _rewrite_moved_rows(node: fx.Node, linear: fx.Node) -> None:
    """move(linear(x)) → linear(move(x)) where whole rows move: what follows then stands next to the linear."""
    x: Any = linear.args[0]
    arguments: list[Any] = list(node.args[1:])
    if node.target in RESHAPES:
        arguments = [[*list(arguments[0])[:-1], qgraph.value(x).shape[-1]]]
    with node.graph.inserting_before(node):
        moved = qgraph.call(node.graph, node.target, (x, *arguments), dict(node.kwargs), like=linear)  # type: ignore[arg-type]
        new = qgraph.call(node.graph, aten.linear.default, (moved, *linear.args[1:]), like=linear)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _find_view_of_view(node: fx.Node) -> Any:
    source: Any = node.args[0]
    if not isinstance(source, fx.Node):
        return No("it views no tensor")
    if _torch.same_shape(qgraph.value(source).shape, qgraph.value(node).shape):
        return source
    if source.target not in RESHAPES or len(source.users) != 1:
        return No("its input is no view of one user")
    return source.args[0]


def _rewrite_view_of_view(node: fx.Node, source: fx.Node) -> None:
    """A view of a view is a view; a view to the same shape is nothing."""
    if _torch.same_shape(qgraph.value(source).shape, qgraph.value(node).shape):
        node.replace_all_uses_with(source)
        qgraph.erase_dead(node)
    else:
        _replace(node, aten.reshape.default, (source, node.args[1]))


def _find_bias(node: fx.Node) -> Any:
    arguments = qgraph.schema_arguments(node)
    if arguments.get("alpha", 1) != 1:
        return No("it scales by alpha")
    for operator, bias in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if not isinstance(operator, fx.Node) or operator.target is not aten.linear.default or len(operator.users) != 1:
            continue
        tensor = qgraph.constant(bias)
        width = qgraph.value(operator).shape[-1]
        if qgraph.schema_arguments(operator)["bias"] is None and tensor is not None and tensor.numel() == width \
                and tensor.dim() >= 1 and tensor.shape[-1] == width and tensor.dim() <= qgraph.value(operator).dim():  # fmt: skip
            return operator, tensor
    return No("it adds no constant vector to a linear without bias")


def _rewrite_bias(node: fx.Node, found: tuple[fx.Node, torch.Tensor]) -> None:
    """A constant vector added behind a linear becomes its bias."""
    linear, tensor = found
    vector = tensor.detach().reshape(-1)
    with node.graph.inserting_before(node):
        bias = qgraph.new_constant(node.graph, vector, node)
        new = qgraph.call(node.graph, aten.linear.default, (*linear.args[:2], bias), like=linear)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


# --- activations written out ------------------------------------------------------------------------------------------


def _find_clamp(node: fx.Node) -> Any:
    low, high = (qgraph.schema_arguments(node).get(name) for name in ("min", "max"))
    if not qgraph.value(node).dtype.is_floating_point or isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return No("it clips no float tensor by numbers")
    if high is None and low == 0:
        return "relu"
    if low is None or high is None:
        return No("it clips on one side only")
    return low, high


def _rewrite_clamp(node: fx.Node, found: Any) -> None:
    """clamp with both bounds is hardtanh; clamp at 0 from below is relu."""
    if found == "relu":
        _replace(node, aten.relu.default, (node.args[0],))
    else:
        _replace(node, aten.hardtanh.default, (node.args[0], *found))


_GATED = {aten.sigmoid.default: aten.silu.default, aten.hardsigmoid.default: aten.hardswish.default}


def _find_gated(node: fx.Node) -> Any:
    for x, gate in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if isinstance(gate, fx.Node) and gate.target in _GATED and gate.args[0] is x and len(gate.users) == 1:
            return x, _GATED[gate.target]
    return No("it does not multiply a tensor by its own sigmoid or hardsigmoid")


def _rewrite_gated(node: fx.Node, found: Any) -> None:
    """x·sigmoid(x) is silu, x·hardsigmoid(x) is hardswish."""
    x, target = found
    _replace(node, target, (x,))


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
    with node.graph.inserting_before(node):
        new = qgraph.call(node.graph, target, args, dict(kwargs or {}), like=node)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


ROW_MOVEMENTS = (
    *RESHAPES,
    aten.clone.default,
    aten.permute.default,
    aten.transpose.int,
    aten.select.int,
    aten.slice.Tensor,
)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_TENSOR_SPELLINGS = tuple(t for t in (*qgraph.QUANTIZES, *qgraph.DEQUANTIZES) if "tensor" in t._overloadname)

CAST = Rule("cast", (prims.convert_element_type.default,), _find_cast, _rewrite_cast)

RULES = (
    Rule("constant parameters", _TENSOR_SPELLINGS, _find_constant_parameters, _rewrite_constant_parameters),
    Rule("weight with one scale", (qgraph.DEQUANTIZE,), _find_per_tensor_weight, _rewrite_per_tensor_weight),
    Rule(
        "weight without zero points",
        (qgraph.DEQUANTIZE_CHANNEL,),
        _find_missing_zero_points,
        _rewrite_missing_zero_points,
    ),
    CAST,
    Rule("view of a weight", tuple(MOVEMENTS), _find_constant_view, _rewrite_constant_view),
    Rule("matrix product", PRODUCTS, _find_matrix_product, _rewrite_matrix_product),
    Rule("rows moved behind a linear", ROW_MOVEMENTS, _find_moved_rows, _rewrite_moved_rows),
    Rule("view of a view", RESHAPES, _find_view_of_view, _rewrite_view_of_view),
    Rule("bias behind a linear", (aten.add.Tensor,), _find_bias, _rewrite_bias),
    Rule("clamp", (aten.clamp.default, aten.clamp_min.default), _find_clamp, _rewrite_clamp),
    Rule("gated by itself", (aten.mul.Tensor,), _find_gated, _rewrite_gated),
)


def check(graph: fx.Graph) -> None:
    """Constant parameters are numbers, and no cast stands behind a dequantize."""
    for node in graph.nodes:
        if node.target in _TENSOR_SPELLINGS:
            assert isinstance(_find_constant_parameters(node), No), f"{node}: constant parameters as tensors"
        if node.target is prims.convert_element_type.default:
            assert not (qgraph.is_dequantize(node.args[0]) and node.args[1] in FLOATS), f"{node}: cast of a dequantize"
