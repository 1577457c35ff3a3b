"""Embedding tables in int8, each row with a scale of its own: rows are looked up as integers and dequantized then.

No operator of ours is needed: what is looked up is int8, and the compiled code keeps the table so.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import aliasing, qdq
from inductor_x86q.graph.operators import CONVERT
from inductor_x86q.graph.origin import layer
from inductor_x86q.quantization import rows

log = logging.getLogger(__name__)
aten = torch.ops.aten
BAG = aten.embedding_bag.padding_idx
LOOKUPS = (aten.embedding.default, BAG)
MODES = (None, "int8")


def rewrite(model: fx.GraphModule, is_float: Callable[[fx.Node], bool]) -> tuple[int, list[fx.Node]]:
    """Rewrites the lookups in tables that are constant; gives how many, and those that are to be left out."""
    excluded, tables, count = [], {}, 0
    for node in [node for node in model.graph.nodes if node.target in LOOKUPS]:
        if why := _obstacle(node):
            log.info("not quantized, stays float: %s (%s)", layer(node), why)
            continue
        if is_float(node):
            excluded.append(node)
            continue
        count += 1
        source: Any = node.args[0]
        if source not in tables:
            tables[source] = _store(model, source)
        with node.graph.inserting_before(node):
            new = _bag(node, *tables[source]) if node.target is BAG else _rows(node, node.args[1], *tables[source])
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
    for node in model.graph.find_nodes(op="call_function", target=aten.sym_numel.default):
        _spell_out(node)
    model.graph.eliminate_dead_code()
    model.recompile()
    return count, excluded


def _obstacle(node: fx.Node) -> str:
    """Why a lookup's table cannot be int8; empty where it can."""
    if node.target is BAG and qdq.schema_arguments(node)["padding_idx"] is not None:
        return "rows that it leaves out are told by their number, which is not known any more once they are looked up"
    table = qdq.constant(node.args[0])
    if table is None or table.dtype != torch.float32:
        return "its table is no constant of float32"
    return "its table is written into, as by max_norm" if aliasing.is_variable(qdq.operand(node)) else ""


def _store(model: fx.GraphModule, source: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The integers of a table, and the scales of its rows, in front of all that reads them."""
    table = qdq.constant(source)
    assert table is not None
    integers, scale = rows.rounded(table.detach(), 127)
    name = str(source.target)
    return qdq.store(model, f"{name}_int8", integers, source), qdq.store(model, f"{name}_scale", scale, source)


def _rows(node: fx.Node, indices: Any, integers: fx.Node, scale: fx.Node) -> fx.Node:
    looked_up = qdq.call(aten.embedding.default, integers, indices, like=node)
    scales = qdq.call(aten.embedding.default, scale, indices, like=node)
    return qdq.call(aten.mul.Tensor, qdq.call(CONVERT, looked_up, torch.float32, like=node), scales, like=node)


def _bag(node: fx.Node, integers: fx.Node, scale: fx.Node) -> fx.Node:
    """The same bags, of a table of just the rows that are looked up."""
    _, indices, *rest = node.args
    count = qdq.call(aten.sym_size.int, indices, 0, like=node)
    numbers = qdq.call(aten.arange.default, count, like=node)
    return qdq.call(BAG, _rows(node, indices, integers, scale), numbers, *rest, like=node, **node.kwargs)


def _spell_out(node: fx.Node) -> None:
    """A bag's number of indices as the product of its sizes: Dynamo breaks the graph at `sym_numel`."""
    x = qdq.operand(node)
    with node.graph.inserting_before(node):
        sizes = [qdq.call(aten.sym_size.int, x, dimension, like=node) for dimension in range(qdq.value(x).dim())]
        node.replace_all_uses_with(functools.reduce(lambda a, b: qdq.call(operator.mul, a, b, like=node), sizes))
    node.graph.erase_node(node)
