"""A constant factor of each output channel, or of all of them, behind a convolution or linear becomes part of its weight's scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import operators, qdq, weights
from inductor_x86q.graph.operators import Role
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def _is_layer(node: Any) -> bool:
    """Whether the node is a quantized layer of constants that nobody else reads."""
    if operators.role(node) not in (Role.CONVOLUTION, Role.LINEAR) or len(node.users) != 1:
        return False
    return qdq.is_dequantize(node.args[0]) and qdq.has_constants(node)


def _constant(factor: Any) -> torch.Tensor | None:
    """The constant that a product multiplies by, a number as a tensor too; None where it is none."""
    return torch.tensor(float(factor)) if isinstance(factor, (int, float)) else qdq.constant(factor)


def _find(node: fx.Node) -> Any:
    for layer, other in qdq.operands(node):
        factor = _constant(other)
        if not _is_layer(layer) or factor is None:
            continue
        if isinstance(other, fx.Node) and not qdq.is_channel_factor(other, layer, operators.channels(layer)):
            return No("the factor differs along another dimension than the output channels")
        if qdq.value(node).dtype != qdq.value(layer).dtype:
            return No("the product has a wider type than the layer")
        weight = weights.read(layer.args[1])
        if weight is None or not bool(factor.isfinite().all()):
            return No("the factor is not finite, or the weight's scale is not constant")
        vector = factor.detach().float().reshape(-1).expand(weight.scale.shape)
        if bool((weight.integers[vector < 0] == -128).any()):
            return No("a factor is negative, and its channel's weights hold -128, which has no opposite")
        bias = qdq.constant(qdq.schema_arguments(layer)["bias"])
        if bias is not None:
            exact = bias.detach().float() * vector
            bias = exact.to(bias.dtype)
            if not torch.equal(bias.float(), exact):
                return No(f"its bias times the factor is no {bias.dtype}: it would be rounded before the sum")
        return layer, weight, vector, bias
    return No("it multiplies no quantized layer by a constant")


def _rewrite(node: fx.Node, found: tuple[fx.Node, weights.Weight, torch.Tensor, torch.Tensor | None]) -> fx.Node:
    """layer(x)·factor is the layer with its weight's scale and its bias multiplied by the factor."""
    layer, weight, factor, bias = found
    signs = torch.where(factor < 0, -1, 1).to(torch.int8).view(-1, *[1] * (weight.integers.dim() - 1))
    scaled = dataclasses.replace(weight, integers=weight.integers * signs, scale=weight.scale.float() * factor.abs())
    return weights.with_weight(layer, layer.args[0], scaled, bias)


RULES = (Rule("factor of each channel", (aten.mul.Tensor,), _find, _rewrite),)
