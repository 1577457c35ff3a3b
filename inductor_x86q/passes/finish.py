"""The finish stage: what no kernel took becomes plain Inductor input again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from inductor_x86q.graph import calls, qdq
from inductor_x86q.graph.attention import ATTENTION
from inductor_x86q.graph.attention import attention as reference
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import decompositions, fake_tensors
from inductor_x86q.passes.fuse import half, own_kernels
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def _find_converted_constant(node: fx.Node) -> Tensor | No:
    if computed := tuple(x for x in node.all_input_nodes if qdq.constant(x) is None):
        return No("it converts no constant, or by scales that are computed at run time", computed)
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: qdq.constant(n))
    return qdq.evaluate(node, *arguments[0], **arguments[1])


def _rewrite_converted_constant(node: fx.Node, tensor: Tensor) -> fx.Node:
    """A weight that stays in float is dequantized (or widened) now, once, not at every call."""
    return qdq.new_constant(tensor, like=node)


# --- written out ------------------------------------------------------------------------------------------------------


def _computed_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    # Inductor's lowering forgets quant_min and quant_max.
    value = (x.float() * scale.float().reciprocal()).round() + zero_point.float()
    return value.clamp(low, high).to(dtype)


def _token_quantize(x: Tensor, scales: Tensor, zero_points: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (x * scales.reciprocal() + zero_points).round().clamp(low, high).to(dtype)


def _token_dequantize(x: Tensor, scales: Tensor, zero_points: Tensor, low: int, high: int, dtype: torch.dtype,
                      output_dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    return ((x.float() - zero_points) * scales).to(output_dtype)


# Operators of which Inductor has no lowering, or a wrong one, and what they compute.
WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    qdq.QUANTIZE_TENSOR: _computed_quantize,
    qdq.QUANTIZE_TOKEN: _token_quantize,
    qdq.DEQUANTIZE_TOKEN: _token_dequantize,
    ATTENTION: reference,
}
# These, and what the passes kept whole or put into the graph, and Inductor decomposes itself.
DECOMPOSED = (*WRITTEN_OUT, *decompositions.KEPT_WHOLE, aten.linear.default)


def _decompose(node: fx.Node, module: fx.GraphModule) -> None:
    decompositions.decompose_node(module, node, WRITTEN_OUT)


def _find_float16_quantize(node: fx.Node) -> fx.Node | No:
    source = qdq.operand(node)
    return source if qdq.value(source).dtype == torch.float16 else No("it quantizes no float16", (source,))


def _rewrite_float16_quantize(node: fx.Node, source: fx.Node) -> None:
    """quantize(fp16) → quantize(fp32(fp16)): Inductor's lowering takes float32 and bfloat16 only."""
    node.update_arg(0, qdq.call(half.KEPT_CONVERT, source, torch.float32, like=node))


# --- convolutions of lines ----------------------------------------------------------------------------------------------


def _find_line(node: fx.Node) -> calls.Call | No:
    call = calls.read(node)
    return call if call.kernel == "conv1d" else No("it is no convolution of one dimension")


def _rewrite_line(node: fx.Node, call: calls.Call) -> fx.Node:
    """A 1-d convolution is a 2-d one of images one pixel high.

    The library packs its weight as that; where Inductor then asks for the call's shape, 1-d strides meet a 2-d kernel.
    """
    arguments: Any = call.weight.args
    weight, *rest = arguments
    pack: Any = call.weight.target
    sizes: Any = call.geometry
    tensor = qdq.constant(weight)
    assert tensor is not None
    (stride, padding, dilation, groups), hint = sizes, rest[-1]
    geometry = ([1, *stride], [0, *padding], [1, *dilation], groups)
    shape = hint and [*hint[:2], 1, *hint[2:]]
    image = qdq.call(aten.unsqueeze.default, call.x, 2, like=node)
    flat = qdq.new_constant(tensor.unsqueeze(2), like=node)
    packed = node.graph.call_function(pack, (flat, *rest[:3], *geometry, shape))
    packed.meta["val"] = qdq.value(flat)
    new = calls.emit(dataclasses.replace(call, x=image, weight=packed, geometry=geometry), like=node)
    with fake_tensors.fake_mode(node.graph):
        new.meta["val"] = qdq.value(node).unsqueeze(2)
    return qdq.call(aten.squeeze.dim, new, 2, like=node)


_CONVERSIONS = (*qdq.DEQUANTIZES, half.KEPT_CONVERT)
_QUANTIZES = (qdq.QUANTIZE, qdq.QUANTIZE_CHANNEL)
RULES = (
    Rule("weight left in float", _CONVERSIONS, _find_converted_constant, _rewrite_converted_constant),
    Rule("quantize of float16", _QUANTIZES, _find_float16_quantize, _rewrite_float16_quantize),
    Rule("convolution of lines", calls.TARGETS, _find_line, _rewrite_line),
    Rule("decompose", DECOMPOSED, qdq.graph_module, _decompose),
    *own_kernels.FINISH_RULES,
)
