"""Recurrent layers in front of quantizing: their steps become an operator of ours on int8 weights, the rest linears.

What a layer's input adds to the gates is one linear for all steps and both directions, quantized like any other. What the
state of the step before adds is a product of every step: its weight is rounded here, the state at run time, so that no
calibration is needed. Cells, which compute one step, become two linears and what follows them.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.graph.recurrence import RECURRENCE, state_count

log = logging.getLogger(__name__)
aten = torch.ops.aten

LAYERS: dict[Any, str] = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn_tanh",
    aten.rnn_relu.input: "rnn_relu",
}
CELLS: dict[Any, str] = {
    aten.lstm_cell.default: "lstm",
    aten.gru_cell.default: "gru",
    aten.rnn_tanh_cell.default: "rnn_tanh",
    aten.rnn_relu_cell.default: "rnn_relu",
}
_SMALLEST_SCALE = 2.0**-24  # of a row of zeros


def rewrite(model: fx.GraphModule, is_float: Callable[[fx.Node], bool], *, bits: int) -> list[fx.Node]:
    """Rewrites all recurrent layers and cells but those that stay float; gives those that are to be left out.

    Args:
        bits: of a weight.
    """
    excluded = []
    for node in list(model.graph.nodes):
        if node.target not in LAYERS and node.target not in CELLS:
            continue
        if is_float(node):
            excluded.append(node)
        elif node.target in CELLS:
            _rewrite_cell(node)
        elif why := _obstacle(node):
            log.info("not quantized, stays float: %s (%s)", layer_of(node), why)
        else:
            _rewrite_layer(model, node, bits)
    model.graph.eliminate_dead_code()
    model.recompile()
    return excluded


def _obstacle(node: fx.Node) -> str:
    """Why a layer stays float; empty where it need not."""
    arguments = qdq.schema_arguments(node)
    directions = 2 if arguments["bidirectional"] else 1
    of_direction = len(arguments["params"]) // directions // arguments["num_layers"]
    if of_direction != (4 if arguments["has_biases"] else 2):
        return "it has a projection"
    if arguments["train"] and arguments["dropout"]:
        return "it has dropout in training"
    if any(qdq.constant(parameter) is None for parameter in arguments["params"]):
        return "its weights are not constant"
    return ""


@dataclasses.dataclass(frozen=True)
class _Direction:
    """The parameters of a layer's direction."""

    input_weight: fx.Node
    weight: fx.Node
    input_bias: fx.Node | None = None
    bias: fx.Node | None = None


def _rewrite_layer(model: fx.GraphModule, node: fx.Node, bits: int) -> None:
    arguments = qdq.schema_arguments(node)
    cell, parameters = LAYERS[node.target], list(arguments["params"])
    per_direction, directions = (4 if arguments["has_biases"] else 2), (2 if arguments["bidirectional"] else 1)
    each = [_Direction(*parameters[i : i + per_direction]) for i in range(0, len(parameters), per_direction)]
    given = arguments["hx"] if cell == "lstm" else [arguments["hx"]]
    output, states, stack = arguments["input"], [], node.meta.get("nn_module_stack") or {}
    with node.graph.inserting_before(node):
        for layer in range(arguments["num_layers"]):
            own = each[layer * directions : (layer + 1) * directions]
            initial = [_of_layer(state, layer, directions, arguments["num_layers"]) for state in given]
            if arguments["num_layers"] > 1:
                node.meta["nn_module_stack"] = _inside(stack, layer)  # which all that is made for the layer is given
            steps = _layer(model, node, cell, own, output, initial, arguments["batch_first"], bits)
            output, state = (qdq.call(operator.getitem, steps, i, like=steps) for i in range(2))
            states.append(state)
        node.meta["nn_module_stack"], results = stack, [output]
        for kind in range(state_count(cell)):
            of_layers = [qdq.call(aten.select.int, state, 0, kind, like=node) for state in states]
            results.append(of_layers[0] if len(of_layers) == 1 else qdq.call(aten.cat.default, of_layers, like=node))
    for user in list(node.users):
        number: Any = user.args[1]
        user.replace_all_uses_with(results[number])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _inside(stack: dict[str, Any], number: int) -> dict[str, Any]:
    """Where a layer of several is said to be: in a module of its own, named as in the names of its parameters."""
    if not stack:
        return stack
    key, (path, kind) = list(stack.items())[-1]
    return {**stack, f"{key}_l{number}": (f"{path}.l{number}", kind)}


def _of_layer(state: fx.Node, number: int, directions: int, layers: int) -> fx.Node | None:
    """What a layer's directions begin with; None for zeros."""
    if state.target is aten.zeros.default:
        return None
    if layers == 1:
        return state
    return qdq.call(aten.slice.Tensor, state, 0, number * directions, (number + 1) * directions, like=state)


def _layer(
    model: fx.GraphModule,
    node: fx.Node,
    cell: str,
    directions: list[_Direction],
    x: fx.Node,
    initial: list[fx.Node | None],
    batch_first: bool,
    bits: int,
) -> fx.Node:
    """One layer: its linear and its steps."""

    def store(like: fx.Node | None, suffix: str, tensor: torch.Tensor | None) -> fx.Node | None:
        return None if tensor is None or like is None else qdq.store(model, f"{like.target}_{suffix}", tensor, node)

    first = directions[0]
    input_weight: fx.Node | None = first.input_weight
    if len(directions) > 1:
        whole = torch.cat([_value(direction.input_weight) for direction in directions])
        input_weight = store(input_weight, "both", whole)
    weight = torch.stack([_value(direction.weight) for direction in directions])
    most = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(-1) / most).clamp(min=_SMALLEST_SCALE)
    integers = (weight / scale[..., None]).round().clamp(-most, most).to(torch.int8)
    input_bias, bias = _biases(cell, directions, weight.shape[-1])
    gates = qdq.call(aten.linear.default, x, input_weight, store(first.input_bias, "whole", input_bias), like=node)
    stored = (
        store(first.weight, "int8", integers),
        store(first.weight, "scale", scale),
        store(first.bias, "new", bias),
    )
    hidden, cell_state = (*initial, None)[:2]
    return qdq.call(RECURRENCE, cell, gates, hidden, cell_state, *stored, batch_first, like=node)


def _biases(cell: str, directions: list[_Direction], hidden: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the input's linear adds, for all directions, and what the product of the last gate has, a row a direction.

    Both biases of a gate are added up, but for the last of a GRU, which multiplies the one behind the product.
    """
    if directions[0].bias is None:
        return None, None
    of_input = [_value(direction.input_bias) for direction in directions]
    of_product = [_value(direction.bias) for direction in directions]
    if cell != "gru":
        return torch.cat([a + b for a, b in zip(of_input, of_product, strict=True)]), None
    first = [torch.cat([b[:-hidden], torch.zeros(hidden)]) for b in of_product]
    return (
        torch.cat([a + b for a, b in zip(of_input, first, strict=True)]),
        torch.stack([b[-hidden:] for b in of_product]),
    )


def _value(parameter: fx.Node | None) -> torch.Tensor:
    found = qdq.constant(parameter)
    assert found is not None
    return found.detach()


# --- cells ------------------------------------------------------------------------------------------------------------


def _rewrite_cell(node: fx.Node) -> None:
    """A cell's two linears, and what follows them."""
    arguments, cell = qdq.schema_arguments(node), CELLS[node.target]
    states = arguments["hx"] if cell == "lstm" else [arguments["hx"]]

    def call(target: Any, *operands: Any) -> Any:
        return qdq.call(target, *operands, like=node)

    def parts(gates: fx.Node, count: int) -> list[fx.Node]:
        chunks = call(aten.chunk.default, gates, count, 1)
        return [call(operator.getitem, chunks, i) for i in range(count)]

    def sigmoid(*addends: fx.Node) -> fx.Node:
        return call(aten.sigmoid.default, call(aten.add.Tensor, *addends) if len(addends) > 1 else addends[0])

    with node.graph.inserting_before(node):
        of_input = call(aten.linear.default, arguments["input"], arguments["w_ih"], arguments["b_ih"])
        product = call(aten.linear.default, states[0], arguments["w_hh"], arguments["b_hh"])
        if cell == "gru":
            (x_reset, x_update, x_new), (reset, update, new) = parts(of_input, 3), parts(product, 3)
            gated = call(aten.mul.Tensor, sigmoid(x_reset, reset), new)
            candidate = call(aten.tanh.default, call(aten.add.Tensor, x_new, gated))
            kept = call(aten.mul.Tensor, sigmoid(x_update, update), call(aten.sub.Tensor, states[0], candidate))
            results = [call(aten.add.Tensor, candidate, kept)]
        elif cell == "lstm":
            input_, forget, candidate, output = parts(call(aten.add.Tensor, product, of_input), 4)
            added = call(aten.mul.Tensor, sigmoid(input_), call(aten.tanh.default, candidate))
            cell_state = call(aten.add.Tensor, call(aten.mul.Tensor, sigmoid(forget), states[1]), added)
            results = [call(aten.mul.Tensor, sigmoid(output), call(aten.tanh.default, cell_state)), cell_state]
        else:
            activation = aten.tanh.default if cell == "rnn_tanh" else aten.relu.default
            results = [call(activation, call(aten.add.Tensor, product, of_input))]
    if cell != "lstm":
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        number: Any = user.args[1]
        user.replace_all_uses_with(results[number])
        node.graph.erase_node(user)
    node.graph.erase_node(node)
