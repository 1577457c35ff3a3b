"""Graphs of thousands of nodes: nothing recurses over them, and what is asked of a node is asked once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import fx, nn

import inductor_x86q
from inductor_x86q.graph import aliasing, qdq
from inductor_x86q.graph.library import CAT
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes import channels
from inductor_x86q.passes.images import cat
from inductor_x86q.quantization import convert, plan
from inductor_x86q.quantization.plan import Plan

aten = torch.ops.aten
LARGE = 4000  # above every limit of recursion


class Chain:
    """A graph that is written a call at a time, on one small image."""

    def __init__(self) -> None:
        self.module = nn.Module()
        self.module.weight = nn.Parameter(torch.zeros(4, 4, 1, 1))
        self.graph = fx.Graph()
        self.graph.owning_module = self.module
        self.x = self._valued(self.graph.placeholder("x"), torch.empty(1, 4, 2, 2, device="meta"))
        self.weight = self._valued(self.graph.get_attr("weight"), torch.empty(4, 4, 1, 1, device="meta"))

    def _valued(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        return node

    def call(self, target: Any, *arguments: Any, value: Any = None) -> fx.Node:
        default = torch.empty(1, 4, 2, 2, device="meta")
        return self._valued(self.graph.call_function(target, arguments), default if value is None else value)

    def convolution(self, x: fx.Node) -> fx.Node:
        return self.call(aten.conv2d.default, x, self.weight)

    def gated(self, x: fx.Node, links: int) -> fx.Node:
        for _ in range(links):
            x = self.call(aten.mul.Tensor, x, self.call(aten.sigmoid.default, x))
        return x

    def moved(self, x: fx.Node, links: int) -> fx.Node:
        for _ in range(links):
            x = self.call(aten.permute.default, x, [0, 1, 3, 2])
        return x


def visits(graph: fx.Graph) -> int:
    """How many functions of plan.py are called when a graph is planned."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename == plan.__file__

    sys.setprofile(profile)
    try:
        Plan(graph, lambda node: "static")
    finally:
        sys.setprofile(None)
    return count


def to_a_layer(links: int) -> fx.Graph:
    chain = Chain()
    chain.graph.output(chain.convolution(chain.gated(chain.convolution(chain.x), links)))
    return chain.graph


def to_an_output(links: int) -> fx.Graph:
    chain = Chain()
    chain.graph.output(chain.gated(chain.convolution(chain.x), links))
    return chain.graph


def moved(links: int) -> fx.Graph:
    chain = Chain()
    chain.graph.output(chain.convolution(chain.moved(chain.convolution(chain.x), links)))
    return chain.graph


def joined(links: int) -> fx.Graph:
    """Each link joins what it reads to itself and takes half of it."""
    chain = Chain()
    x = chain.convolution(chain.x)
    for _ in range(links):
        x = chain.call(aten.slice.Tensor, chain.call(aten.cat.default, [x, x], 1), 1, 0, 4)
    chain.graph.output(chain.convolution(x))
    return chain.graph


def repeated(links: int) -> fx.Graph:
    """Layers that all read one value."""
    chain = Chain()
    x = chain.convolution(chain.x)
    chain.graph.output([chain.convolution(x) for _ in range(links)])
    return chain.graph


@pytest.mark.parametrize("graph", [to_a_layer, to_an_output, moved, joined, repeated])
def test_the_plan_costs_as_much_as_the_graph_is_large(graph: Callable[[int], fx.Graph]) -> None:
    small, large = visits(graph(20)), visits(graph(40))
    assert large < 2.2 * small and small < 20 * 100
    assert visits(graph(LARGE)) < 1.1 * small * LARGE / 20


def test_what_stands_between_two_layers_is_planned_as_ever() -> None:
    chain = Chain()
    first = chain.convolution(chain.x)
    last = chain.gated(first, 40)
    chain.graph.output(chain.convolution(last))
    found = Plan(chain.graph, lambda node: "static")
    # The links hand float to each other, within one generated kernel that reads int8 and writes int8.
    assert found.wanted == {chain.x, first, last}
    assert found.slots(first) == [first] and found.slots(last) == [last]


def test_constants_are_the_same_in_one_go() -> None:
    chain = Chain()
    factor = chain.call(aten.mul.Tensor, chain.weight, chain.weight)
    made = chain.call(aten.ones.default, [4])  # of no input
    mixed = chain.call(aten.mul.Tensor, factor, made)
    chain.graph.output([chain.convolution(chain.x), mixed, factor])
    assert qdq.constants(chain.graph) == {node for node in chain.graph.nodes if qdq.is_constant(node)}
    assert factor in qdq.constants(chain.graph) and mixed not in qdq.constants(chain.graph)


class Gated(nn.Module):
    def __init__(self, links: int) -> None:
        super().__init__()
        self.links = links
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolutions[0](x)
        for _ in range(self.links):
            x = x * torch.sigmoid(x)
        return self.convolutions[1](x)


def test_forty_gates_quantize() -> None:
    x = torch.randn(2, 3, 4, 4)
    quantized = inductor_x86q.quantize(Gated(40).eval(), (x,), calibration=[x])
    assert sum(qdq.is_quantize(node) for node in quantized.graph.nodes) == 3


# --- passes and what they ask -----------------------------------------------------------------------------------------


def test_memory_is_looked_up_through_thousands_of_views() -> None:
    chain = Chain()
    first = chain.call(aten.neg.default, chain.x)
    last = chain.moved(first, LARGE)
    reader = chain.call(aten.neg.default, last)
    chain.graph.output(reader)
    assert aliasing.base(last) is first
    assert aliasing.readers(first) == {reader}


def test_constants_are_evaluated_through_thousands_of_nodes() -> None:
    chain = Chain()
    node = chain.weight
    for _ in range(LARGE):
        node = chain.call(aten.add.Tensor, node, 1.0)
    chain.graph.output(node)
    chain.module.weight.requires_grad_(False)
    assert bool((convert._evaluate(node, {}) == LARGE).all())


def half(chain: Chain, x: fx.Node) -> fx.Node:
    doubled = chain.call(aten.cat.default, [x, x], 1, value=torch.empty(1, 8, 2, 2, device="meta"))
    return chain.call(aten.slice.Tensor, doubled, 1, 2, 6)


def test_channels_are_traced_through_thousands_of_nodes() -> None:
    chain = Chain()
    first = x = chain.call(aten.neg.default, chain.x)
    for _ in range(LARGE + 1):
        x = half(chain, x)
    # Each link turns the channels by two.
    assert channels._origins(x) == [(first, channel) for channel in (2, 3, 0, 1)]
    assert isinstance(channels._orderings(first), No)  # nothing reads the last one
    chain.call(qdq.DEQUANTIZE, x)
    assert channels._orderings(first) == {node for node in chain.graph.nodes if node.target in (
        aten.neg.default, aten.cat.default, aten.slice.Tensor)}  # fmt: skip


def test_cats_are_flattened_through_thousands_of_nodes() -> None:
    chain = Chain()
    images = [chain.call(aten.neg.default, chain.x) for _ in range(3)]
    whole = images[0]
    for number in range(LARGE):
        whole = chain.call(CAT, [whole, images[number % 3]])
    assert cat._images(whole) == [images[0], *(images[number % 3] for number in range(LARGE))]
    assert len(list(cat._beginning_with(images[0]))) == LARGE
