"""Collecting a report from a graph that the passes have fused."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import attention, macs, operators, outputs, qdq
from inductor_x86q.graph.attention import is_int8_attention
from inductor_x86q.graph.calls import is_call, read
from inductor_x86q.graph.operators import Role, factors, moved_from, role
from inductor_x86q.graph.origin import layer, source
from inductor_x86q.graph.reasons import BY_DESIGN, Obstacle, Reason
from inductor_x86q.graph.recurrence import PACKED_RECURRENCE, RECURRENCE
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.inductor.regions import Region, regions
from inductor_x86q.passes.fuse import attention as fuse_attention
from inductor_x86q.passes.fuse import compute, half
from inductor_x86q.report.model import Fusion, Miss, Node, Operation
from inductor_x86q.report.report import Report

# What a report counts as layers: all that computes products.
_LAYERS = frozenset({
    Role.CONVOLUTION, Role.LINEAR, Role.LINEAR_16, Role.PRODUCT, Role.INTEGER_PRODUCT, Role.ATTENTION, Role.RECURRENT,
})  # fmt: skip


def collect(graph: fx.Graph) -> Report:
    """The report of a graph that has gone through the fuse stage (and not yet through finish)."""
    report = Report([], [], [])
    shown: set[fx.Node] = set()
    for node in graph.nodes:
        kind = _kind(node, shown)
        if kind is None:
            continue
        shown.add(node)
        node.meta["x86q_reported"] = node.name  # what replaces it in a later stage is told by that
        if kind == "fused":
            report.fused.append(_fusion(node))
        elif kind == "product":
            miss = _miss(node)
            kind = "kept_float" if miss.reason in BY_DESIGN else "missed"
            getattr(report, kind).append(miss)
        elif kind == "quantize":
            report.quantizes_left.append(node.name)
        elif kind == "dequantize":
            report.dequantizes_left.append(node.name)
        if kind in ("generated", "quantize", "dequantize"):
            report.generated.append(_operation(node))
        report.nodes.append(_described(node, kind, shown))
    report.kept_float += _weights_read_elsewhere(graph)
    report.notes = _notes(graph)
    return report


# Why a call does not give the graph's own type, for the types of which that can be said.
_GIVE_FLOAT32 = {
    torch.bfloat16: "this CPU has no bf16 instructions: {} give float32 under autocast, which is then rounded to bfloat16",
    torch.float16: "no int8 kernel gives float16: {} give float32, which is then rounded to float16",
}


def _notes(graph: fx.Graph) -> list[str]:
    notes = []
    for dtype, text in _GIVE_FLOAT32.items():
        widened = [layer(node) for node in graph.nodes if node.meta.get("x86q_float32_for") == dtype]
        if widened:
            notes.append(text.format(", ".join(widened)))
    return notes


def _kind(node: fx.Node, shown: set[fx.Node]) -> str | None:
    """What the report calls a node; None for constants and what is computed from them alone."""
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op != "call_function" or not any(source in shown for source in node.all_input_nodes):
        return None
    if is_call(node) or _is_recurrence(node) or _is_int8_lookup(node) or is_int8_attention(node):
        return "fused"
    if _is_product(node):
        return "product"
    kinds: dict[Role | None, str] = {Role.QUANTIZE: "quantize", Role.DEQUANTIZE: "dequantize"}
    return kinds.get(role(node), "generated")


def inside_regions(region: Region) -> Report:
    """The layers of a graph inside of another, and of those inside of it, that the passes did not see."""
    report = Report([], [], [])
    for node in region.module.graph.nodes:
        if not _is_product(node):
            continue
        is_quantized = any(qdq.is_dequantize(moved_from(factor)) for factor in factors(node))
        kind, reason = ("missed", Reason.IN_A_REGION) if is_quantized else ("kept_float", Reason.NOT_QUANTIZED)
        obstacle = Obstacle(reason, f"inside of {operators.own_name(region.call)}")
        miss = Miss(
            layer(node), operators.name(node), obstacle, _shape(node), macs.count(node), source(node), node.name
        )
        getattr(report, kind).append(miss)
        report.nodes.append(_described(node, kind, set()))
    for inner in regions(region.module.graph):
        report.extend(inside_regions(inner))
    return report


def _is_product(node: fx.Node) -> bool:
    return role(node) in _LAYERS


def _miss(node: fx.Node) -> Miss:
    operator = operators.name(node)
    if operator == "matmul" and moved_from(factors(node)[1], through_qdq=True).op == "get_attr":
        operator = "linear"
    return Miss(layer(node), operator, _obstacle(node), _shape(node), macs.count(node), source(node), node.name)


_FLOAT_RECURRENCE = (
    "part of a recurrent layer; those with a projection, of packed sequences or with dropout in training stay float"
)


def _obstacle(node: fx.Node) -> Obstacle:
    if role(node) is Role.ATTENTION and (why := fuse_attention.obstacle(node)):
        return why
    if _is_recurrent(node):
        return Obstacle(Reason.NOT_QUANTIZED, _FLOAT_RECURRENCE)
    found = _layer_obstacle(node)
    is_float_convolution = node.target is compute.CONVOLUTION and found == Obstacle(Reason.NOT_QUANTIZED)
    if is_float_convolution and any(other.target is qdq.QUANTIZE_TENSOR for other in node.graph.nodes):
        return Obstacle(Reason.NOT_QUANTIZED, "dynamic quantization is for linears, convolutions need calibration")
    return found


def _is_recurrent(node: fx.Node) -> bool:
    """Whether the node is an LSTM's layer or comes from a module of torch.nn.modules.rnn."""
    stack = node.meta.get("nn_module_stack") or {}
    return role(node) is Role.RECURRENT or any("torch.nn.modules.rnn." in str(kind) for _, kind in stack.values())


def _layer_obstacle(node: fx.Node) -> Obstacle:
    if node.target in half.CALLS:
        return Obstacle(Reason.NOT_QUANTIZED, f"its weight is float16: {node.target}")
    with fake_tensors.disable_modes():  # it looks at the weights' numbers
        if node.target not in (compute.CONVOLUTION, compute.LINEAR):
            return _product_obstacle(node)
        found = compute.obstacle(node)
    assert found is not None, f"{node} is eligible and was not fused"
    return found


def _product_obstacle(node: fx.Node) -> Obstacle:
    """Of a matrix product that the normalize stage did not turn into a linear."""
    if any(isinstance(size, int) and size == 0 for size in _shape(node)):
        return Obstacle(Reason.NO_KERNEL, "an empty result")
    x, weight = factors(node)
    if role(node) is Role.INTEGER_PRODUCT:
        return Obstacle(Reason.NO_KERNEL, "its integer result is read as such, or its second factor is no constant")
    source = moved_from(weight, through_qdq=True)
    if source.op == "get_attr":
        if qdq.is_dequantize(moved_from(x)):
            return Obstacle(Reason.WEIGHT_NOT_QUANTIZED)
        if _holds_int8(qdq.constant(source)):
            return Obstacle(Reason.NOT_QUANTIZED, "only its weight is int8: left to Inductor, which computes in float")
        return Obstacle(Reason.NOT_QUANTIZED)
    dequantize: Any = moved_from(weight)
    # An input of the graph that is int8, or is quantized as weights are, is taken for one, any other for an activation.
    if source.op == "placeholder" and qdq.is_dequantize(dequantize):
        given = moved_from(dequantize.args[0]) is source
        if not given and not _is_symmetric(qdq.qparams(dequantize)):
            return Obstacle(Reason.NO_KERNEL, "product of two tensors that are both computed at run time")
        return Obstacle(Reason.WEIGHT_NOT_CONSTANT)
    return Obstacle(Reason.NO_KERNEL, "product of two tensors that are both computed at run time")


def _holds_int8(weight: torch.Tensor | None) -> bool:
    """Whether a float matrix holds 8-bit integers: what constant folding leaves of a weight that is scaled behind."""
    if weight is None or not weight.is_floating_point() or weight.is_mkldnn or weight.numel() < 2:
        return False
    low, high = weight.aminmax()
    return bool(-128 <= low < 0 < high <= 127) and bool((weight == weight.round()).all())


def _is_symmetric(parameters: Any) -> bool:
    return parameters.dtype == torch.int8 and isinstance(parameters.zero_point, int) and parameters.zero_point == 0


def _weights_read_elsewhere(graph: fx.Graph) -> list[Miss]:
    """Quantized weights that no product reads any more: a linear that was taken apart before the passes saw it."""
    found = []
    for node in graph.nodes:
        tensor = qdq.constant(node.args[0]) if qdq.is_dequantize(node) else None
        if tensor is None or tensor.dim() < 2 or tensor.dtype != torch.int8:
            continue
        users = [user for user in node.users if not _is_product(user)]
        if users:
            detail = (
                f"its weight is read by {operators.name(users[0])}: the product is too small for a kernel of its own"
            )
            obstacle = Obstacle(Reason.NO_KERNEL, detail)
            count = int(math.prod(qdq.value(node).shape))  # of one row
            found.append(
                Miss(layer(users[0]), "linear", obstacle, _shape(users[0]), count, source(users[0]), users[0].name)
            )
    return found


def _operation(node: fx.Node) -> Operation:
    inputs = tuple(_dtype(source) for source in node.all_input_nodes if source.op != "get_attr")
    return Operation(layer(node), operators.name(node), inputs, _dtype(node), _shape(node), source(node), node.name)


def _described(node: fx.Node, kind: str, shown: set[fx.Node]) -> Node:
    inputs = tuple(source.name for source in node.all_input_nodes if source in shown)
    operator = operators.name(node) if kind != "input" else "input"
    return Node(node.name, kind, operator, layer(node), _dtype(node), _shape(node), inputs)


def _dtype(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return _name(value.dtype) if isinstance(value, torch.Tensor) else ""


def _fusion(node: fx.Node) -> Fusion:
    alike: dict[str, Any] = {
        **dict(layer=layer(node), kernel=str(node.target), absorbed=tuple(node.meta.get("x86q_absorbed", ()))),
        **dict(output_shape=_shape(node), source=source(node), node=node.name),
    }
    if _is_recurrence(node):
        return _recurrence(node, alike)
    if is_int8_attention(node):
        return _attention(node, alike)
    return _lookup(node, alike) if _is_int8_lookup(node) else _call(node, alike)


def _attention(node: fx.Node, alike: dict[str, Any]) -> Fusion:
    found = attention.read(node)
    is_integer = not found.output_dtype.is_floating_point
    return Fusion(
        **alike,
        operator="attention",
        input_dtype=_dtype(found.query),
        output_dtype=_dtype(node),
        weight_dtype=_dtype(found.key),
        macs=node.meta.get("x86q_macs"),
        input_scale=found.query_scale,
        input_zero_point=found.query_zero_point,
        output_scale=found.output_scale if is_integer else None,
        output_zero_point=found.output_zero_point if is_integer else None,
    )


def _call(node: fx.Node, alike: dict[str, Any]) -> Fusion:
    call = read(node)
    return Fusion(
        **alike,
        operator=call.family,
        input_dtype=_name(qdq.value(call.x).dtype),
        output_dtype=_name(call.output_dtype),
        weight_dtype="int8",
        macs=node.meta.get("x86q_macs"),
        input_scale=call.x_scale if call.is_static else None,
        input_zero_point=call.x_zero_point if call.is_static else None,
        output_scale=call.output_scale if call.has_int8_output else None,
        output_zero_point=call.output_zero_point if call.has_int8_output else None,
    )


def _is_recurrence(node: fx.Node) -> bool:
    return node.target in (RECURRENCE, PACKED_RECURRENCE)


def _recurrence(node: fx.Node, alike: dict[str, Any]) -> Fusion:
    """Of a recurrent layer's steps; those that no kernel of ours takes are the operator itself."""
    arguments = qdq.schema_arguments(node)
    output = outputs.read(node) if node.target is PACKED_RECURRENCE else outputs.FLOAT32
    is_integer = not output.dtype.is_floating_point
    return Fusion(
        **alike,
        operator=arguments["cell"],
        input_dtype=_dtype(arguments["x"]),
        weight_dtype="int8",
        output_dtype=_name(output.dtype),
        macs=macs.count(node),
        output_scale=output.scale if is_integer else None,
        output_zero_point=output.zero_point if is_integer else None,
    )


def _is_int8_lookup(node: fx.Node) -> bool:
    """Whether the node looks up rows of an int8 table."""
    table = qdq.constant(node.args[0]) if role(node) is Role.EMBEDDING else None
    return table is not None and table.dtype == torch.int8


def _lookup(node: fx.Node, alike: dict[str, Any]) -> Fusion:
    indices = _dtype(qdq.operand(node, 1))
    return Fusion(**alike, operator="embedding", input_dtype=indices, weight_dtype="int8", output_dtype="int8", macs=0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)
