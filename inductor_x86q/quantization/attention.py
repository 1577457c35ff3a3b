"""Which attention can be int8, and what becomes of it when a calibrated graph is converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.attention import ATTENTION, SPELLINGS
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.quantization import rows


def takes(node: fx.Node) -> bool:
    """Whether our operator computes what this one does: its query, key and value are (..., heads, rows, width)."""
    if node.target not in SPELLINGS:
        return False
    arguments = qdq.schema_arguments(node)
    operands = node.args[:3]
    if arguments["dropout_p"] or not all(isinstance(operand, fx.Node) for operand in operands):
        return False
    query, key, value = (qdq.value(operand) for operand in operands)
    if query.dim() not in (3, 4) or not query.dim() == key.dim() == value.dim():
        return False
    if not fake_tensors.same_shape(key.shape[:-1], value.shape[:-1]):
        return False
    if arguments["enable_gqa"]:
        heads = (query.shape[-3], key.shape[-3])
        alike = all(isinstance(size, int) for size in heads) and heads[0] % heads[1] == 0
        return alike and fake_tensors.same_shape(query.shape[:-3], key.shape[:-3])
    return fake_tensors.same_shape(query.shape[:-2], key.shape[:-2])


def by_rows(step: Callable[..., Any], operands: Iterable[Any], bits: int, **keywords: Any) -> list[Any]:
    """Query, key and value behind a step of `rows`: each row with a scale of its own, but all of a head's values with one.

    The sum over values needs no scale then, nor does the sum over what a query and a key have in common.
    """
    high = 2**bits - 1
    return [step(x, 0, high, by_matrix=position == 2, **keywords) for position, x in enumerate(operands)]


def quantize_attention(converted: fx.GraphModule) -> None:
    """Has attention between quantized query, key and value compute what the int8 kernel does."""
    graph = converted.graph
    for node in list(graph.nodes):
        bits = node.meta.get(rows.BITS)
        if node.target not in SPELLINGS or not (bits or all(map(qdq.is_dequantize, node.args[:3]))):
            continue
        arguments: Any = qdq.schema_arguments(node)
        rest = (arguments["attn_mask"], bool(arguments["is_causal"]), arguments["scale"])
        operands: Any = node.args[:3]
        with graph.inserting_before(node):
            if bits:
                operands = by_rows(rows.quantize_dequantize, operands, bits, like=node)
            new = graph.call_function(ATTENTION, (*operands, *rest))
        qdq.copy_origin(new, node)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    converted.recompile()
