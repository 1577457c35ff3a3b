"""Linears whose input has a scale for each row (token), which the library's kernels do not take.

The sum over products of integers needs no scale. So the kernel gets the rows as they are, with a scale of 1, and what
comes out of it is multiplied by the scale of its row, in the generated kernel of whatever follows. Graphs that torchao's
`quantize_` makes multiply the integers themselves and scale behind; they are brought into the same form.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import layers, qdq, weights
from inductor_x86q.graph.operators import CONVERT, ROW_MOVEMENTS
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.passes.normalize.spelling import keeps_rows, move_rows
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten

LINEAR = aten.linear.default
INTEGER_PRODUCT = aten._int_mm.default


# --- a dequantize per token in front of a linear ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _RowScales:
    parameters: qdq.QParams  # of the rows without their scales
    dequantize: fx.Node
    moves: list[fx.Node]  # of rows, between that and the linear


def _find_row_scales(node: fx.Node) -> _RowScales | No:
    x = qdq.operand(node)
    moves: list[fx.Node] = []
    while x.target in ROW_MOVEMENTS and keeps_rows(x):
        moves.insert(0, x)
        x = qdq.operand(x)
    if x.target is not qdq.DEQUANTIZE_TOKEN:
        return No("its input has no scale for each row", (x,))
    arguments = qdq.schema_arguments(x)
    zero_point = qdq.uniform_value(arguments["zero_points"])
    if zero_point is None or zero_point != round(zero_point):
        return No("its rows differ in zero point", (x,))
    if arguments["dtype"] not in qdq.INT8_TYPES or arguments["output_dtype"] != torch.float32:
        return No(f"it is dequantized from {arguments['dtype']} to {arguments['output_dtype']}")
    shape = [*qdq.value(x).shape[:-1], 1]
    if not fake_tensors.same_shape(qdq.value(arguments["scales"]).shape, shape):
        return No("its scales do not stand one to a row")
    low, high = arguments["quant_min"], arguments["quant_max"]
    return _RowScales(qdq.QParams(1.0, int(zero_point), low, high, arguments["dtype"]), x, moves)


def _rewrite_row_scales(node: fx.Node, found: _RowScales) -> fx.Node:
    """linear(move(scale·(x - zero point)), weight, bias) → move(scale)·linear(move(x) - zero point, weight) + bias"""
    dequantized, linear = found.dequantize, layers.read(node)
    x, scales = qdq.operand(dequantized), qdq.operand(dequantized, 1)
    for move in found.moves:
        x, scales = move_rows(x, move), move_rows(scales, move)
    if qdq.value(scales).dtype != torch.float32:
        scales = qdq.call(CONVERT, scales, torch.float32, like=node)
    product = qdq.call(LINEAR, qdq.dequantize(x, found.parameters, like=dequantized), linear.weight, like=node)
    new = qdq.call(aten.mul.Tensor, product, scales, like=node)
    return new if linear.bias is None else qdq.call(aten.add.Tensor, new, linear.bias, like=node)


# --- a product of integers --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _IntegerProduct:
    product: fx.Node
    weight: torch.Tensor
    rows: qdq.QParams


def _find_integer_product(node: fx.Node) -> _IntegerProduct | No:
    product, subtracted = qdq.operand(node), torch.zeros(1, dtype=torch.int32)
    constant = qdq.constant(product.args[1]) if product.target is aten.sub.Tensor and not product.kwargs else None
    if constant is not None:
        product, subtracted = qdq.operand(product), constant
    if product.target is not INTEGER_PRODUCT:
        return No("it converts no product of integers", (product,))
    if not qdq.value(node).is_floating_point():
        return No("the product stays integer")
    weight = qdq.constant(product.args[1])
    if weight is None:
        return No("its second factor is not known when compiling", (qdq.operand(product, 1),))
    dtype = qdq.value(product.args[0]).dtype
    limits = torch.iinfo(dtype)
    zero_point = _zero_point(weight, subtracted)
    if zero_point is None or not limits.min <= zero_point <= limits.max:
        return No("what is subtracted is no zero point")
    return _IntegerProduct(product, weight, qdq.QParams(1.0, zero_point, limits.min, limits.max, dtype))


def _zero_point(weight: torch.Tensor, subtracted: torch.Tensor) -> int | None:
    """The number z for which x·weight - subtracted = (x - z)·weight, whatever the integers x are; None without one.

    torchao multiplies int8 as uint8, 128 higher, on CPUs with VNNI.
    """
    sums = weight.sum(0, dtype=torch.int64)
    if subtracted.numel() not in (1, len(sums)):
        return None
    differences = subtracted.reshape(-1).expand(len(sums))
    largest = int(sums.abs().argmax()) if sums.any() else None
    zero_point = 0 if largest is None else int(differences[largest]) // int(sums[largest])
    return zero_point if torch.equal(differences, (zero_point * sums).to(differences.dtype)) else None


def _rewrite_integer_product(node: fx.Node, found: _IntegerProduct) -> fx.Node:
    """The float of a product of 8-bit matrices is a linear of dequantized ones whose scales are 1."""
    product, weight = found.product, found.weight
    outputs = weight.shape[1]
    matrix = weights.Weight(weight.t(), torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64))
    x = qdq.dequantize(product.args[0], found.rows, like=product)
    new = qdq.call(LINEAR, x, weights.emit(matrix, like=product), like=product)
    return new if node.args[1] == torch.float32 else qdq.call(CONVERT, new, node.args[1], like=node)


def _unscaled(node: Any) -> bool:
    """Whether the node is a linear, read once, of integers with a scale of 1 and a dequantized weight, without bias."""
    if not isinstance(node, fx.Node) or node.target is not LINEAR or len(node.users) != 1:
        return False
    linear = layers.read(node)
    if linear.bias is not None or weights.read(linear.weight) is None:
        return False
    return linear.x.target is qdq.DEQUANTIZE and qdq.qparams(linear.x).scale == 1


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """An unscaled linear that is multiplied: by a number of each row, and by a constant of each output."""

    linear: fx.Node
    rows: fx.Node
    outputs: fx.Node | None = None


def _find_factor_behind_rows(node: fx.Node) -> _Scaled | No:
    for scaled, factor in qdq.operands(node):
        if qdq.constant(factor) is None or scaled.target is not aten.mul.Tensor or len(scaled.users) != 1:
            continue
        for linear, rows in qdq.operands(scaled):
            if _unscaled(linear) and qdq.constant(rows) is None and layers.is_channel_factor(factor, linear, -1):
                return _Scaled(linear, rows, factor)
    return No("it multiplies no linear of unscaled integers by a factor of each row and a constant of each output")


def _rewrite_factor_behind_rows(node: fx.Node, found: _Scaled) -> fx.Node:
    """(linear·rows)·constant → (linear·constant)·rows: the constant then stands next to the weight that takes it up."""
    scaled = qdq.call(aten.mul.Tensor, found.linear, found.outputs, like=found.linear)
    return qdq.call(aten.mul.Tensor, scaled, found.rows, like=node)


# --- one scale after all ----------------------------------------------------------------------------------------------


def _find_one_scale(node: fx.Node) -> _Scaled | No:
    for linear, factor in qdq.operands(node):
        if _unscaled(linear) and isinstance(factor, fx.Node) and qdq.constant(factor) is None:
            value = qdq.value(factor)
            if value.dtype == torch.float32 and all(fake_tensors.known(size == 1) for size in value.shape):
                return _Scaled(linear, factor)
    return No("it multiplies no linear of unscaled integers by one number")


def _rewrite_one_scale(node: fx.Node, found: _Scaled) -> fx.Node:
    """One number that multiplies a linear's result is the scale of its input."""
    linear = layers.read(found.linear)
    parameters = qdq.qparams(linear.x)
    scale = qdq.call(aten.reshape.default, found.rows, [1], like=node)
    zero_point = qdq.new_constant(torch.tensor([parameters.zero_point]), like=node)
    computed = dataclasses.replace(parameters, scale=scale, zero_point=zero_point)
    dequantized = qdq.dequantize(linear.x.args[0], computed, like=linear.x)
    new = qdq.call(LINEAR, dequantized, linear.weight, like=found.linear)
    shape = qdq.value(node).shape
    if fake_tensors.same_shape(qdq.value(new).shape, shape):
        return new
    return qdq.call(aten.reshape.default, new, list(shape), like=node)


RULES = (
    Rule("row scales behind a linear", (LINEAR,), _find_row_scales, _rewrite_row_scales),
    Rule("product of integers", (CONVERT,), _find_integer_product, _rewrite_integer_product),
    Rule("constant in front of row scales", (aten.mul.Tensor,), _find_factor_behind_rows, _rewrite_factor_behind_rows),
    Rule("one scale into the input", (aten.mul.Tensor,), _find_one_scale, _rewrite_one_scale),
)
