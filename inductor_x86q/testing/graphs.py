"""Small q/dq graphs by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor import dynamo, fake_tensors

fake_tensors.register_quantized_decomposed()


def quantize_dequantize(
    x: torch.Tensor,
    scale: Any = 0.02,
    zero_point: Any = 60,
    *,
    dtype: torch.dtype = torch.uint8,
    quant_min: int = 0,
    quant_max: int = 127,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x` quantized and dequantized per tensor, as two nodes of the graph; scale and zero point numbers or tensors.

    For int8 pass dtype=torch.int8 and a quant_min.

    Example:
        >>> testing.quantize_dequantize(torch.tensor([-2.0, 0.013, 0.5]), 0.02, 60)
        tensor([-1.2000,  0.0200,  0.5000])
    """
    decomposed = torch.ops.quantized_decomposed
    parameters = (scale, zero_point, quant_min, quant_max, dtype)
    if isinstance(scale, torch.Tensor):
        integers = decomposed.quantize_per_tensor.tensor(x, *parameters)
        return decomposed.dequantize_per_tensor.tensor(integers, *parameters, out_dtype=out_dtype)
    integers = decomposed.quantize_per_tensor.default(x, *parameters)
    return decomposed.dequantize_per_tensor.default(integers, *parameters, out_dtype=out_dtype)


class _QWeight(torch.nn.Module):
    """An int8 weight with one scale per output channel, and a float bias; the same numbers for the same shape.

    Weights reach from -largest to largest: up to 63 they cannot overflow with 8-bit activations on any CPU.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, shape: tuple[int, ...], bias: bool, dtype: torch.dtype, largest: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(math.prod(shape))
        self.dtype = dtype
        self.register_buffer("weight", torch.randint(-largest, largest + 1, shape, generator=random, dtype=torch.int8))
        fan_in = math.prod(shape[1:])
        scale = (0.5 + torch.rand(shape[0], generator=random)) / (0.58 * largest * math.sqrt(fan_in))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(shape[0], dtype=torch.int64))
        self.register_buffer("bias", torch.randn(shape[0], generator=random).to(dtype) if bias else None)

    def dequantized(self) -> torch.Tensor:
        arguments = (self.weight, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        found = torch.ops.quantized_decomposed.dequantize_per_channel.default(*arguments)
        return found if self.dtype == torch.float32 else found.to(self.dtype)


class _QConvNd(_QWeight):
    spatial: int
    function: Callable[..., torch.Tensor]

    def __init__(self, inputs: int, outputs: int, kernel_size: int | tuple[int, ...], *, bias: bool = True,
                 groups: int = 1, dtype: torch.dtype = torch.float32, largest: int = 127,
                 **geometry: Any) -> None:  # fmt: skip
        kernel = (kernel_size,) * self.spatial if isinstance(kernel_size, int) else kernel_size
        super().__init__((outputs, inputs // groups, *kernel), bias, dtype, largest)
        self.geometry = {"groups": groups, **geometry}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return type(self).function(x, self.dequantized(), self.bias, **self.geometry)


class QConv1d(_QConvNd):
    """A 1-D convolution with an int8 weight; takes a dequantized input (N, C, L); other arguments as of F.conv1d."""

    spatial, function = 1, staticmethod(torch.nn.functional.conv1d)


class QConv2d(_QConvNd):
    """A 2-D convolution with an int8 weight; takes a dequantized input (N, C, H, W); other arguments as of F.conv2d."""

    spatial, function = 2, staticmethod(torch.nn.functional.conv2d)


class QConv3d(_QConvNd):
    """A 3-D convolution with an int8 weight; takes a dequantized input (N, C, D, H, W); arguments as of F.conv3d."""

    spatial, function = 3, staticmethod(torch.nn.functional.conv3d)


class QLinear(_QWeight):
    """A linear with an int8 weight; takes a dequantized input (..., inputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32,
                 largest: int = 127) -> None:  # fmt: skip
        super().__init__((outputs, inputs), bias, dtype, largest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.dequantized(), self.bias)


def qdq_graph(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """The exported graph of a module whose forward quantizes and dequantizes by hand: what quantize() would return.

    Example:
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = testing.QLinear(16, 32)
        ...
        ...     def forward(self, x):
        ...         return torch.relu(self.linear(testing.quantize_dequantize(x)))
        >>> inputs = (torch.randn(8, 16),)
        >>> graph = testing.qdq_graph(Block(), inputs)
        >>> inductor_x86q.explain(graph, inputs).fused[0].absorbed
        ('relu',)
    """
    with torch.no_grad():
        exported = dynamo.export(module.eval(), example_inputs, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    return exported.module()  # type: ignore[return-value]
