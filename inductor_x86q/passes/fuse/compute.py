"""Convolution and linear between dequantized operands become onednn calls with float output."""

from __future__ import annotations

import math

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import layers, macs, operators, qdq
from inductor_x86q.graph.calls import Call, emit
from inductor_x86q.graph.layers import Layer
from inductor_x86q.graph.reasons import No, Obstacle, Reason
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten
onednn = torch.ops.onednn

CONVOLUTION = aten.convolution.default
LINEAR = aten.linear.default


def obstacle(node: fx.Node) -> Obstacle | None:
    """What keeps this convolution or linear from running in int8, or None; also the report's source."""
    layer = layers.read(node)
    if layer.transposed:
        return Obstacle(Reason.NO_KERNEL, "transposed convolution, of other types or another shape than its rule takes")
    if not qdq.is_dequantize(layer.x) and not qdq.is_dequantize(layer.weight):
        return Obstacle(Reason.NOT_QUANTIZED)
    return _weight_obstacle(node, layer) or _activation_obstacle(node, layer) or _library_obstacle(layer)


def _weight_obstacle(node: fx.Node, layer: Layer) -> Obstacle | None:
    weight, bias = layer.weight, layer.bias
    if not qdq.is_dequantize(weight):
        return Obstacle(Reason.WEIGHT_NOT_QUANTIZED)
    parameters = qdq.qparams(weight)
    tensor = qdq.constant(weight.args[0])
    if tensor is None or parameters.axis is None:
        return Obstacle(Reason.WEIGHT_NOT_CONSTANT)
    if parameters.dtype != torch.int8 or tensor.dtype != torch.int8:
        return Obstacle(Reason.WEIGHT_TYPE, f"{parameters.dtype}, expected torch.int8")
    if parameters.axis != 0:
        return Obstacle(Reason.WEIGHT_TYPE, f"quantized along axis {parameters.axis}, expected the output channels")
    scale, zero_point = qdq.constant(parameters.scale), qdq.constant(parameters.zero_point)
    if scale is None or zero_point is None:
        return Obstacle(Reason.WEIGHT_NOT_CONSTANT, "its scale is computed at run time")
    if zero_point.count_nonzero():
        return Obstacle(Reason.WEIGHT_TYPE, "zero point other than 0")
    if not torch.isfinite(scale).all() or (scale < 0).any():
        return Obstacle(Reason.BAD_PARAMETERS, "a weight scale is negative or not finite")
    if node.target is CONVOLUTION and tensor.dim() not in (3, 4, 5):
        return Obstacle(Reason.NO_KERNEL, f"convolution of a {tensor.dim()}-dimensional weight")
    if bias is not None and bias.op != "get_attr":
        return Obstacle(Reason.WEIGHT_NOT_CONSTANT, "its bias is computed at run time")
    return None


# Where the quantize may be in the model all the same. One cause: no q/dq operator takes a number as its scale and a tensor
# as its zero point, or the reverse; eager mode converts them, tracing does not.
_OUTSIDE = (
    "its input is an input of this graph: if the model quantizes it, torch.compile broke the graph in between, and "
    "TORCH_LOGS=graph_breaks says where and why"
)


def _activation_obstacle(node: fx.Node, layer: Layer) -> Obstacle | None:
    x = layer.x
    if x.target is qdq.DEQUANTIZE_TOKEN:
        return Obstacle(Reason.ACTIVATION_TYPE, "its rows differ in zero point; a scale for each of them is fine")
    if not qdq.is_dequantize(x):
        return Obstacle(
            Reason.ACTIVATION_NOT_QUANTIZED, _OUTSIDE if operators.moved_from(x).op == "placeholder" else ""
        )
    parameters = qdq.qparams(x)
    if parameters.axis is not None:
        return Obstacle(Reason.ACTIVATION_TYPE, "quantized per channel")
    if parameters.dtype not in qdq.INT8_TYPES:
        return Obstacle(Reason.ACTIVATION_TYPE, f"{parameters.dtype}, expected torch.uint8 or torch.int8")
    if node.target is CONVOLUTION and parameters.dtype == torch.int8:
        return Obstacle(Reason.ACTIVATION_TYPE, "torch.int8, torch's convolution kernel takes torch.uint8 only")
    shape = qdq.value(x).shape
    if any(isinstance(size, int) and size == 0 for size in shape):
        return Obstacle(Reason.NO_KERNEL, "an empty input, of which the kernels lose the shape")
    if not isinstance(shape[1 if node.target is CONVOLUTION else -1], int):
        return Obstacle(Reason.NO_KERNEL, "the number of input channels is not known when compiling")
    if parameters.is_static:
        if not (math.isfinite(parameters.scale) and parameters.scale > 0):
            return Obstacle(Reason.BAD_PARAMETERS, f"scale {parameters.scale}")
        info = torch.iinfo(parameters.dtype)
        if not info.min <= parameters.zero_point <= info.max:
            return Obstacle(Reason.BAD_PARAMETERS, f"zero point {parameters.zero_point} outside {parameters.dtype}")
    return _saturation_obstacle(parameters, layer.weight)


def _saturation_obstacle(parameters: qdq.QParams, weight: fx.Node) -> Obstacle | None:
    """CPUs without VNNI add two u8×s8 products in 16 bits: the sum must fit there, whatever the input."""
    if cpu.has_vnni():
        return None
    tensor = qdq.constant(weight.args[0])
    assert tensor is not None
    low, high = map(int, torch.aminmax(tensor)) if tensor.numel() else (0, 0)
    largest_weight = max(-low, high)
    # oneDNN moves s8 inputs to u8 by adding 128, so they always span 8 bits. What a convolution pads with is the zero
    # point, which may lie above the range.
    zero_point = parameters.zero_point if parameters.is_static else 0
    largest_input = 255 if parameters.dtype == torch.int8 else min(max(parameters.quant_max, zero_point), 255)
    if 2 * largest_input * largest_weight <= 32767:
        return None
    return Obstacle(Reason.SATURATES, f"inputs up to {largest_input}, weights up to {largest_weight}")


def _library_obstacle(layer: Layer) -> Obstacle | None:
    """Shapes for which the library's kernels for AVX-512 with VNNI give wrong numbers, found by trying 150,000 of them.

    They are left alone on every CPU, since a package may run on another one.
    """
    if (geometry := layer.geometry) is None:
        return None
    image, (outputs, inputs, *kernel) = qdq.value(layer.x).shape[2:], qdq.value(layer.weight).shape
    for size, taps, pad, step in zip(image, kernel, geometry.padding, geometry.dilation, strict=True):
        # Without gaps between the taps some tap of each output lies inside, if the padding is less than their reach.
        if pad > step * (taps - 1) or (pad and step > 1 and not fake_tensors.guarded(size >= step)):
            return Obstacle(Reason.NO_KERNEL, "some of its outputs may read padding only, which the kernels get wrong")
    if inputs == 1 and layer.groups > 1 and outputs > 16 * layer.groups:
        return Obstacle(Reason.NO_KERNEL, "groups of one input and more than 16 outputs, which the kernels get wrong")
    return None


def _as(node: fx.Node, constant: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The constant, or a new one that holds the same in another type."""
    tensor = qdq.constant(constant)
    assert tensor is not None
    return constant if tensor.dtype == dtype else qdq.new_constant(tensor.detach().to(dtype), like=node)


def _shape_hint(x: fx.Node) -> list[int] | None:
    """The input's shape for the choice of the weights' layout; None where it is not known when compiling."""
    shape = qdq.value(x).shape
    return [int(size) for size in shape] if all(isinstance(size, int) for size in shape) else None


def _packed(layer: Layer, scale: fx.Node) -> fx.Node:
    """The node that packs the weight."""
    hint, grid = _shape_hint(layer.x), qdq.qparams(layer.x)
    if layer.geometry is None:
        rows = None if hint is None else [math.prod(hint[:-1]), hint[-1]]
        return scale.graph.call_function(onednn.qlinear_prepack.default, (layer.weight.args[0], rows))
    numbers = (grid.scale, grid.zero_point) if grid.is_static else (1.0, 0)
    arguments = (layer.weight.args[0], scale, *numbers, *layer.geometry, hint)
    return scale.graph.call_function(onednn.qconv_prepack.default, arguments)


def _rewrite(node: fx.Node, layer: Layer) -> fx.Node:
    grid, weight_grid = qdq.qparams(layer.x), qdq.qparams(layer.weight)
    scale, zero_point = _as(node, weight_grid.scale, torch.float32), _as(node, weight_grid.zero_point, torch.int32)
    packed, geometry = _packed(layer, scale), layer.geometry or ()
    packed.meta["val"] = qdq.value(layer.weight.args[0])
    qdq.copy_origin(packed, node)
    # The kernels add the bias before any rounding to bf16.
    bias = None if layer.bias is None else _as(node, layer.bias, torch.float32)
    family = "conv" if geometry else "linear"
    operands = (qdq.operand(layer.x), grid.scale, grid.zero_point, packed, scale, zero_point, bias)
    new = emit(Call(family, *operands, geometry, qdq.value(node).dtype), like=node)
    new.meta["x86q_macs"] = macs.count(node)
    return new


def _find(node: fx.Node) -> Layer | No:
    layer, found = layers.read(node), obstacle(node)
    if found is None:
        return layer
    of_input = found.reason in (Reason.ACTIVATION_NOT_QUANTIZED, Reason.ACTIVATION_TYPE)
    of_weight = found.reason in (Reason.WEIGHT_NOT_QUANTIZED, Reason.WEIGHT_NOT_CONSTANT, Reason.WEIGHT_TYPE)
    return No(str(found), (layer.x,) if of_input else (layer.weight,) if of_weight else ())


RULES = (
    Rule("convolution", (CONVOLUTION,), _find, _rewrite),
    Rule("linear", (LINEAR,), _find, _rewrite),
)
