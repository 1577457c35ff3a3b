"""The finish stage: what no kernel took becomes plain Inductor input again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q import _torch, qgraph
from inductor_x86q.passes.stage import No, Rule

aten = torch.ops.aten


def _find_dequantized_constant(node: fx.Node) -> Any:
    tensor = qgraph.constant(node.args[0])
    if tensor is None:
        return No("it dequantizes no constant")
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: qgraph.constant(n))
    return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _rewrite_dequantized_constant(node: fx.Node, tensor: torch.Tensor) -> None:
    """A weight that stays in float is dequantized now, once, not at every call."""
    with node.graph.inserting_before(node):
        new = qgraph.new_constant(node.graph, tensor, node)
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


def _decompose(node: fx.Node, found: Any) -> None:
    _torch.decompose_node(node.graph.owning_module, node)  # type: ignore[arg-type]


# What the passes kept whole or put into the graph, and Inductor has no lowering for.
DECOMPOSED = (*_torch.KEPT_WHOLE, aten.linear.default)

RULES = (
    Rule("weight left in float", qgraph.DEQUANTIZES, _find_dequantized_constant, _rewrite_dequantized_constant),
    Rule("decompose", DECOMPOSED, lambda node: True, _decompose),
)


def check(graph: fx.Graph) -> None:
    """Nothing is left that Inductor would have decomposed."""
    for node in graph.nodes:
        assert node.target not in DECOMPOSED, f"{node} is left whole"
