"""`inductor_x86q::linear_per_token`: an int8 linear each row of whose input has a scale, and perhaps a zero point, of its own.

It takes what `onednn::qlinear_pointwise.tensor` takes, which knows one scale and zero point for all rows; there may be one zero
point here too. Compiled code has a kernel of ours for it. Run eagerly it is oneDNN's product of the integers, and the rest in
operators of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from inductor_x86q.graph.definitions import LIBRARY, define

onednn = torch.ops.onednn

# What a kernel ends in, as oneDNN names it, from the value, the scalars and the algorithm.
_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda x, scalars, algorithm: x,
    "relu": lambda x, scalars, algorithm: functional.relu(x),
    "hardtanh": lambda x, scalars, algorithm: functional.hardtanh(x, *scalars),
    "hardswish": lambda x, scalars, algorithm: functional.hardswish(x),
    "swish": lambda x, scalars, algorithm: functional.silu(x),
    "gelu": lambda x, scalars, algorithm: functional.gelu(x, approximate=algorithm),
    "leaky_relu": lambda x, scalars, algorithm: functional.leaky_relu(x, *scalars),
    "tanh": lambda x, scalars, algorithm: torch.tanh(x),
}


# A float output, and no post-operation.
_FLOAT: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")


def _product(x: torch.Tensor, zero_point: int, *weight: torch.Tensor) -> torch.Tensor:
    """(x - zero point)·weight, of weights with their scales."""
    result: torch.Tensor = onednn.qlinear_pointwise(x, 1.0, zero_point, *weight, None, *_FLOAT)
    return result


def _centered_product(x: torch.Tensor, zero_points: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
    if zero_points.numel() == 1:
        return _product(x, int(zero_points), *weight)
    row = torch.ones(1, x.shape[-1], dtype=x.dtype)
    return _product(x, 0, *weight) - zero_points * _product(row, 0, *weight)[0]


def _quantized(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return x.to(dtype)
    limits = torch.iinfo(dtype)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    result: torch.Tensor = quantize(x, scale, zero_point, limits.min, limits.max, dtype)
    return result


def _linear(
    x: torch.Tensor, x_scales: torch.Tensor, x_zero_points: torch.Tensor, weight: torch.Tensor,
    weight_scale: torch.Tensor, weight_zero_point: torch.Tensor, bias: torch.Tensor | None, *output: Any,
) -> torch.Tensor:  # fmt: skip
    *numbers, name, scalars, algorithm = output
    value = _centered_product(x, x_zero_points, weight, weight_scale, weight_zero_point) * x_scales
    value = value if bias is None else value + bias
    return _quantized(_ACTIVATIONS[name](value, scalars, algorithm), *numbers)


def _linear_with_addition(
    x: torch.Tensor, x_scales: torch.Tensor, x_zero_points: torch.Tensor, weight: torch.Tensor,
    weight_scale: torch.Tensor, weight_zero_point: torch.Tensor, other: torch.Tensor, bias: torch.Tensor | None,
    scale: float, zero_point: int, dtype: torch.dtype, other_scale: float, other_zero_point: int, kind: str, alpha: float,
    *activation: Any,
) -> torch.Tensor:  # fmt: skip
    value = _linear(x, x_scales, x_zero_points, weight, weight_scale, weight_zero_point, bias, *_FLOAT)
    name, *others = activation
    value = value + (other.float() - other_zero_point) * other_scale
    return _quantized(_ACTIVATIONS[name](value, *others), scale, zero_point, dtype)


def _define(overload: str, run: Callable[..., torch.Tensor]) -> Any:
    """The operator with the schema of that overload of oneDNN's."""
    like = getattr(onednn.qlinear_pointwise, overload)
    name = {"tensor": "linear_per_token", "binary_tensor": "linear_per_token.binary"}[overload]
    define(f"{name}{str(like._schema).removeprefix(f'onednn::qlinear_pointwise.{overload}')}", run)
    # Shape and type are those of one scale for all rows.
    LIBRARY.impl(name, like, "Meta")
    return getattr(torch.ops.inductor_x86q.linear_per_token, name.partition(".")[2] or "default")


LINEAR = _define("tensor", _linear)
LINEAR_WITH_ADDITION = _define("binary_tensor", _linear_with_addition)
TARGETS = (LINEAR, LINEAR_WITH_ADDITION)
