"""A linear whose weight is float16 and whose activations are float32 becomes oneDNN's, which keeps the weight in 16 bits.

torchao's quantizer asks for it by converting the weight there and back with an operator that Inductor does not fold. The
call computes what the graph says, in half the memory; where none is made, finish converts the weight once.
"""

from __future__ import annotations

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.layers import Layer
from inductor_x86q.graph.operators import RESHAPES
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten
onednn = torch.ops.onednn

KEPT_CONVERT = torch.ops.quantized_decomposed.convert_element_type.no_fuse
CALL, CALL_WITH_RELU = onednn.linear_dynamic_fp16.default, onednn.linear_relu_dynamic_fp16.default
CALLS = (CALL, CALL_WITH_RELU)


def _find(node: fx.Node) -> Layer | No:
    *bias, x, transposed = (qdq.operand(node, position) for position in range(len(node.args)))
    if node.kwargs or transposed.target is not aten.permute.default:
        return No("its second factor is no transposed weight")
    widened = qdq.operand(transposed)
    rounded = qdq.operand(widened) if widened.target is KEPT_CONVERT else widened
    if rounded.target is not KEPT_CONVERT or rounded.args[1] != torch.float16 or widened.args[1] != torch.float32:
        return No("its weight is not rounded to float16", (rounded,))
    weight = qdq.operand(rounded)
    if qdq.constant(weight) is None or qdq.value(x).dtype != torch.float32:
        return No("its weight is no constant, or its input is not float32", (weight, x))
    if bias and (qdq.constant(bias[0]) is None or qdq.value(bias[0]).dim() != 1):
        return No("its bias is no constant vector", (bias[0],))
    return Layer(x, weight, bias[0] if bias else None)


def _rewrite(node: fx.Node, linear: Layer) -> fx.Node:
    """x @ fp32(fp16(weight))ᵀ + bias → linear_dynamic_fp16(x, packed weight, bias)"""
    packed = node.graph.call_function(onednn.linear_prepack_fp16.default, (linear.weight, None))
    packed.meta["val"] = qdq.value(linear.weight)
    new = node.graph.call_function(CALL, (linear.x, packed, linear.bias))
    for made in (packed, new):
        qdq.copy_origin(made, node)
    new.meta["val"] = qdq.value(node)
    return new


def _find_relu(node: fx.Node) -> fx.Node | No:
    call = qdq.operand(node)
    while call.target in RESHAPES and len(call.users) == 1:
        call = qdq.operand(call)
    found = call.target is CALL and len(call.users) == 1
    return call if found else No("its input is no call of a float16 weight", (call,))


def _rewrite_relu(node: fx.Node, call: fx.Node) -> fx.Node:
    call.target = CALL_WITH_RELU
    return qdq.operand(node)


RULES = (
    Rule("linear of a float16 weight", (aten.mm.default, aten.addmm.default), _find, _rewrite),
    Rule("relu of a float16 linear", (aten.relu.default,), _find_relu, _rewrite_relu),
)
