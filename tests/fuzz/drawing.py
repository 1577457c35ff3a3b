"""Random q/dq graphs, drawn by hypothesis or evenly, a line at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.catalogue import STEPS
from tests.fuzz.draft import fits
from tests.fuzz.graphs import Graph
from tests.fuzz.steps import Steps

MOST_ELEMENTS = 4096


@st.composite
def graphs(draw: Any) -> Graph:
    """Random graphs as a hypothesis strategy."""
    return drawn(lambda low, high: draw(st.integers(low, high)))


def random_graph(generator: random.Random) -> Graph:
    """A random graph, drawn evenly; what hypothesis draws repeats itself, so that it can be made small."""
    return drawn(generator.randint)


def drawn(number: Callable[[int, int], int], most_steps: int = 7) -> Graph:
    """A graph; it has at least one operator, and everything it computes is an output or is used."""
    draft = Steps(number)
    batch = draft.pick(2, 3) if draft.dynamic_batch else 0 if draft.chance(3) else draft.pick(2, 1, 3)
    rank = draft.pick(4, 4, 4, 2, 3, 5)
    channels = draft.pick(4, 1, 2, 3, 8, 13, 16)
    image = {
        2: (),
        3: (draft.number(1, 11),),
        4: (draft.number(1, 7), draft.number(1, 7)),
        5: (3, draft.number(1, 4), 3),
    }[rank]
    for _ in range(draft.pick(1, 1, 2)):
        draft.input((batch, channels, *image))
    for _ in range(draft.number(1, most_steps)):
        step = draft.pick(*STEPS)
        before = len(draft.floats)
        getattr(draft, step)()
        # What grew too large to be run quickly, or left the range of float32, is nothing to build on.
        draft.floats = (
            draft.floats[:before] + [n for n in draft.floats[before:] if _usable(draft.values[n])] or draft.floats
        )
    return _finished(draft)


def _usable(value: torch.Tensor) -> bool:
    return value.numel() <= MOST_ELEMENTS and fits(value, value.dtype)


def _finished(draft: Steps) -> Graph:
    names = [line.split(" = ")[0] for line in draft.lines]
    leaves = [name for name in names if name not in draft.read]
    more = [
        name
        for name in names
        if name in draft.read and not isinstance(draft.values[name], (tuple, list)) and draft.chance(8)
    ]
    outputs = leaves + more
    if not names:
        line = f"v{len(draft.values)} = torch.relu({draft.floats[-1]})"
        draft.lines.append(line)
        outputs = [line.split(" = ")[0]]
    return Graph(
        tuple(draft.constants), tuple(draft.inputs), tuple(draft.lines), tuple(outputs), draft.dynamic_batch,
        tuple(draft.kinds), frozenset(draft.defects), draft.products,
    )  # fmt: skip
