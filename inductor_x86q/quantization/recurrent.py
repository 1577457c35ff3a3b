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
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.quantization import rows

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


def rewrite(model: fx.GraphModule, is_float: Callable[[fx.Node], bool], *, bits: int) -> list[fx.Node]:
    """Rewrites all recurrent layers and cells but those that stay float; gives those that are to be left out.

    Args:
        bits: of a weight.
    """
    excluded: list[fx.Node] = []
    stored: dict[str, fx.Node] = {}
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
            excluded += _Module(model, node, bits, stored).rewrite(is_float)
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


class _Module:
    """The layers of one operator, rewritten one after the other; `stored` are the constants of those before, by name."""

    def __init__(self, model: fx.GraphModule, node: fx.Node, bits: int, stored: dict[str, fx.Node]) -> None:
        self.model, self.node, self.bits, self.stored = model, node, bits, stored
        self.cell = LAYERS[node.target]
        self.given = arguments = qdq.schema_arguments(node)
        self.states = arguments["hx"] if self.cell == "lstm" else [arguments["hx"]]
        self.count, self.directions = arguments["num_layers"], 2 if arguments["bidirectional"] else 1
        self.parameters = len(arguments["params"]) // self.count  # of a layer

    def rewrite(self, is_float: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """Gives the layers that stay float."""
        node, x, states, left = self.node, self.given["input"], [], []
        stack = node.meta.get("nn_module_stack") or {}
        with node.graph.inserting_before(node):
            for number in range(self.count):
                if self.count > 1:
                    # Which all that is made for the layer is given.
                    node.meta["nn_module_stack"] = _inside(stack, number)
                if is_float(node):
                    x, after, layer = self._float_layer(number, x)
                    left.append(layer)
                else:
                    x, after = self._layer(number, x)
                states.append(after)
            node.meta["nn_module_stack"] = stack
            of_kinds = list(zip(*states, strict=True))
            last = [of[0] if self.count == 1 else self._call(aten.cat.default, list(of)) for of in of_kinds]
        _replace(node, [x, *last])
        return left

    def _call(self, target: Any, *arguments: Any) -> fx.Node:
        return qdq.call(target, *arguments, like=self.node)

    def _of(self, number: int) -> list[fx.Node]:
        """A layer's parameters."""
        found: list[fx.Node] = self.given["params"][number * self.parameters : (number + 1) * self.parameters]
        return found

    def _before(self, number: int) -> list[fx.Node]:
        """The states that a layer begins with."""
        if self.count == 1:
            return list(self.states)
        first, end = number * self.directions, (number + 1) * self.directions
        return [self._call(aten.slice.Tensor, state, 0, first, end) for state in self.states]

    def _float_layer(self, number: int, x: fx.Node) -> tuple[fx.Node, list[fx.Node], fx.Node]:
        given, before = self.given, self._before(number)
        directions = (1, 0.0, False, given["bidirectional"], given["batch_first"])
        hx = before if self.cell == "lstm" else before[0]
        arguments = (x, hx, self._of(number), given["has_biases"], *directions)
        target: Any = self.node.target
        layer = self.node.graph.call_function(target, arguments)
        qdq.copy_origin(layer, self.node)
        width = self.directions * int(qdq.value(before[0]).shape[-1])
        with fake_tensors.fake_mode(self.node.graph):  # in which the operator itself takes no open sizes
            output = qdq.value(x).new_empty([*qdq.value(x).shape[:2], width])
            layer.meta["val"] = (output, *(torch.empty_like(qdq.value(state)) for state in before))
        first, *after = (self._call(operator.getitem, layer, i) for i in range(1 + len(before)))
        return first, after, layer

    def _layer(self, number: int, x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """A layer's linear and its steps."""
        parameters = self._of(number)
        each = len(parameters) // self.directions
        directions = [_Direction(*parameters[i : i + each]) for i in range(0, len(parameters), each)]
        first = directions[0]
        input_weight: fx.Node | None = first.input_weight
        if len(directions) > 1:
            both = torch.cat([_value(direction.input_weight) for direction in directions])
            input_weight = self._store(first.input_weight, "both", both)
        weight = torch.stack([_value(direction.weight) for direction in directions])
        integers, scale = rows.rounded(weight, 2 ** (self.bits - 1) - 1)
        input_bias, bias = _biases(self.cell, directions, weight.shape[-1])
        gates = self._call(aten.linear.default, x, input_weight, self._store(first.input_bias, "whole", input_bias))
        constants = [
            self._store(like, suffix, tensor)
            for like, suffix, tensor in (
                (first.weight, "int8", integers),
                (first.weight, "scale", scale.squeeze(-1)),
                (first.bias, "new", bias),
            )
        ]
        zeros = all(state.target is aten.zeros.default for state in self.states)
        hidden, cell_state = (*([None] * len(self.states) if zeros else self._before(number)), None)[:2]
        steps = self._call(RECURRENCE, self.cell, gates, hidden, cell_state, *constants, self.given["batch_first"])
        output, after = (self._call(operator.getitem, steps, i) for i in range(2))
        return output, [self._call(aten.select.int, after, 0, kind) for kind in range(state_count(self.cell))]

    def _store(self, like: fx.Node | None, suffix: str, tensor: torch.Tensor | None) -> fx.Node | None:
        if tensor is None or like is None:
            return None
        name = f"{like.target}_{suffix}"
        if name not in self.stored:  # a module that is called twice has its constants once
            self.stored[name] = qdq.store(self.model, name, tensor, self.node)
        return self.stored[name]


def _inside(stack: dict[str, Any], number: int) -> dict[str, Any]:
    """Where a layer of several is said to be: in a module of its own, named as in the names of its parameters."""
    if not stack:
        return stack
    key, (path, kind) = list(stack.items())[-1]
    return {**stack, f"{key}_l{number}": (f"{path}.l{number}", kind)}


def _replace(node: fx.Node, results: list[fx.Node]) -> None:
    """Puts the results in the place of those that are picked from the node's."""
    for user in list(node.users):
        number: Any = user.args[1]
        user.replace_all_uses_with(results[number])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


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
    if cell == "lstm":
        _replace(node, results)
    else:
        node.replace_all_uses_with(results[0])
        node.graph.erase_node(node)
