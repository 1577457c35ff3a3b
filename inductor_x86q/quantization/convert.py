"""From a calibrated graph to the q/dq graph: weights in int8 or bfloat16, rows with scales of their own, what stays float."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import aliasing, operators, qdq
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.graph.origin import layer
from inductor_x86q.graph.quantized_graph import QuantizedGraph
from inductor_x86q.quantization import rows, specs

aten = torch.ops.aten


def fold_weights(converted: fx.GraphModule) -> None:
    """Stores each weight in int8 under its own name, with `_scale` and `_zero_point` beside it, and drops the float one."""
    graph = converted.graph
    for node in list(graph.nodes):
        if not qdq.is_quantize(node) or not qdq.is_constant(node):
            continue
        name = _weight_name(node)
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            integers = _evaluate(node, values)
        parameters = qdq.qparams(node)
        stored = {f"{name}_int8": integers}
        for suffix, value in (("scale", parameters.scale), ("zero_point", parameters.zero_point)):
            if isinstance(value, fx.Node):
                stored[f"{name}_{suffix}"] = values[value]
        nodes = {key: qdq.store(converted, key, tensor, node) for key, tensor in stored.items()}
        for dequantize in list(node.users):
            for old, suffix in ((parameters.scale, "scale"), (parameters.zero_point, "zero_point")):
                if isinstance(old, fx.Node):
                    dequantize.replace_input_with(old, nodes[f"{name}_{suffix}"])
        node.replace_all_uses_with(nodes[f"{name}_int8"])
        qdq.erase_dead(node)
    graph.eliminate_dead_code()
    converted.recompile()


def quantize_per_token(converted: fx.GraphModule) -> None:
    """Gives each row of an input its own scale, symmetric around the middle of the range, where a layer asks for it."""
    graph = converted.graph
    for node in list(graph.nodes):
        if node.target is not qdq.DEQUANTIZE_TENSOR:
            continue
        if not any(user.meta.get(specs.GRANULARITY) == "per_token" for user in node.users):
            continue
        quantize: Any = node.args[0]
        parameters = qdq.qparams(node)
        with graph.inserting_before(node):
            new = rows.quantize_dequantize(quantize.args[0], parameters.quant_min, parameters.quant_max, like=node)
        node.replace_all_uses_with(new)
        qdq.erase_dead(node)
    converted.recompile()


def convert_to_bfloat16(converted: fx.GraphModule) -> None:
    """Converts what a layer reads that is to compute in bfloat16, and its result back to float32."""
    graph = converted.graph
    for node in list(graph.nodes):
        if not node.meta.get(specs.IN_BFLOAT16):
            continue
        for operand in list(node.all_input_nodes):
            constant = qdq.constant(operand)
            if constant is None:
                with graph.inserting_before(node):
                    new = graph.call_function(aten.to.dtype, (operand, torch.bfloat16))
                qdq.copy_origin(new, node)
            else:
                new = qdq.store(converted, f"{operand.target}_bfloat16", constant.bfloat16(), node)
            node.replace_input_with(operand, new)
            qdq.erase_dead(operand)
        with graph.inserting_after(node):
            widened = graph.call_function(aten.to.dtype, (node, torch.float32))
        qdq.copy_origin(widened, node)
        node.replace_all_uses_with(widened, delete_user_cb=lambda user, widened=widened: user is not widened)
    converted.recompile()


def freeze_parameters(quantized: QuantizedGraph) -> None:
    """Gives the graph parameters of its own, without gradients, and buffers that it writes into: those that it was exported with
    are the model's."""
    for node in quantized.graph.find_nodes(op="get_attr"):
        tensor = qdq.constant(node)
        if tensor is not None and not isinstance(tensor, torch.nn.Parameter) and aliasing.is_variable(node):
            setattr(quantized, str(node.target), tensor.detach().clone())
    own: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(quantized.named_parameters(remove_duplicate=False)):
        if id(parameter) not in own:
            own[id(parameter)] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(quantized, name, own[id(parameter)])


def _weight_name(node: fx.Node) -> str:
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node that is computed of constants alone; what it is computed of is added to `values`."""
    for current in sorted({node, *qdq.compute_ancestors(node)}):  # in the order of the graph
        if current in values:
            continue
        if current.op == "get_attr":
            values[current] = qdq.constant(current)
        else:
            arguments, keywords = fx.map_arg((current.args, current.kwargs), values.__getitem__)
            values[current] = qdq.evaluate(current, *arguments, **keywords)
    return values[node]


def left_out(converted: fx.GraphModule) -> list[str]:
    """The layers of a q/dq graph that compute products in float."""
    names = []
    for node in converted.graph.nodes:
        if role(node) in _PRODUCTS and any(role(factor) is not Role.DEQUANTIZE for factor in operators.factors(node)):
            names.append(f"{layer(node)} ({operators.own_name(node)})")
    return names


_PRODUCTS = frozenset({
    Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION, Role.LINEAR, Role.PRODUCT, Role.ATTENTION, Role.RECURRENT,
})  # fmt: skip
