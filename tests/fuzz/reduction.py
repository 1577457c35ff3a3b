"""Making a failing graph small: fewer outputs, then inputs in the place of what was computed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import torch

from tests.fuzz.graphs import Graph

_NAME = re.compile(r"\b(?:self\.)?([vxc]\d+)\b")


def reduced(graph: Graph, fails: Callable[[Graph], bool], *, most_tries: int = 60) -> Graph:
    """A smaller graph that still fails; `graph` itself where none of `most_tries` smaller ones does."""
    tries = 0
    while True:
        for candidate in _smaller(graph):
            tries += 1
            if tries > most_tries:
                return graph
            if fails(candidate):
                graph = candidate
                break
        else:
            return graph


def _smaller(graph: Graph) -> Iterator[Graph]:
    if len(graph.outputs) > 1:
        for name in graph.outputs:
            yield without_dead_code(dataclasses.replace(graph, outputs=(name,)))
    if graph.dynamic_batch:
        yield dataclasses.replace(graph, dynamic_batch=False)
    for name, stand_in in reversed(_stand_ins(graph).items()):
        if name not in graph.outputs:
            # A new input stands for the value; nothing that computed it remains.
            lines = tuple(line.replace(line, f"{name} = x{name[1:]}00") if line.startswith(f"{name} = ") else line
                          for line in graph.lines)  # fmt: skip
            inputs = (*graph.inputs, (f"x{name[1:]}00", stand_in))
            smaller = without_dead_code(dataclasses.replace(graph, lines=lines, inputs=inputs))
            if len(smaller.lines) < len(graph.lines):
                yield smaller


def _stand_ins(graph: Graph) -> dict[str, str]:
    """For each float tensor that the graph computes an input of its shape and type."""
    everything = tuple(line.split(" = ")[0] for line in graph.lines)
    values = dataclasses.replace(graph, outputs=(*everything, "0")).module()(*graph.example(0))
    return {
        name: f"reals(SEED, {tuple(value.shape)}, -2.0, 2.0).to({value.dtype})"
        for name, value in zip(everything, values, strict=False)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def without_dead_code(graph: Graph) -> Graph:
    """The graph without lines, constants and inputs that no output needs; one input stays."""
    needed, lines = set(graph.outputs), []
    for line in reversed(graph.lines):
        name, expression = line.split(" = ", 1)
        if name in needed:
            lines.append(line)
            needed.update(_NAME.findall(expression))
    inputs = tuple(pair for pair in graph.inputs if pair[0] in needed) or graph.inputs[:1]
    constants = tuple(pair for pair in graph.constants if pair[0] in needed)
    return dataclasses.replace(graph, lines=tuple(reversed(lines)), inputs=inputs, constants=constants)
