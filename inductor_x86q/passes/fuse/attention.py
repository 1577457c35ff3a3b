"""Attention between dequantized query, key and value becomes an operator of ours with float output."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import attention, macs, outputs, qdq
from inductor_x86q.graph.attention import ATTENTION, INT8_ATTENTION, Attention
from inductor_x86q.graph.reasons import No, Obstacle, Reason
from inductor_x86q.kernels.attention import LARGEST_WIDTH, MASKS, MOST_KEYS, AttentionKernel, choose
from inductor_x86q.passes.stage import Rule


def obstacle(node: fx.Node) -> Obstacle | None:
    """What keeps an attention from running in int8, or None; also the report's source."""
    if node.target is not ATTENTION:
        if all(qdq.is_dequantize(operand) for operand in node.args[:3]):
            return Obstacle(Reason.NOT_QUANTIZED, "its weights are not: convert with inductor_x86q.convert()")
        return Obstacle(Reason.NOT_QUANTIZED, 'static quantization has it in int8 with attention="int8"')
    for position, name in enumerate(("query", "key", "value")):
        operand = qdq.operand(node, position)
        if not qdq.is_dequantize(operand):
            return Obstacle(Reason.ACTIVATION_NOT_QUANTIZED, name)
        grid = qdq.qparams(operand)
        if grid.dtype != torch.uint8 or grid.axis is not None or not grid.is_static:
            return Obstacle(
                Reason.ACTIVATION_TYPE, f"{name}: of attention, torch.uint8 with a scale that is a constant"
            )
        if not (math.isfinite(grid.scale) and grid.scale > 0) or not 0 <= grid.zero_point <= 255:
            return Obstacle(Reason.BAD_PARAMETERS, f"{name}: scale {grid.scale}, zero point {grid.zero_point}")
    return _kernel_obstacle(node)


def _kernel_obstacle(node: fx.Node) -> Obstacle | None:
    query, key, value = (qdq.value(operand) for operand in node.args[:3])
    arguments: Any = node.args
    mask, scale = arguments[3], attention.usual_scale(query, arguments[5])
    widths = (query.shape[-1], value.shape[-1])
    if not all(isinstance(width, int) and 0 < width <= LARGEST_WIDTH for width in widths):
        return Obstacle(Reason.NO_KERNEL, f"heads of {widths[0]} and {widths[1]}")
    if query.dim() not in (3, 4) or query.dim() != key.dim():
        return Obstacle(Reason.NO_KERNEL, f"attention of {query.dim()} dimensions")
    if isinstance(key.shape[-2], int) and key.shape[-2] > MOST_KEYS:
        return Obstacle(Reason.NO_KERNEL, f"{key.shape[-2]} keys, of which integers of 32 bits do not hold the sum")
    if any(isinstance(size, int) and size == 0 for x in (query, key) for size in x.shape):
        return Obstacle(Reason.NO_KERNEL, "an empty input")
    if mask is not None and (qdq.value(mask).dtype not in MASKS or qdq.value(mask).dim() > query.dim()):
        return Obstacle(Reason.NO_KERNEL, f"a mask of {qdq.value(mask).dtype}")
    if not (isinstance(scale, float) and scale > 0) or qdq.value(node).dtype != torch.float32:
        return Obstacle(Reason.NO_KERNEL, f"a scale of {scale} and a result of {qdq.value(node).dtype}")
    return None if cpu.int8_lanes() else Obstacle(Reason.NO_KERNEL, "this CPU has no AVX2")


def _find(node: fx.Node) -> Attention | No:
    if found := obstacle(node):
        return No(str(found), tuple(operand for operand in node.all_input_nodes if not qdq.is_dequantize(operand)))
    arguments: Any = node.args
    mask, is_causal, scale = arguments[3:]
    scale = attention.usual_scale(qdq.value(arguments[0]), scale)
    sources = [qdq.operand(node, position) for position in range(3)]
    grids = [qdq.qparams(source) for source in sources]
    numbers = [number for grid in grids for number in (grid.scale, grid.zero_point)]
    largest = max(grid.quant_max for grid in grids)
    query, key, value = map(qdq.operand, sources)
    operands: tuple[Any, ...] = (query, key, value, mask, *numbers, is_causal, scale, largest)
    return Attention(*operands, *outputs.FLOAT32.arguments())


def _rewrite(node: fx.Node, found: Attention) -> fx.Node:
    """attention(dequantize(query), …) → int8_attention(query, …), with float output"""
    return _emit(found, macs.count(node), like=node)


def _emit(call: Attention, count: int | None, *, like: fx.Node) -> fx.Node:
    """A node that makes the call, of so many multiply-accumulates."""
    new = qdq.call(INT8_ATTENTION, *call.arguments, like=like)
    new.meta["x86q_macs"] = count
    new.meta["original_aten"] = INT8_ATTENTION  # which Inductor names the kernel by
    return new


def kernel(node: fx.Node) -> AttentionKernel:
    """Which computes an int8 attention on this CPU."""
    found = attention.read(node)
    mask = None if found.mask is None else qdq.value(found.mask).dtype
    return choose(mask, found.output_dtype, found.largest)


COMPUTE_RULES = (Rule("attention", (ATTENTION,), _find, _rewrite),)
