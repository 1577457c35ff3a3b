"""Descriptions of the graph while it is frozen: computed anew where something changed, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from inductor_x86q import _torch

aten = torch.ops.aten


class Propagated:
    """conv → relu → cast, and the input's relu beside it; `run` gives the names of the nodes that were computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        root = torch.nn.Module()
        root.register_buffer("weight", torch.randn(8, 4, 3, 3))
        graph = fx.Graph()
        self.x = graph.placeholder("x")
        weight = graph.get_attr("weight")
        arguments = (self.x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

        def call(name: str, target: Any, arguments: Any, keywords: Any = None) -> fx.Node:
            return graph.create_node("call_function", target, arguments, keywords, name=name)

        self.conv = call("conv", aten.convolution.default, arguments)
        self.relu = call("relu", aten.relu.default, (self.conv,))
        self.cast = call("cast", aten._to_copy.default, (self.relu,), {"dtype": torch.bfloat16})
        self.beside = call("beside", aten.relu.default, (self.x,))
        graph.output((self.cast, self.beside))
        self.module = fx.GraphModule(root, graph)
        self.mode = FakeTensorMode()
        self.inputs = [self.mode.from_tensor(torch.randn(2, 4, 8, 8))]
        self.stock_calls: list[Any] = []
        self.propagate = _torch._remembering_fake_tensor_prop(lambda *arguments: self.stock_calls.append(arguments))
        self._computed: list[str] = []
        stock = FakeTensorProp.run_node

        def run_node(propagation: Any, node: fx.Node) -> Any:
            if node.op == "call_function":
                self._computed.append(node.name)
            return stock(propagation, node)

        monkeypatch.setattr(FakeTensorProp, "run_node", run_node)

    def run(self) -> list[str]:
        self._computed.clear()
        assert self.propagate(self.module, self.inputs, True) is self.mode
        assert not self.mode.allow_non_fake_inputs
        return list(self._computed)


@pytest.fixture
def propagated(monkeypatch):
    return Propagated(monkeypatch)


def test_the_second_run_computes_nothing(propagated):
    assert propagated.run() == ["conv", "relu", "cast", "beside"]
    described = propagated.cast.meta["val"]
    assert described.shape == (2, 8, 6, 6) and described.dtype == torch.bfloat16
    assert propagated.run() == []
    assert propagated.cast.meta["val"] is described


def test_a_changed_argument_is_computed_with_what_reads_it(propagated):
    propagated.run()
    propagated.conv.update_arg(4, [1, 1])
    assert propagated.run() == ["conv", "relu", "cast"]
    assert propagated.cast.meta["val"].shape == (2, 8, 8, 8)


def test_what_reads_a_node_that_stays_alike_is_not_computed(propagated):
    propagated.run()
    propagated.relu.target = aten.sigmoid.default
    assert propagated.run() == ["relu"]


def test_a_constant_in_another_layout_reaches_the_end(propagated):
    propagated.run()
    propagated.module.weight = propagated.module.weight.contiguous(memory_format=torch.channels_last)
    assert propagated.run() == ["conv", "relu", "cast"]
    assert propagated.cast.meta["val"].is_contiguous(memory_format=torch.channels_last)


def test_a_new_node_and_an_input_of_another_shape(propagated):
    propagated.run()
    with propagated.module.graph.inserting_after(propagated.relu):
        new = propagated.module.graph.call_function(aten.neg.default, (propagated.relu,))
    propagated.cast.replace_input_with(propagated.relu, new)
    assert propagated.run() == ["neg_default", "cast"]
    propagated.inputs = [propagated.mode.from_tensor(torch.randn(3, 4, 8, 8))]
    assert propagated.run() == ["conv", "relu", "neg_default", "cast", "beside"]
    assert propagated.beside.meta["val"].shape == (3, 4, 8, 8)


def test_a_description_that_a_pass_dropped_or_set_is_computed(propagated):
    propagated.run()
    del propagated.relu.meta["val"]
    propagated.cast.meta["val"] = propagated.conv.meta["val"]
    assert propagated.run() == ["relu", "cast"]
    assert propagated.relu.meta["val"].shape == (2, 8, 6, 6)
    assert propagated.cast.meta["val"].dtype == torch.bfloat16


def test_the_run_before_lowering_is_inductors_own(propagated):
    propagated.propagate(propagated.module, propagated.inputs)
    assert propagated.stock_calls == [(propagated.module, propagated.inputs, False)]
