"""Operators of ours: on int8 images, and those that stand for a call of oneDNN and bring what a kernel needs instead.

`inductor_x86q::cat` joins the channels of images, `inductor_x86q::max_pool2d` is `quantized::max_pool2d`, and
`inductor_x86q::avg_pool2d` is a dequantize, `aten::avg_pool2d` without `ceil_mode`, and a quantize. `inductor_x86q::materialize`
is a tensor, of whatever type, as a buffer of its own.

`inductor_x86q::qconv_pointwise` and its family take what a kernel of ours reads of a layer, the text of what it has to
compute (`kernels.specification`), and then the arguments of the operator of the same name in `torch.ops.onednn`; those of
`inductor_x86q::linear_per_token` stand for that. Run eagerly they are that operator; `lowering` decides what compiled code does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from inductor_x86q.graph import per_token
from inductor_x86q.graph.definitions import define

onednn = torch.ops.onednn

STANDS_FOR: dict[Any, Any] = {}  # our operator → the call
GENERATED: dict[Any, Any] = {}  # the call → our operator

define("cat(Tensor[] images) -> Tensor", lambda images: torch.cat(images, 1))
CAT = torch.ops.inductor_x86q.cat.default

POOL = torch.ops.quantized.max_pool2d.default
define(str(POOL._schema).removeprefix("quantized::"), POOL)
MAX_POOL = torch.ops.inductor_x86q.max_pool2d.default


def _avg_pool2d(
    x: torch.Tensor, scale: float, zero_point: int, window: tuple[Any, ...], quantize: tuple[Any, ...]
) -> torch.Tensor:
    decomposed = torch.ops.quantized_decomposed
    real = decomposed.dequantize_per_tensor.default(x, scale, zero_point, 0, 0, x.dtype)
    kernel, stride, padding, count_include_pad, divisor = window
    pooled = torch.nn.functional.avg_pool2d(real, kernel, stride, padding, False, count_include_pad, divisor)
    result: torch.Tensor = decomposed.quantize_per_tensor.default(pooled, *quantize)
    return result


define(
    "avg_pool2d(Tensor x, float scale, int zero_point, int[] kernel_size, int[] stride, int[] padding, "
    "bool count_include_pad, int? divisor_override, float output_scale, int output_zero_point, int quant_min, "
    "int quant_max, ScalarType dtype) -> Tensor",
    lambda x, scale, zero_point, *rest: _avg_pool2d(x, scale, zero_point, rest[:5], rest[5:]),
)
AVERAGE_POOL = torch.ops.inductor_x86q.avg_pool2d.default

define("materialize(Tensor x) -> Tensor", torch.clone)
MATERIALIZE = torch.ops.inductor_x86q.materialize.default


def _run(call: Any, constants: Any, specification: str, *arguments: Any) -> torch.Tensor:
    """The call itself; what it adds is copied, as the kernels take it, since a sum would write into it."""
    values = list(arguments)
    if "binary" in str(call):
        layout = torch.channels_last if "conv" in str(call) else torch.contiguous_format
        values[6] = values[6].clone(memory_format=layout)
    result: torch.Tensor = call(*values)
    return result


def _define(call: Any) -> None:
    """Defines the operator that stands for `call`, with the same arguments behind its own."""
    schema = str(call._schema).removeprefix("onednn::").replace("Tensor(a!)", "Tensor")
    schema = schema.replace("inductor_x86q::", "specified_")
    name = schema.split("(")[0]
    define(schema.replace("(", "(Tensor constants, str specification, ", 1), functools.partial(_run, call))
    packet, overload = (*name.split("."), "default")[:2]
    operator = getattr(getattr(torch.ops.inductor_x86q, packet), overload)
    STANDS_FOR[operator], GENERATED[call] = call, operator


for _call in (
    onednn.qconv_pointwise.default,
    onednn.qconv_pointwise.tensor,
    onednn.qconv2d_pointwise.binary,
    onednn.qconv2d_pointwise.binary_tensor,
    onednn.qlinear_pointwise.default,
    onednn.qlinear_pointwise.tensor,
    onednn.qlinear_pointwise.binary,
    onednn.qlinear_pointwise.binary_tensor,
    *per_token.TARGETS,
):
    _define(_call)
