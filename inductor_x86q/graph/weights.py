"""Weights: constants, dequantized with a scale for each element of one dimension, as normalize spells them all."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight's tensors: the integers, and the scale and zero point of each element of their dimension `axis`."""

    integers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    axis: int = 0
    quant_min: int = -128
    quant_max: int = 127
    dtype: torch.dtype = torch.int8
    out_dtype: torch.dtype = torch.float32

    @property
    def has_one_grid(self) -> bool:
        """Whether all elements have the same scale and zero point."""
        return bool((self.scale == self.scale[:1]).all() and (self.zero_point == self.zero_point[:1]).all())

    def ordered(self, order: torch.Tensor, dimension: int) -> Weight:
        """The weight with the elements of one dimension in this order."""
        moved = dataclasses.replace(self, integers=self.integers.index_select(dimension, order))
        if dimension != self.axis:
            return moved
        return dataclasses.replace(moved, scale=self.scale[order], zero_point=self.zero_point[order])


def read(node: Any) -> Weight | None:
    """The weight that the node dequantizes; None where it does something else, or its scales are not constant."""
    if not isinstance(node, fx.Node) or node.target is not qdq.DEQUANTIZE_CHANNEL:
        return None
    parameters = qdq.qparams(node)
    tensors = [qdq.constant(n) for n in (node.args[0], parameters.scale, parameters.zero_point)]
    if any(tensor is None for tensor in tensors) or parameters.axis is None:
        return None
    integers, scale, zero_point = (tensor.detach() for tensor in tensors if tensor is not None)
    others = (parameters.axis, parameters.quant_min, parameters.quant_max, parameters.dtype)
    return Weight(integers, scale, zero_point, *others, qdq.out_dtype(node))


def emit(weight: Weight, *, like: fx.Node) -> fx.Node:
    """A node that dequantizes the weight, at the graph's insertion point."""
    integers, scale, zero_point = (
        qdq.new_constant(tensor.contiguous(), like=like)
        for tensor in (weight.integers, weight.scale, weight.zero_point)
    )
    parameters = qdq.QParams(scale, zero_point, weight.quant_min, weight.quant_max, weight.dtype, weight.axis)
    return qdq.dequantize(integers, parameters, weight.out_dtype, like=like)


def with_weight(layer: fx.Node, x: Any, weight: Weight, bias: torch.Tensor | None) -> fx.Node:
    """The convolution or linear on `x` and with this weight and bias, at the graph's insertion point."""
    operands = (x, emit(weight, like=layer), None if bias is None else qdq.new_constant(bias.detach(), like=layer))
    return qdq.call(layer.target, *operands, *layer.args[3:], like=layer, **layer.kwargs)
