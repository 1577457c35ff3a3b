"""Attention between dequantized query, key and value becomes an operator of ours with float output."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import attention, macs, outputs, qdq
from inductor_x86q.graph.attention import ATTENTION, INT8_ATTENTION, INT8_ATTENTION_BY_ROWS, Attention
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.graph.reasons import No, Obstacle, Reason
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.kernels.attention import LARGEST_WIDTH, MASKS, MOST_KEYS, AttentionKernel, choose
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def obstacle(node: fx.Node) -> Obstacle | None:
    """What keeps an attention from running in int8, or None; also the report's source."""
    if node.target is not ATTENTION:
        if all(role(operand) is Role.DEQUANTIZE for operand in _operands(node)):
            return Obstacle(Reason.NOT_QUANTIZED, "its weights are not: convert with inductor_x86q.convert()")
        return Obstacle(Reason.NOT_QUANTIZED, 'quantization has it in int8 with attention="int8"')
    operands, grids = _operands(node), _grids(node)
    for name, operand, grid in zip(_NAMES, operands, grids, strict=True):
        if role(operand) is not Role.DEQUANTIZE:
            return Obstacle(Reason.ACTIVATION_NOT_QUANTIZED, name)
        if grid is None or grid.dtype != torch.uint8:
            return Obstacle(Reason.ACTIVATION_TYPE, f"{name}: of attention, torch.uint8 {_SCALES}")
        is_scale = isinstance(grid.scale, fx.Node) or (math.isfinite(grid.scale) and grid.scale > 0)
        if not is_scale or not 0 <= grid.zero_point <= 255:
            return Obstacle(Reason.BAD_PARAMETERS, f"{name}: scale {grid.scale}, zero point {grid.zero_point}")
    if len({isinstance(grid.scale, fx.Node) for grid in grids if grid}) != 1:
        return Obstacle(Reason.ACTIVATION_TYPE, f"query, key and value: of attention, all three {_SCALES}")
    return _kernel_obstacle(node)


_NAMES = ("query", "key", "value")
_SCALES = "with a scale that is a constant, or one for each row of query and key and each head of the value"


def _operands(node: fx.Node) -> list[fx.Node]:
    return [qdq.operand(node, position) for position in range(3)]


def _grids(node: fx.Node) -> list[qdq.QParams | None]:
    """Those of query, key and value."""
    return [_grid(operand, is_value=position == 2) for position, operand in enumerate(_operands(node))]


def _grid(node: fx.Node, *, is_value: bool) -> qdq.QParams | None:
    """What the kernel has to know of an operand's quantization; None where it takes no such."""
    if node.target is not qdq.DEQUANTIZE_TOKEN:
        grid = qdq.qparams(node) if qdq.is_dequantize(node) else None
        return grid if grid and grid.axis is None and grid.is_static else None
    arguments = qdq.schema_arguments(node)
    scales, zero_point = arguments["scales"], qdq.uniform_value(arguments["zero_points"])
    rows = [*qdq.value(node).shape[:-1], 1]
    if is_value:
        rows[-2] = 1  # all of a head's rows have one
        scales = qdq.operand(scales) if scales.target is aten.expand.default else scales
    fits = fake_tensors.same_shape(qdq.value(scales).shape, rows) and qdq.value(scales).dtype == torch.float32
    if not fits or zero_point is None or zero_point != round(zero_point):
        return None
    return qdq.QParams(scales, int(zero_point), arguments["quant_min"], arguments["quant_max"], arguments["dtype"])


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
        return No(
            str(found), tuple(operand for operand in node.all_input_nodes if role(operand) is not Role.DEQUANTIZE)
        )
    arguments: Any = node.args
    mask, is_causal, scale = arguments[3:]
    scale = attention.usual_scale(qdq.value(arguments[0]), scale)
    sources, grids = _operands(node), [grid for grid in _grids(node) if grid]
    numbers = [number for grid in grids for number in (grid.scale, grid.zero_point)]
    largest = max(grid.quant_max for grid in grids)
    query, key, value = map(qdq.operand, sources)
    operands: tuple[Any, ...] = (query, key, value, mask, *numbers, is_causal, scale, largest)
    return Attention(*operands, *outputs.FLOAT32.arguments())


def _rewrite(node: fx.Node, found: Attention) -> fx.Node:
    """attention(dequantize(query), …) → int8_attention(query, …), with float output"""
    target = INT8_ATTENTION_BY_ROWS if found.is_by_rows else INT8_ATTENTION
    new = qdq.call(target, *found.arguments, like=node)
    new.meta["x86q_macs"] = macs.count(node)
    new.meta["original_aten"] = INT8_ATTENTION  # which Inductor names the kernel by
    return new


def kernel(node: fx.Node) -> AttentionKernel:
    """Which computes an int8 attention on this CPU."""
    found = attention.read(node)
    mask = None if found.mask is None else qdq.value(found.mask).dtype
    return choose(mask, found.output_dtype, found.largest, by_rows=found.is_by_rows)


COMPUTE_RULES = (Rule("attention", (ATTENTION,), _find, _rewrite),)
