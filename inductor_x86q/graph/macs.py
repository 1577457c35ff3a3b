"""How many multiply-accumulates a layer takes, by the shapes of what it reads and gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.operators import Role, role

Shape = Callable[[fx.Node], Sequence[Any]]  # of a node's value


def count(node: fx.Node, shape: Shape = lambda node: qdq.value(node).shape) -> int | None:
    """The multiply-accumulates of a layer; None where a size is not known when compiling."""
    counted = _COUNTS.get(role(node))
    total = None if counted is None else counted(node, shape)
    return int(total) if isinstance(total, int) else None


def _layer(node: fx.Node, shape: Shape) -> Any:
    """A convolution or linear, whose weight has its outputs first; of a transposed one each input has a product with each tap."""
    x, weight = operators.factors(node)
    transposed = role(node) is Role.TRANSPOSED_CONVOLUTION or qdq.schema_arguments(node).get("transposed", False)
    return math.prod(shape(x if transposed else node)) * math.prod(shape(weight)[1:])


def _product(node: fx.Node, shape: Shape) -> Any:
    _, second = operators.factors(node)
    return math.prod(shape(node)) * shape(second)[-2]


def _attention(node: fx.Node, shape: Shape) -> Any:
    """Of queries with keys and of weights with values."""
    query, key, value = (shape(argument) for argument in [*qdq.schema_arguments(node).values()][:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(node: fx.Node, shape: Shape) -> Any:
    """Of an LSTM's layer the input (steps, batch, width) and the hidden state, each by a matrix for each of its four gates;
    of our operator the hidden state alone, since a linear in front of it has the input."""
    arguments = qdq.schema_arguments(node)
    if "hidden_size" in arguments:
        *rows, width = shape(arguments["input"])
        return math.prod(rows) * 4 * arguments["hidden_size"] * (width + arguments["hidden_size"])
    return math.prod(shape(arguments["x"])[:2]) * math.prod(shape(arguments["weight"])) if "x" in arguments else None


_COUNTS: dict[Role | None, Callable[[fx.Node, Shape], Any]] = {
    **dict.fromkeys((Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION, Role.LINEAR, Role.LINEAR_16), _layer),
    **dict.fromkeys((Role.PRODUCT, Role.INTEGER_PRODUCT), _product),
    Role.ATTENTION: _attention,
    Role.RECURRENT: _recurrent,
}
