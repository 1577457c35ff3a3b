"""The finish stage: what no kernel took becomes plain Inductor input again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q import _torch, qgraph
from inductor_x86q.passes import row_scales
from inductor_x86q.passes.fuse import half
from inductor_x86q.passes.stage import No, Rule

aten = torch.ops.aten
prims = torch.ops.prims


def _find_converted_constant(node: fx.Node) -> Any:
    tensor = qgraph.constant(node.args[0])
    if tensor is None:
        return No("it converts no constant")
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: qgraph.constant(n))
    return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _rewrite_converted_constant(node: fx.Node, tensor: torch.Tensor) -> None:
    """A weight that stays in float is dequantized (or widened) now, once, not at every call."""
    with node.graph.inserting_before(node):
        new = qgraph.new_constant(node.graph, tensor, node)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _decompose(node: fx.Node, found: Any) -> None:
    _torch.decompose_node(node.graph.owning_module, node)  # type: ignore[arg-type]


def _find_float16_quantize(node: fx.Node) -> Any:
    source: Any = node.args[0]
    return source if qgraph.value(source).dtype == torch.float16 else No("it quantizes no float16")


def _rewrite_float16_quantize(node: fx.Node, source: fx.Node) -> None:
    """quantize(fp16) → quantize(fp32(fp16)): Inductor's lowering takes float32 and bfloat16 only."""
    with node.graph.inserting_before(node):
        wide = qgraph.call(node.graph, prims.convert_element_type.default, (source, torch.float32), like=node)
    node.update_arg(0, wide)


def _rewrite_computed_quantize(node: fx.Node, found: Any) -> None:
    """A quantize by computed parameters is written out: Inductor's lowering of it forgets quant_min and quant_max."""
    x, scale, zero_point, low, high, dtype = qgraph.schema_arguments(node).values()

    def call(target: Any, *arguments: Any) -> fx.Node:
        return qgraph.call(node.graph, target, arguments, like=node)

    with node.graph.inserting_before(node):
        inverse = call(aten.reciprocal.default, call(prims.convert_element_type.default, scale, torch.float32))
        zero = call(prims.convert_element_type.default, zero_point, torch.float32)
        wide = call(prims.convert_element_type.default, x, torch.float32)
        value = call(aten.add.Tensor, call(aten.round.default, call(aten.mul.Tensor, wide, inverse)), zero)
        clipped = call(aten.clamp_max.default, call(aten.clamp_min.default, value, low), high)
        new = call(prims.convert_element_type.default, clipped, dtype)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


# What the passes kept whole or put into the graph, and Inductor has no lowering for.
DECOMPOSED = (*_torch.KEPT_WHOLE, aten.linear.default)

RULES = (
    Rule(
        "weight left in float",
        (*qgraph.DEQUANTIZES, half.CONVERT),
        _find_converted_constant,
        _rewrite_converted_constant,
    ),
    Rule(
        "quantize of float16",
        (qgraph.QUANTIZE, qgraph.QUANTIZE_CHANNEL),
        _find_float16_quantize,
        _rewrite_float16_quantize,
    ),
    Rule("computed quantize", (qgraph.QUANTIZE_TENSOR,), lambda node: True, _rewrite_computed_quantize),
    *row_scales.FINISH_RULES,
    Rule("decompose", DECOMPOSED, lambda node: True, _decompose),
)


def check(graph: fx.Graph) -> None:
    """Nothing is left that Inductor would have decomposed."""
    for node in graph.nodes:
        assert node.target not in DECOMPOSED, f"{node} is left whole"
