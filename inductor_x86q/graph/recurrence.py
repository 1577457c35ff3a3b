"""Operators of ours for recurrent layers: the steps of an LSTM, GRU or RNN on int8 weights.

`inductor_x86q::recurrence` takes what a linear makes of a layer's input, for all steps at once, and goes through the steps:
it rounds the hidden state to 8 bits, each row with a scale of its own, multiplies it by the weight, and computes gates and
states in float. Run eagerly it says exactly what is computed.

`inductor_x86q::recurrence_packed` is the same and brings what a kernel of ours reads of the layer: its constants, and the text
of what they are (`kernels.recurrence`). It may end in a quantize of the output, but not of the states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_x86q.graph import outputs
from inductor_x86q.graph.definitions import LIBRARY, define
from inductor_x86q.graph.qdq import SMALLEST_SCALE

States = tuple[torch.Tensor, ...]


def _lstm(x: torch.Tensor, product: torch.Tensor, states: States, bias: torch.Tensor | None) -> States:
    input_, forget, candidate, output = (x + product).chunk(4, -1)
    cell = forget.sigmoid() * states[1] + input_.sigmoid() * candidate.tanh()
    return output.sigmoid() * cell.tanh(), cell


def _gru(x: torch.Tensor, product: torch.Tensor, states: States, bias: torch.Tensor | None) -> States:
    (x_reset, x_update, x_new), (reset, update, new) = x.chunk(3, -1), product.chunk(3, -1)
    if bias is not None:
        new = new + bias[:, None]
    candidate = (x_new + (x_reset + reset).sigmoid() * new).tanh()
    return (candidate + (x_update + update).sigmoid() * (states[0] - candidate),)


# What a cell makes of what the input and the state's product give, and of its states: the next ones, the hidden one first.
CELLS: dict[str, Callable[[torch.Tensor, torch.Tensor, States, torch.Tensor | None], States]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda x, product, states, bias: ((x + product).tanh(),),
    "rnn_relu": lambda x, product, states, bias: ((x + product).relu(),),
}


def state_count(cell: str) -> int:
    """How many states a cell has: an LSTM a hidden one and a cell state."""
    return 2 if cell == "lstm" else 1


def _product(hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The hidden state, each row rounded to -127 … 127, by the weight; sums of its integers are exact as a rule."""
    largest = hidden.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    rounded = (hidden * (127 / largest)).round()
    return (rounded @ weight) * (scale[:, None] * (largest / 127))


def _recurrence(
    cell: str,
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    cell_state: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    directions, _, size = weight.shape
    steps_first = (x.transpose(0, 1) if batch_first else x).float()
    count, batch, _ = steps_first.shape
    by_direction = steps_first.unflatten(2, (directions, -1)).movedim(2, 1)  # step, direction, row, gates
    zeros = steps_first.new_zeros(directions, batch, size)
    given = (hidden, cell_state)[: state_count(cell)]
    states: States = tuple(zeros if state is None else state.float() for state in given)
    matrix = weight.float().mT
    outputs: list[list[torch.Tensor]] = [[] for _ in range(directions)]
    for step in range(count):
        at = (step, count - 1 - step)[:directions]
        inputs = torch.stack([by_direction[time, direction] for direction, time in enumerate(at)])
        states = CELLS[cell](inputs, _product(states[0], matrix, scale), states, bias)
        for direction in range(directions):
            outputs[direction].append(states[0][direction])
    in_time = [torch.stack(hiddens[:: -1 if direction else 1]) for direction, hiddens in enumerate(outputs)]
    output = torch.cat(in_time, -1)
    return (output.transpose(0, 1).contiguous() if batch_first else output), torch.stack(states)


def _packed(constants: torch.Tensor, specification: str, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    of_recurrence, of_output = arguments[:-5], arguments[-5:]
    output, states = _recurrence(*of_recurrence)
    return outputs.rounded(output, *of_output), states


def _shapes(
    cell: str, x: torch.Tensor, hidden: object, cell_state: object, weight: torch.Tensor, scale: object, bias: object,
    batch_first: bool, *of_output: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    directions, _, size = weight.shape
    batch = x.shape[0] if batch_first else x.shape[1]
    dtype = of_output[-1] if of_output else torch.float32
    output = x.new_empty([*x.shape[:2], directions * size], dtype=dtype)
    return output, x.new_empty([state_count(cell), directions, batch, size], dtype=torch.float32)


_ARGUMENTS = (
    "str cell, Tensor x, Tensor? hidden, Tensor? cell_state, Tensor weight, Tensor scale, Tensor? bias, "
    "bool batch_first"
)
define(f"recurrence({_ARGUMENTS}) -> (Tensor, Tensor)", _recurrence)
torch.library.register_fake("inductor_x86q::recurrence", _shapes, lib=LIBRARY)
RECURRENCE = torch.ops.inductor_x86q.recurrence.default

define(
    f"recurrence_packed(Tensor constants, str specification, {_ARGUMENTS}, {outputs.SCHEMA}) -> (Tensor, Tensor)",
    _packed,
)
torch.library.register_fake("inductor_x86q::recurrence_packed", lambda _, __, *rest: _shapes(*rest), lib=LIBRARY)
PACKED_RECURRENCE = torch.ops.inductor_x86q.recurrence_packed.default
