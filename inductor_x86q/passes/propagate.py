"""The propagate stage: quantize moves up and dequantize moves down, through whatever commutes with them exactly."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from inductor_x86q import qgraph
from inductor_x86q.passes import normalize
from inductor_x86q.passes.movement import JOINS, MOVEMENTS, SPLITS, is_item, is_movement
from inductor_x86q.passes.stage import No, Rule

aten = torch.ops.aten
prims = torch.ops.prims

MAX_POOL = prims._low_memory_max_pool_with_offsets.default
PAD = aten.constant_pad_nd.default


def _per_tensor(node: Any) -> qgraph.QParams | No:
    """The parameters of a dequantize that says the same of every element."""
    if not qgraph.is_dequantize(node):
        return No("its input is not dequantized")
    parameters = qgraph.qparams(node)
    if parameters.axis is not None or parameters.dtype not in qgraph.INT8_TYPES:
        return No("its input is dequantized per channel or not from int8")
    return parameters


# --- dequantize moves down --------------------------------------------------------------------------------------------


def _find_down(node: fx.Node) -> Any:
    return _per_tensor(node.args[0])


def _rewrite_down(node: fx.Node, parameters: qgraph.QParams) -> None:
    """move(dequantize(x)) → dequantize(move(x))"""
    source: Any = node.args[0]
    _replace_by_dequantized(node, (source.args[0], *node.args[1:]), parameters, source)


def _replace_by_dequantized(
    node: fx.Node, arguments: tuple[Any, ...], parameters: qgraph.QParams, source: fx.Node
) -> None:
    with node.graph.inserting_before(node):
        moved = qgraph.call(node.graph, node.target, arguments, dict(node.kwargs), like=node)  # type: ignore[arg-type]
        new = qgraph.dequantize(node.graph, moved, parameters, qgraph.out_dtype(source), like=source)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _rewrite_down_items(node: fx.Node, parameters: qgraph.QParams) -> None:
    """split(dequantize(x))[i] → dequantize(split(x)[i]); the maximum and its index likewise for max pool."""
    source: Any = node.args[0]
    with node.graph.inserting_before(node):
        moved = qgraph.call(node.graph, node.target, (source.args[0], *node.args[1:]), dict(node.kwargs), like=node)  # type: ignore[arg-type]
    for item in list(node.users):
        with node.graph.inserting_before(item):
            new = qgraph.call(node.graph, operator.getitem, (moved, item.args[1]), like=item)
            if node.target is not MAX_POOL or item.args[1] == 0:
                new = qgraph.dequantize(node.graph, new, parameters, qgraph.out_dtype(source), like=source)
        item.replace_all_uses_with(new)
        node.graph.erase_node(item)
    qgraph.erase_dead(node)


def _find_down_join(node: fx.Node) -> Any:
    sources: Any = node.args[0]
    found = [_per_tensor(source) for source in sources]
    for parameters in found:
        if isinstance(parameters, No):
            return parameters
        if not parameters.same_grid(found[0]):  # type: ignore[arg-type]
            return No("its inputs differ in scale or zero point")
    if len({qgraph.out_dtype(source) for source in sources}) > 1:
        return No("its inputs differ in type")
    return _joined(found)  # type: ignore[arg-type]


def _joined(parameters: list[qgraph.QParams]) -> qgraph.QParams:
    """The parameters of tensors of one grid side by side: the widest range."""
    first = parameters[0]
    low, high = min(p.quant_min for p in parameters), max(p.quant_max for p in parameters)
    return qgraph.QParams(first.scale, first.zero_point, low, high, first.dtype)


def _rewrite_down_join(node: fx.Node, parameters: qgraph.QParams) -> None:
    sources: Any = node.args[0]
    _replace_by_dequantized(node, ([s.args[0] for s in sources], *node.args[1:]), parameters, sources[0])


def _find_down_pad(node: fx.Node) -> Any:
    parameters = _per_tensor(node.args[0])
    if isinstance(parameters, No):
        return parameters
    fill = qgraph.schema_arguments(node)["value"]
    if not parameters.is_static or not isinstance(fill, (int, float)):
        return No("its scale or its value is computed at run time")
    integer = fill / parameters.scale + parameters.zero_point
    if integer != round(integer) or not parameters.quant_min <= integer <= parameters.quant_max:
        return No(f"{fill} is not among the numbers that its input can hold")
    return parameters, int(integer)


def _rewrite_down_pad(node: fx.Node, found: tuple[qgraph.QParams, int]) -> None:
    """pad with a value that the integers can express: with zeros, that is the zero point."""
    parameters, integer = found
    source: Any = node.args[0]
    _replace_by_dequantized(node, (source.args[0], node.args[1], integer), parameters, source)


def _find_down_relu(node: fx.Node) -> Any:
    parameters = _per_tensor(node.args[0])
    if isinstance(parameters, No):
        return parameters
    return parameters if parameters.is_static else No("its zero point is computed at run time")


def _rewrite_down_relu(node: fx.Node, parameters: qgraph.QParams) -> None:
    """relu(dequantize(x)) → dequantize(max(x, zero point))"""
    source: Any = node.args[0]
    integers = source.args[0]
    with node.graph.inserting_before(node):
        if parameters.zero_point > parameters.quant_min:
            integers = qgraph.call(node.graph, aten.clamp_min.default, (integers, parameters.zero_point), like=node)
        new = qgraph.dequantize(node.graph, integers, parameters, qgraph.out_dtype(source), like=source)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


# --- quantize moves up ------------------------------------------------------------------------------------------------


def _static(node: fx.Node) -> qgraph.QParams | No:
    parameters = qgraph.qparams(node)
    if parameters.dtype not in qgraph.INT8_TYPES:
        return No(f"it quantizes to {parameters.dtype}")
    return parameters


def _find_up(node: fx.Node) -> Any:
    moved: Any = node.args[0]
    parameters = _static(node)
    if isinstance(parameters, No):
        return parameters
    if is_item(moved) and moved.args[0].target in SPLITS:
        return _find_up_split(moved, parameters)
    if set(moved.users) != {node}:
        return No("what it quantizes is used in float too")
    if moved.target in JOINS:
        return parameters, "join"
    if is_movement(moved) and qgraph.value(moved).dtype.is_floating_point:
        return parameters, "movement"
    return No("what it quantizes is not moved data")


def _find_up_split(item: fx.Node, parameters: qgraph.QParams) -> Any:
    split: Any = item.args[0]
    quantizes = [user for sibling in split.users for user in sibling.users]
    if not all(user.target is qgraph.QUANTIZE and qgraph.qparams(user) == parameters for user in quantizes):
        return No("the parts are not all quantized alike")
    return parameters, "split"


def _rewrite_up(node: fx.Node, found: tuple[qgraph.QParams, str]) -> None:
    """quantize(move(x)) → move(quantize(x))"""
    parameters, kind = found
    moved: Any = node.args[0]
    graph = node.graph
    if kind == "split":
        _rewrite_up_split(moved.args[0], parameters, node)
        return
    with graph.inserting_before(moved):
        if kind == "join":
            first: Any = [qgraph.quantize(graph, x, parameters, like=node) for x in moved.args[0]]
        else:
            first = qgraph.quantize(graph, moved.args[0], parameters, like=node)
    with graph.inserting_before(node):
        new = qgraph.call(graph, moved.target, (first, *moved.args[1:]), dict(moved.kwargs), like=moved)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _rewrite_up_split(split: fx.Node, parameters: qgraph.QParams, like: fx.Node) -> None:
    graph = split.graph
    with graph.inserting_before(split):
        whole = qgraph.quantize(graph, split.args[0], parameters, like=like)  # type: ignore[arg-type]
        parts = qgraph.call(graph, split.target, (whole, *split.args[1:]), dict(split.kwargs), like=split)  # type: ignore[arg-type]
    for item in list(split.users):
        with graph.inserting_before(item):
            part = qgraph.call(graph, operator.getitem, (parts, item.args[1]), like=item)
        for quantize in list(item.users):
            quantize.replace_all_uses_with(part)
            graph.erase_node(quantize)
        graph.erase_node(item)
    qgraph.erase_dead(split)


# --- they meet --------------------------------------------------------------------------------------------------------


def _find_meeting(node: fx.Node) -> Any:
    source: Any = node.args[0]
    before = _per_tensor(source)
    if isinstance(before, No):
        return before
    after = qgraph.qparams(node)
    if not after.same_grid(before):
        return No("it changes scale or zero point: a requantization")
    if qgraph.out_dtype(source) != torch.float32:
        # bf16 holds 8 bits: (integer - zero point) * scale rounded to it quantizes back to the same integer only
        # where scale is a power of two; the reference rounds, so the rounding stays.
        return No("between them the value is rounded to bf16")
    return source.args[0], before, after


def _rewrite_meeting(node: fx.Node, found: tuple[fx.Node, qgraph.QParams, qgraph.QParams]) -> None:
    """quantize(dequantize(x)) on one grid is x, clipped where the second range is narrower."""
    integers, before, after = found
    if after.quant_min > before.quant_min or after.quant_max < before.quant_max:
        with node.graph.inserting_before(node):
            arguments = (integers, after.quant_min, after.quant_max)
            integers = qgraph.call(node.graph, aten.clamp.default, arguments, like=node)
    node.replace_all_uses_with(integers)
    qgraph.erase_dead(node)


RULES = (
    Rule("quantize meets dequantize", (qgraph.QUANTIZE,), _find_meeting, _rewrite_meeting),
    # A cast meets the dequantize only now where data was moved in between.
    normalize.CAST,
    Rule("dequantize below movement", tuple(MOVEMENTS), _find_down, _rewrite_down),
    Rule("dequantize below split", (*SPLITS, MAX_POOL), _find_down, _rewrite_down_items),
    Rule("dequantize below cat", tuple(JOINS), _find_down_join, _rewrite_down_join),
    Rule("dequantize below pad", (PAD,), _find_down_pad, _rewrite_down_pad),
    Rule("dequantize below relu", (aten.relu.default,), _find_down_relu, _rewrite_down_relu),
    Rule("quantize above movement", (qgraph.QUANTIZE,), _find_up, _rewrite_up),
)


def check(graph: fx.Graph) -> None:
    """No operator that only moves data has a dequantized input, and no quantize follows one on the same grid."""
    for node in graph.nodes:
        if node.target in MOVEMENTS or node.target in SPLITS or node.target is MAX_POOL:
            assert isinstance(_find_down(node), No), f"{node}: moves data in float between int8 regions"
        if node.target is qgraph.QUANTIZE:
            assert isinstance(_find_meeting(node), No), f"{node}: quantizes what was just dequantized"
