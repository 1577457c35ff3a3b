"""Convolutions and linears, typed: their arguments by name, and what their weights are."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import fx

from inductor_x86q.graph import qdq


class Geometry(NamedTuple):
    """How a convolution's window moves, a number for each dimension of its images, and its groups, as kernels take it."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """The arguments of `aten.convolution` or `aten.linear`, which has no geometry and one group."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    geometry: Geometry | None = None
    transposed: bool = False

    @property
    def groups(self) -> int:
        return self.geometry.groups if self.geometry else 1

    @property
    def has_constants(self) -> bool:
        """Whether weight and bias are constants, the weight quantized per output channel.

        False for a transposed convolution, whose first dimension is not its outputs.
        """
        if self.transposed or not qdq.is_dequantize(self.weight) or qdq.constant(self.weight.args[0]) is None:
            return False
        return qdq.qparams(self.weight).axis == 0 and (self.bias is None or qdq.constant(self.bias) is not None)


def read(node: fx.Node) -> Layer:
    """The convolution or linear that `node` computes."""
    arguments = qdq.schema_arguments(node)
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if "stride" not in arguments:
        return Layer(x, weight, bias)
    dimensions = qdq.value(weight).dim() - 2
    stride, padding, dilation = (full(arguments[name], dimensions) for name in ("stride", "padding", "dilation"))
    return Layer(x, weight, bias, Geometry(stride, padding, dilation, arguments["groups"]), arguments["transposed"])


def full(values: Any, dimensions: int) -> list[int]:
    """A number for each dimension, where there may be one for all."""
    values = [values] if isinstance(values, int) else list(values)
    return values * dimensions if len(values) == 1 else values


def is_channel_factor(factor: fx.Node, layer: fx.Node, channel: int) -> bool:
    """Whether a float tensor that multiplies the layer's result has one number for all of a channel.

    Args:
        channel: which dimension of the result the channels are.
    """
    result, shape = qdq.value(layer).shape, qdq.value(factor).shape
    first = len(result) - len(shape)
    varying = [first + dimension for dimension, size in enumerate(shape) if size != 1]
    if first < 0 or not qdq.value(factor).is_floating_point():
        return False
    return not varying or (varying == [channel % len(result)] and shape[varying[0] - first] == result[channel])
