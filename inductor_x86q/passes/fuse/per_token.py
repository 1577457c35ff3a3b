"""A product of integers that is multiplied by a scale for each row becomes a call that takes these scales.

oneDNN has no such call, so this stage runs where kernels of ours may compute layers. Elsewhere scales, bias and what follows are
left to the generated kernel behind oneDNN's product.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from inductor_x86q.graph import calls, per_token, qdq
from inductor_x86q.graph.calls import Call
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.passes.generate import unavailable
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Scaled:
    product: fx.Node
    scales: fx.Node


def _find_scaled(node: fx.Node) -> _Scaled | No:
    if why := unavailable():
        return No(why)
    for product, scales in qdq.operands(node):
        if _is_plain_product(product) and isinstance(scales, fx.Node) and qdq.constant(scales) is None:
            rows = [*qdq.value(product).shape[:-1], 1]
            value = qdq.value(scales)
            if value.dtype == torch.float32 and fake_tensors.same_shape(value.shape, rows):
                return _Scaled(product, scales)
    return No("it multiplies no product of unscaled integers by a scale for each row")


def _is_plain_product(node: fx.Node) -> bool:
    """Whether the node is a linear's call, read once, whose input has a scale of 1, and that ends in nothing."""
    if not calls.is_call(node) or len(node.users) != 1:
        return False
    call = calls.read(node)
    plain = call.is_static and call.x_scale == 1 and call.bias is None and _ends_in_nothing(call)
    return plain and call.family == "linear"


def _ends_in_nothing(call: Call) -> bool:
    return call.binary is None and call.unary.name == "none" and call.output_dtype == torch.float32


def _rewrite_scaled(node: fx.Node, found: _Scaled) -> fx.Node:
    """scales·linear(x - zero point, weight) → linear_per_token(x, scales, zero point, weight)"""
    call = calls.read(found.product)
    zero_point = qdq.new_constant(torch.tensor([call.x_zero_point], dtype=torch.int32), like=node)
    scaled = dataclasses.replace(call, x_scale=found.scales, x_zero_point=zero_point, is_per_token=True)
    return _emit(scaled, found.product, at=node)


def _emit(call: Call, old: fx.Node, *, at: fx.Node) -> fx.Node:
    new = calls.emit(call, like=at)
    qdq.copy_origin(new, old)
    new.meta.update({key: value for key, value in old.meta.items() if key.startswith("x86q_")})
    return new


@dataclasses.dataclass(frozen=True)
class _Biased:
    product: fx.Node
    bias: fx.Node


def _find_bias(node: fx.Node) -> _Biased | No:
    if qdq.schema_arguments(node)["alpha"] != 1:
        return No("it scales by alpha")
    for product, bias in qdq.operands(node):
        if not isinstance(product, fx.Node) or product.target is not per_token.LINEAR or len(product.users) != 1:
            continue
        call, tensor = calls.read(product), qdq.constant(bias)
        outputs = (qdq.value(product).shape[-1],)
        is_bias = tensor is not None and tensor.dtype == torch.float32 and tensor.shape == outputs
        if is_bias and call.bias is None and _ends_in_nothing(call):
            return _Biased(product, bias)
    return No("it adds no constant of each output to a linear whose rows have scales")


def _rewrite_bias(node: fx.Node, found: _Biased) -> fx.Node:
    call = dataclasses.replace(calls.read(found.product), bias=found.bias)
    return _emit(call, found.product, at=node)


RULES = (
    Rule("scales of rows", (aten.mul.Tensor,), _find_scaled, _rewrite_scaled),
    Rule("bias behind scales of rows", (aten.add.Tensor,), _find_bias, _rewrite_bias),
)
