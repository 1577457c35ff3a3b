"""Attention and recurrent layers run on intervals."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from inductor_x86q.graph.qdq import SMALLEST_SCALE
from tests.fuzz import intervals as i
from tests.fuzz.intervals import Interval

TANH_ERROR = 3e-7  # absolute


def attention(
    target: Any, query: Any, key: Any, value: Any, mask: None, is_causal: bool, scale: float | None
) -> Interval:
    """A score that may lie anywhere gives weights of which one is right; the result lies among the values all the same."""
    value, keys = i.interval(value), i.movement(torch.Tensor.transpose, i.interval(key), -1, -2)
    scores = i.product(target, i.matrix_product(torch.matmul, query, keys), scale or value.shape[-1] ** -0.5)
    low, high = scores.low, scores.high
    if is_causal:
        hidden = torch.ones(low.shape[-2:], dtype=torch.bool).triu(1)
        low, high = (end.masked_fill(hidden, -math.inf) for end in (low, high))
    below = (low - high.amax(-1, keepdim=True), (high - low.amax(-1, keepdim=True)).clamp(max=0))
    least, most = (
        torch.round(255 * torch.exp(end) * (1 + sign * i.APPROXIMATION_ERROR))
        for end, sign in zip(below, (-1, 1), strict=True)
    )
    weights, doubt = (least + most) / 2, (most - least) / 2
    total, surely = weights.sum(-1, keepdim=True), least.sum(-1, keepdim=True).clamp(min=255)
    center = weights @ value.center / total
    apart = (value.center.unsqueeze(-3) - center.unsqueeze(-2)).abs()
    radius = ((doubt.unsqueeze(-1) * apart).sum(-2) + most @ value.radius) / surely
    error = (i.ACCUMULATION_ERROR + i.TERM_ERROR * low.shape[-1]) * (weights @ value.magnitude) / total
    ends = value.low.amin(-2, keepdim=True), value.high.amax(-2, keepdim=True)
    return Interval(*((center + sign * radius).clamp(*ends) for sign in (-1, 1))).widened(error)


# --- recurrent layers -------------------------------------------------------------------------------------------------


def recurrence(
    target: Any, cell: str, x: Any, hidden: Any, cell_state: Any, weight: Any, scale: Any, bias: Any, batch_first: bool
) -> list[Interval]:
    directions, _, size = weight.shape
    steps_first = i.movement(lambda v: v.transpose(0, 1) if batch_first else v, i.interval(x))
    by_direction = i.movement(lambda v: v.unflatten(2, (directions, -1)).movedim(2, 1), steps_first)
    steps, _, batch, _ = by_direction.shape
    zeros = torch.zeros(directions, batch, size)
    states = [i.interval(zeros if state is None else state) for state in (hidden, cell_state)[: 1 + (cell == "lstm")]]
    matrix, factors = weight.double().mT, scale.double()[:, None]
    behind: list[list[Interval]] = [[] for _ in range(directions)]
    for step in range(steps):
        at = (step, steps - 1 - step)[:directions]
        given = i.movement(lambda v: torch.stack([v[time, d] for d, time in enumerate(at)]), by_direction)  # noqa: B023
        states = _CELLS[cell](given, _state_product(states[0], matrix, factors), states, bias)
        for direction in range(directions):
            behind[direction].append(i.item(operator.getitem, states[0], direction))
    in_time = [i.movement(torch.stack, hiddens[:: -1 if d else 1]) for d, hiddens in enumerate(behind)]
    output = i.movement(torch.cat, in_time, -1)
    return [i.movement(lambda v: v.transpose(0, 1) if batch_first else v, output), i.movement(torch.stack, states)]


def _state_product(hidden: Interval, matrix: torch.Tensor, factors: torch.Tensor) -> Interval:
    """Each row rounded by the greatest of its magnitudes, which lies in an interval too, and multiplied."""
    least, most = (
        end.amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
        for end in (i.absolute(None, hidden).low, i.absolute(None, hidden).high)
    )
    steps = i.product(None, hidden, Interval(127 / most, 127 / least))
    rounded = Interval(*(torch.round(end.clamp(-127, 127)) for end in (steps.low, steps.high)))
    sums = i.matrix_product(torch.matmul, rounded, matrix)
    return i.product(None, i.product(None, sums, factors), Interval(least / 127, most / 127))


def _sigmoid(*addends: Interval) -> Interval:
    return i.monotone(torch.sigmoid, _sum(*addends))


def _tanh(*addends: Interval) -> Interval:
    # Of what is close to 0 kernels subtract two numbers close to 1.
    result = i.monotone(torch.tanh, _sum(*addends))
    return result.widened(torch.full_like(result.low, TANH_ERROR))


def _sum(x: Interval, y: Interval | None = None) -> Interval:
    return x if y is None else i.addition(None, x, y)


def _lstm(x: Interval, product: Interval, states: list[Interval], bias: Any) -> list[Interval]:
    input_, forget, candidate, output = i.movement(torch.chunk, _sum(x, product), 4, -1)
    kept = i.product(None, _sigmoid(forget), states[1])
    cell = _sum(kept, i.product(None, _sigmoid(input_), _tanh(candidate)))
    return [i.product(None, _sigmoid(output), _tanh(cell)), cell]


def _gru(x: Interval, product: Interval, states: list[Interval], bias: Any) -> list[Interval]:
    x_reset, x_update, x_new = i.movement(torch.chunk, x, 3, -1)
    reset, update, new = i.movement(torch.chunk, product, 3, -1)
    if bias is not None:
        new = _sum(new, i.interval(bias[:, None]))
    candidate = _tanh(x_new, i.product(None, _sigmoid(x_reset, reset), new))
    share = _sigmoid(x_update, update)
    # Between the two, whatever the share: the ends of it give the ends of that.
    lows, highs = (
        torch.stack([a + (b - a) * end.clamp(0, 1) for end in (share.low, share.high)])
        for a, b in ((candidate.low, states[0].low), (candidate.high, states[0].high))
    )
    result = Interval(lows.amin(0), highs.amax(0))
    return [result.widened(i.POINTWISE_ERROR * (candidate.magnitude + states[0].magnitude))]


def _rnn(activation: Callable[..., Interval]) -> Callable[..., list[Interval]]:
    return lambda x, product, states, bias: [activation(x, product)]


_CELLS: dict[str, Callable[..., list[Interval]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn(_tanh),
    "rnn_relu": _rnn(lambda *addends: i.exactly_monotone(torch.relu, _sum(*addends))),
}
