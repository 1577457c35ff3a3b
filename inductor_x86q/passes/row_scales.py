"""Linears whose input has a scale for each row (token), which the library's kernels do not take.

The sum over products of integers needs no scale. So the kernel gets the rows as they are, with a scale of 1, and what
comes out of it is multiplied by the scale of its row, in the generated kernel of whatever follows. Graphs that torchao's
`quantize_` makes multiply the integers themselves and scale behind; they are brought into the same form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q import _torch, qgraph
from inductor_x86q.passes.normalize import RESHAPES, ROW_MOVEMENTS, keeps_rows
from inductor_x86q.passes.stage import No, Rule

aten = torch.ops.aten
prims = torch.ops.prims

LINEAR = aten.linear.default
INTEGER_PRODUCT = aten._int_mm.default
FILLS = (aten.full.default, aten.full_like.default, aten.new_full.default)


def _uniform_value(node: Any) -> float | None:
    """The number that all elements of a tensor are known to have, None where there is none."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in FILLS:
        fill = node.args[-1]
        return float(fill) if isinstance(fill, (int, float)) else None
    tensor = qgraph.constant(node)
    if tensor is None or not tensor.numel() or bool((tensor != tensor.reshape(-1)[0]).any()):
        return None
    return float(tensor.reshape(-1)[0])


# --- a dequantize per token in front of a linear ----------------------------------------------------------------------


def _find_row_scales(node: fx.Node) -> Any:
    x: Any = node.args[0]
    moves: list[fx.Node] = []
    while isinstance(x, fx.Node) and x.target in ROW_MOVEMENTS and keeps_rows(x):
        moves.insert(0, x)
        x = x.args[0]
    if not isinstance(x, fx.Node) or x.target is not qgraph.DEQUANTIZE_TOKEN:
        return No("its input has no scale for each row")
    arguments = qgraph.schema_arguments(x)
    zero_point = _uniform_value(arguments["zero_points"])
    if zero_point is None or zero_point != round(zero_point):
        return No("its rows differ in zero point")
    if arguments["dtype"] not in qgraph.INT8_TYPES or arguments["output_dtype"] != torch.float32:
        return No(f"it is dequantized from {arguments['dtype']} to {arguments['output_dtype']}")
    shape = [*qgraph.value(x).shape[:-1], 1]
    if not _torch.same_shape(qgraph.value(arguments["scales"]).shape, shape):
        return No("its scales do not stand one to a row")
    low, high = arguments["quant_min"], arguments["quant_max"]
    return qgraph.QParams(1.0, int(zero_point), low, high, arguments["dtype"]), x, moves


def _rewrite_row_scales(node: fx.Node, found: tuple[qgraph.QParams, fx.Node, list[fx.Node]]) -> None:
    """linear(move(scale·(x - zero point)), weight, bias) → move(scale)·linear(move(x) - zero point, weight) + bias"""
    parameters, dequantized, moves = found
    _, weight, bias = (*node.args, None)[:3]
    graph = node.graph
    with graph.inserting_before(node):
        x: Any = dequantized.args[0]
        scales: Any = dequantized.args[1]
        for move in moves:
            x, scales = _moved(x, move, move.args[1:]), _moved(scales, move, _arguments_for_scales(move))
        integers = qgraph.dequantize(graph, x, parameters, torch.float32, like=dequantized)
        product = qgraph.call(graph, LINEAR, (integers, weight), like=node)
        new = qgraph.call(graph, aten.mul.Tensor, (product, _as_float(scales)), like=node)
        if bias is not None:
            new = qgraph.call(graph, aten.add.Tensor, (new, bias), like=node)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _moved(x: fx.Node, move: fx.Node, arguments: tuple[Any, ...]) -> fx.Node:
    return qgraph.call(x.graph, move.target, (x, *arguments), dict(move.kwargs), like=move)  # type: ignore[arg-type]


def _arguments_for_scales(move: fx.Node) -> tuple[Any, ...]:
    """A movement's arguments for a tensor whose last dimension is 1."""
    shape: Any = move.args[1]
    if move.target in RESHAPES:
        return ([*shape[:-1], 1],)
    return tuple(move.args[1:])


def _as_float(scales: fx.Node) -> fx.Node:
    if qgraph.value(scales).dtype == torch.float32:
        return scales
    return qgraph.call(scales.graph, prims.convert_element_type.default, (scales, torch.float32), like=scales)


# --- a product of integers --------------------------------------------------------------------------------------------


def _find_integer_product(node: fx.Node) -> Any:
    product: Any = node.args[0]
    if not isinstance(product, fx.Node) or product.target is not INTEGER_PRODUCT:
        return No("it converts no product of integers")
    if not node.args[1].is_floating_point:  # type: ignore[union-attr]
        return No("the product stays integer")
    weight = qgraph.constant(product.args[1])
    return weight if weight is not None else No("its second factor is not known when compiling")


def _rewrite_integer_product(node: fx.Node, weight: torch.Tensor) -> None:
    """The float of a product of int8 matrices is a linear of dequantized ones whose scales are 1."""
    product: Any = node.args[0]
    graph = node.graph
    rows = qgraph.QParams(1.0, 0, -128, 127, torch.int8)
    matrix = weight.t().contiguous()
    outputs = matrix.shape[0]
    with graph.inserting_before(node):
        x = qgraph.dequantize(graph, product.args[0], rows, torch.float32, like=product)
        constants = (matrix, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64))
        stored = [qgraph.new_constant(graph, tensor, product) for tensor in constants]
        dequantized = qgraph.call(graph, qgraph.DEQUANTIZE_CHANNEL, (*stored, 0, -128, 127, torch.int8), like=product)
        new = qgraph.call(graph, LINEAR, (x, dequantized), like=product)
        if node.args[1] != torch.float32:
            new = qgraph.call(graph, node.target, (new, node.args[1]), like=node)  # type: ignore[arg-type]
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _unscaled(node: Any) -> bool:
    """Whether the node is a linear, read once, of integers with a scale of 1 and a dequantized weight, without bias."""
    if not isinstance(node, fx.Node) or node.target is not LINEAR or len(node.users) != 1:
        return False
    x, weight, bias = (*node.args, None)[:3]
    if bias is not None or not qgraph.is_dequantize(x) or not qgraph.is_dequantize(weight):
        return False
    is_weight = weight.target is qgraph.DEQUANTIZE_CHANNEL and qgraph.constant(weight.args[0]) is not None  # type: ignore[union-attr]
    return is_weight and x.target is qgraph.DEQUANTIZE and qgraph.qparams(x).scale == 1  # type: ignore[union-attr, arg-type]


def _operands(node: fx.Node) -> list[tuple[Any, Any]]:
    return [(node.args[0], node.args[1]), (node.args[1], node.args[0])]


def _find_channel_scales(node: fx.Node) -> Any:
    for source, factor in _operands(node):
        scales = qgraph.constant(factor)
        if scales is None or not isinstance(source, fx.Node):
            continue
        linear: Any = source
        rows: Any = None
        if source.target is aten.mul.Tensor and len(source.users) == 1:
            linear, rows = next((pair for pair in _operands(source) if _unscaled(pair[0])), (None, None))
        if not _unscaled(linear) or qgraph.value(node).dtype != torch.float32:
            continue
        outputs = qgraph.value(linear).shape[-1]  # type: ignore[arg-type]
        is_vector = scales.numel() == 1 or (scales.numel() == outputs and scales.shape[-1] == outputs)
        if is_vector and scales.is_floating_point() and bool((scales > 0).all()) and bool(scales.isfinite().all()):
            return linear, rows, scales.reshape(-1)
    return No("it multiplies no linear of unscaled integers by a constant of each output channel")


def _rewrite_channel_scales(node: fx.Node, found: tuple[fx.Node, Any, torch.Tensor]) -> None:
    """A constant factor of each output channel goes into the weight's scale, past a factor of each row."""
    linear, rows, factor = found
    x, weight = linear.args[:2]
    integers, old, *others = weight.args  # type: ignore[union-attr]
    scale = qgraph.constant(old)
    assert scale is not None
    graph = node.graph
    with graph.inserting_before(node):
        new_scale = qgraph.new_constant(graph, scale.float() * factor.float(), weight)  # type: ignore[arg-type]
        dequantized = qgraph.call(graph, weight.target, (integers, new_scale, *others), like=weight)  # type: ignore[union-attr, arg-type]
        new = qgraph.call(graph, LINEAR, (x, dequantized), like=linear)
        if rows is not None:
            new = qgraph.call(graph, aten.mul.Tensor, (new, rows), like=node)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


# --- one scale after all ----------------------------------------------------------------------------------------------


def _find_one_scale(node: fx.Node) -> Any:
    for linear, factor in _operands(node):
        if _unscaled(linear) and isinstance(factor, fx.Node) and qgraph.constant(factor) is None:
            value = qgraph.value(factor)
            if value.dtype == torch.float32 and all(_torch.known(size == 1) for size in value.shape):
                return linear, factor
    return No("it multiplies no linear of unscaled integers by one number")


def _rewrite_one_scale(node: fx.Node, found: tuple[fx.Node, fx.Node]) -> None:
    """One number that multiplies a linear's result is the scale of its input."""
    linear, factor = found
    x: Any = linear.args[0]
    parameters = qgraph.qparams(x)
    graph = node.graph
    with graph.inserting_before(node):
        scale = qgraph.call(graph, aten.reshape.default, (factor, [1]), like=node)
        zero_point = qgraph.new_constant(graph, torch.tensor([parameters.zero_point]), node)
        computed = qgraph.QParams(scale, zero_point, parameters.quant_min, parameters.quant_max, parameters.dtype)
        dequantized = qgraph.dequantize(graph, x.args[0], computed, torch.float32, like=x)
        new = qgraph.call(graph, LINEAR, (dequantized, linear.args[1]), like=linear)
        if not _torch.same_shape(qgraph.value(new).shape, qgraph.value(node).shape):
            new = qgraph.call(graph, aten.reshape.default, (new, list(qgraph.value(node).shape)), like=node)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


# --- what is left -----------------------------------------------------------------------------------------------------


def _rewrite_quantize(node: fx.Node, found: Any) -> None:
    """Inductor has no lowering for a quantize per token."""
    x, scales, zero_points, low, high, dtype = qgraph.schema_arguments(node).values()

    def call(target: Any, *arguments: Any) -> fx.Node:
        return qgraph.call(node.graph, target, arguments, like=node)

    with node.graph.inserting_before(node):
        value = call(aten.mul.Tensor, x, call(aten.reciprocal.default, scales))
        uniform = _uniform_value(zero_points)
        value = call(aten.round.default, call(aten.add.Tensor, value, zero_points if uniform is None else uniform))
        clipped = call(aten.clamp_max.default, call(aten.clamp_min.default, value, low), high)
        new = call(prims.convert_element_type.default, clipped, dtype)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _rewrite_dequantize(node: fx.Node, found: Any) -> None:
    """Nor for a dequantize per token."""
    x, scales, zero_points, _, _, _, dtype = qgraph.schema_arguments(node).values()

    def call(target: Any, *arguments: Any) -> fx.Node:
        return qgraph.call(node.graph, target, arguments, like=node)

    with node.graph.inserting_before(node):
        wide = call(prims.convert_element_type.default, x, torch.float32)
        value = call(aten.mul.Tensor, call(aten.sub.Tensor, wide, zero_points), scales)
        new = call(prims.convert_element_type.default, value, dtype)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


RULES = (
    Rule("row scales behind a linear", (LINEAR,), _find_row_scales, _rewrite_row_scales),
    Rule("product of integers", (prims.convert_element_type.default,), _find_integer_product, _rewrite_integer_product),
    Rule("channel scales into the weight", (aten.mul.Tensor,), _find_channel_scales, _rewrite_channel_scales),
    Rule("one scale into the input", (aten.mul.Tensor,), _find_one_scale, _rewrite_one_scale),
)
FINISH_RULES = (
    Rule("quantize per token", (qgraph.QUANTIZE_TOKEN,), lambda node: True, _rewrite_quantize),
    Rule("dequantize per token", (qgraph.DEQUANTIZE_TOKEN,), lambda node: True, _rewrite_dequantize),
)
