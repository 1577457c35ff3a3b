"""A constant factor of each output channel behind a convolution or linear becomes part of its weight's scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q import _torch, qgraph
from inductor_x86q.passes.stage import No, Rule

aten = torch.ops.aten

# Which dimension the output channels of each layer are.
CHANNELS = {aten.convolution.default: 1, aten.linear.default: -1}


def _is_layer(node: Any) -> bool:
    """Whether the node is a quantized layer of constants that nobody else reads."""
    if not isinstance(node, fx.Node) or node.target not in CHANNELS or len(node.users) != 1:
        return False
    return qgraph.is_dequantize(node.args[0]) and qgraph.has_constants(node)


def _find(node: fx.Node) -> Any:
    for layer, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        factor = qgraph.constant(other)
        if not _is_layer(layer) or factor is None or not factor.is_floating_point():
            continue
        shape = qgraph.value(layer).shape  # type: ignore[arg-type]
        channel = CHANNELS[layer.target] % len(shape)  # type: ignore[index, union-attr]
        aligned = (*[1] * (len(shape) - factor.dim()), *factor.shape)
        if any(size != 1 for dimension, size in enumerate(aligned) if dimension != channel):
            return No("the factor differs along another dimension than the output channels")
        if not _torch.same_shape(qgraph.value(node).shape, shape) or not bool(factor.isfinite().all()):
            return No("the factor is not finite, or the layer's result is repeated")
        vector = factor.detach().float().reshape(-1).expand(shape[channel]).contiguous()
        integers = qgraph.constant(layer.args[1].args[0])  # type: ignore[union-attr]
        assert integers is not None
        if bool((integers[vector < 0] == -128).any()):
            return No("a factor is negative, and its channel's weights hold -128, which has no opposite")
        return layer, vector
    return No("it multiplies no quantized layer by a constant")


def _rewrite(node: fx.Node, found: tuple[fx.Node, torch.Tensor]) -> None:
    """layer(x)·factor is the layer with its weight's scale and its bias multiplied by the factor."""
    layer, factor = found
    x, weight, bias, *others = layer.args if len(layer.args) > 2 else (*layer.args, None)
    parameters = qgraph.qparams(weight)  # type: ignore[arg-type]
    integers, scale, vector = (qgraph.constant(n) for n in (weight.args[0], parameters.scale, bias))  # type: ignore[union-attr]
    assert integers is not None and scale is not None
    signs = torch.where(factor < 0, -1, 1).to(torch.int8).view(-1, *[1] * (integers.dim() - 1))
    graph = node.graph
    with graph.inserting_before(node):
        constants = [qgraph.new_constant(graph, t, layer) for t in (integers * signs, scale.float() * factor.abs())]
        arguments = (*constants, *parameters.arguments()[1:])
        dequantized = qgraph.call(graph, qgraph.DEQUANTIZE_CHANNEL, arguments, weight.kwargs, like=weight)  # type: ignore[arg-type, union-attr]
        if vector is not None:
            bias = qgraph.new_constant(graph, vector.detach() * factor.to(vector.dtype), layer)
        new = qgraph.call(graph, layer.target, (x, dequantized, bias, *others), dict(layer.kwargs), like=layer)  # type: ignore[arg-type]
    node.replace_all_uses_with(new)
    qgraph.erase_dead(node)


RULES = (Rule("factor of each channel", (aten.mul.Tensor,), _find, _rewrite),)
