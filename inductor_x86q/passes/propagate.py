"""The propagate stage: quantize moves up and dequantize moves down, through whatever commutes with them exactly."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.operators import (
    JOINS,
    LARGE_MAX_POOLS,
    LOW_MEMORY_MAX_POOL,
    MAX_POOLS,
    MOVEMENTS,
    SPLITS,
    is_item,
    is_movement,
)
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes import transposed_convolution
from inductor_x86q.passes.fuse import pool
from inductor_x86q.passes.normalize import spelling
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten

PAD = aten.constant_pad_nd.default


def _per_tensor(node: fx.Node) -> qdq.QParams | No:
    """The parameters of a dequantize that says the same of every element, and keeps their order."""
    if not qdq.is_dequantize(node):
        return No("its input is not dequantized", (node,))
    parameters = qdq.qparams(node)
    if parameters.axis is not None or parameters.dtype not in qdq.INT8_TYPES:
        return No("its input is dequantized per channel or not from int8", (node,))
    if parameters.is_static and parameters.scale < 0:
        return No(f"its input's scale is {parameters.scale}", (node,))
    return parameters


# --- dequantize moves down --------------------------------------------------------------------------------------------


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors of which the node puts elements into its result."""
    first: Any = node.args[0]
    return first if node.target in JOINS else [first]


def _on(node: fx.Node, tensors: list[fx.Node], *, like: fx.Node) -> fx.Node:
    """A node that moves these tensors as `node` moves its own."""
    moved = tensors if node.target in JOINS else tensors[0]
    return qdq.call(node.target, moved, *node.args[1:], like=like, **node.kwargs)


def _find_down(node: fx.Node) -> qdq.QParams | No:
    tensors, found = _tensors(node), list[qdq.QParams]()
    for tensor in tensors:
        parameters = _per_tensor(tensor)
        if isinstance(parameters, No):
            return parameters
        found.append(parameters)
        if not parameters.same_grid(found[0]):
            return No("its inputs differ in scale or zero point", (tensors[0], tensor))
    if len({qdq.out_dtype(tensor) for tensor in tensors}) > 1:
        return No("its inputs differ in type", tuple(tensors))
    return _joined(found)


def _joined(parameters: list[qdq.QParams]) -> qdq.QParams:
    """The parameters of tensors of one grid side by side: the widest range."""
    low, high = min(p.quant_min for p in parameters), max(p.quant_max for p in parameters)
    return dataclasses.replace(parameters[0], quant_min=low, quant_max=high)


def _rewrite_down(node: fx.Node, parameters: qdq.QParams) -> fx.Node:
    """move(dequantize(x)) → dequantize(move(x))"""
    sources = _tensors(node)
    moved = _on(node, [qdq.operand(source) for source in sources], like=node)
    return qdq.dequantize(moved, parameters, qdq.out_dtype(sources[0]), like=sources[0])


def _rewrite_down_items(node: fx.Node, parameters: qdq.QParams) -> None:
    """split(dequantize(x))[i] → dequantize(split(x)[i]); the maximum and its index likewise for max pool."""
    source = qdq.operand(node)
    moved = _on(node, [qdq.operand(source)], like=node)
    for item in list(node.users):
        with node.graph.inserting_before(item):
            new = qdq.call(operator.getitem, moved, item.args[1], like=item)
            if node.target not in MAX_POOLS or item.args[1] == 0:
                new = qdq.dequantize(new, parameters, qdq.out_dtype(source), like=source)
        item.replace_all_uses_with(new)
        node.graph.erase_node(item)
    qdq.erase_dead(node)


def _find_down_large_pool(node: fx.Node) -> qdq.QParams | No:
    found = _find_down(node)
    if isinstance(found, No):
        return found
    # torch's own integer kernel refuses images of more pixels than the type can count.
    accepted = pool.accepts(node, qdq.operand(qdq.operand(node)))
    return accepted if isinstance(accepted, No) else found


@dataclasses.dataclass(frozen=True)
class _Padding:
    parameters: qdq.QParams
    integer: int  # which stands for the number that is padded with


def _find_down_pad(node: fx.Node) -> _Padding | No:
    parameters = _per_tensor(qdq.operand(node))
    if isinstance(parameters, No):
        return parameters
    fill = qdq.schema_arguments(node)["value"]
    if not parameters.is_static or not isinstance(fill, (int, float)):
        return No("its scale or its value is computed at run time")
    integer = fill / parameters.scale + parameters.zero_point
    if (
        not math.isfinite(integer)
        or integer != round(integer)
        or not parameters.quant_min <= integer <= parameters.quant_max
    ):
        return No(f"{fill} is not among the numbers that its input can hold")
    return _Padding(parameters, int(integer))


def _rewrite_down_pad(node: fx.Node, padding: _Padding) -> fx.Node:
    """pad with a value that the integers can express: with zeros, that is the zero point."""
    source = qdq.operand(node)
    padded = qdq.call(PAD, source.args[0], node.args[1], padding.integer, like=node)
    return qdq.dequantize(padded, padding.parameters, qdq.out_dtype(source), like=source)


def _find_down_relu(node: fx.Node) -> qdq.QParams | No:
    parameters = _per_tensor(qdq.operand(node))
    if isinstance(parameters, No):
        return parameters
    if not parameters.is_static:
        return No("its zero point is computed at run time")
    # Above the range it is no number that the integers could be limited by.
    above = parameters.zero_point > parameters.quant_max
    return No(f"its zero point is {parameters.zero_point}, above its range") if above else parameters


def _rewrite_down_relu(node: fx.Node, parameters: qdq.QParams) -> fx.Node:
    """relu(dequantize(x)) → dequantize(max(x, zero point))"""
    source = qdq.operand(node)
    integers = qdq.operand(source)
    if parameters.zero_point > parameters.quant_min:
        integers = qdq.call(aten.clamp_min.default, integers, parameters.zero_point, like=node)
    return qdq.dequantize(integers, parameters, qdq.out_dtype(source), like=source)


# --- quantize moves up ------------------------------------------------------------------------------------------------


def _find_up(node: fx.Node) -> qdq.QParams | No:
    moved = qdq.operand(node)
    parameters = qdq.qparams(node)
    if parameters.dtype not in qdq.INT8_TYPES:
        return No(f"it quantizes to {parameters.dtype}")
    if is_item(moved) and qdq.operand(moved).target in SPLITS:
        readers = [user for sibling in qdq.operand(moved).users for user in sibling.users]
        other = [user for user in readers if user.target is not qdq.QUANTIZE or qdq.qparams(user) != parameters]
        return No("the parts are not all quantized alike", tuple(other)) if other else parameters
    if others := set(moved.users) - {node}:
        return No("what it quantizes is used in float too", tuple(sorted(others)))
    if moved.target not in JOINS and not is_movement(moved):
        return No("what it quantizes is not moved data", (moved,))
    integers = tuple(x for x in _tensors(moved) if not qdq.value(x).dtype.is_floating_point)
    return No("integers are moved", integers) if integers else parameters


def _rewrite_up(node: fx.Node, parameters: qdq.QParams) -> fx.Node | None:
    """quantize(move(x)) → move(quantize(x))"""
    moved = qdq.operand(node)
    move = qdq.operand(moved) if is_item(moved) else moved
    with node.graph.inserting_before(move):
        new = _on(move, [qdq.quantize(x, parameters, like=node) for x in _tensors(move)], like=move)
    if move is moved:
        return new
    for item in list(move.users):
        for quantize in list(item.users):
            with node.graph.inserting_before(quantize):
                quantize.replace_all_uses_with(qdq.call(operator.getitem, new, item.args[1], like=item))
            qdq.erase_dead(quantize)
    return None


# --- they meet --------------------------------------------------------------------------------------------------------


def _find_meeting(node: fx.Node) -> qdq.QParams | No:
    source = qdq.operand(node)
    before = _per_tensor(source)
    if isinstance(before, No):
        return before
    after = qdq.qparams(node)
    if not after.same_grid(before):
        return No("it changes scale or zero point: a requantization", (source,))
    if qdq.out_dtype(source) != torch.float32:
        # bf16 holds 8 bits: (integer - zero point) * scale rounded to it quantizes back to the same integer only
        # where scale is a power of two; the reference rounds, so the rounding stays.
        return No("between them the value is rounded to bf16", (source,))
    return before


def _rewrite_meeting(node: fx.Node, before: qdq.QParams) -> fx.Node:
    """quantize(dequantize(x)) on one grid is x, clipped where the second range is narrower."""
    integers, after = qdq.operand(qdq.operand(node)), qdq.qparams(node)
    if after.quant_min > before.quant_min or after.quant_max < before.quant_max:
        return qdq.call(aten.clamp.default, integers, after.quant_min, after.quant_max, like=node)
    return integers


RULES = (
    Rule("quantize meets dequantize", (qdq.QUANTIZE,), _find_meeting, _rewrite_meeting),
    # A cast meets the dequantize only now where data was moved in between.
    spelling.CAST,
    Rule("dequantize below movement", (*MOVEMENTS, *JOINS), _find_down, _rewrite_down),
    Rule("dequantize below split", (*SPLITS, LOW_MEMORY_MAX_POOL), _find_down, _rewrite_down_items),
    Rule("dequantize below large max pool", LARGE_MAX_POOLS, _find_down_large_pool, _rewrite_down_items),
    Rule("dequantize below pad", (PAD,), _find_down_pad, _rewrite_down_pad),
    Rule("dequantize below relu", (aten.relu.default,), _find_down_relu, _rewrite_down_relu),
    Rule("quantize above movement", (qdq.QUANTIZE,), _find_up, _rewrite_up),
    # Its input is next to its dequantize only now; what it leaves behind is movement.
    *transposed_convolution.RULES,
)
