"""quantize() and X86Quantizer: what gets quantized, and how it is stored."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import inductor_x86q
from inductor_x86q import inspection, testing
from inductor_x86q.graph import qdq
from inductor_x86q.graph.origin import layer
from inductor_x86q.quantization import torchao
from inductor_x86q.quantization.convert import left_out
from tests.models import Residual, image, quantized, residual


class Functional(nn.Module):
    """The same as Residual, of functional calls on bare parameters."""

    def __init__(self, other: Residual) -> None:
        super().__init__()
        self.weights = nn.ParameterList([other.first.weight, other.second.weight, other.head.weight])
        self.biases = nn.ParameterList([other.first.bias, other.second.bias, other.head.bias])
        self.norm = other.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(F.conv2d(x, self.weights[0], self.biases[0], padding=1)))
        x = torch.relu(F.conv2d(x, self.weights[1], self.biases[1], padding=1) + x)
        return F.linear(F.max_pool2d(x, 2).flatten(1), self.weights[2], self.biases[2])


class Convolution(nn.Conv2d):
    """A subclass, which source metadata does not know as a convolution."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def subclassed() -> nn.Module:
    model = residual()
    for name in ("first", "second"):
        old = getattr(model, name)
        new = Convolution(old.in_channels, old.out_channels, 3, padding=1)
        new.load_state_dict(old.state_dict())
        setattr(model, name, new)
    return model.eval()


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


def targets(graph_module: fx.GraphModule) -> list[str]:
    """The operators of a graph in order."""
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def prepared_and_converted(model: nn.Module, inputs: tuple[Any, ...], *, strict: bool) -> fx.GraphModule:
    """torchao's own steps with X86Quantizer, as those do it who do not use quantize()."""
    with torch.no_grad():
        exported = torch.export.export(model, inputs, strict=strict).module()
        prepared = torchao.prepare_pt2e(exported, inductor_x86q.X86Quantizer(reduce_range=True))
        prepared(*inputs)
        return inductor_x86q.convert(prepared)


def annotated(graph_module: fx.GraphModule) -> list[tuple[Any, ...]]:
    """The quantize nodes and the layers, in order, with what each quantizes to (the exports differ in copies and views)."""
    found: list[tuple[Any, ...]] = []
    for node in graph_module.graph.nodes:
        if qdq.is_quantize(node):
            found.append((str(node.target), qdq.qparams(node)))
        elif node.op == "call_function" and str(node.target).startswith(("aten.conv", "aten.linear", "aten.add")):
            found.append((str(node.target), *map(qdq.is_dequantize, node.args[:2])))
    return found


def int8_layers(graph_module: fx.GraphModule) -> int:
    """How many weights the graph reads in int8."""
    return sum(node.target is qdq.DEQUANTIZE_CHANNEL for node in graph_module.graph.nodes)


# --- the same graph however the model is written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(residual, (image(),)), (subclassed, (image(),)), (attention, (torch.randn(2, 6, 16),))],
    ids=["modules", "subclasses", "attention"],
)
def test_strict_and_non_strict_export_are_annotated_alike(
    build: Callable[[], nn.Module], inputs: tuple[Any, ...]
) -> None:
    graphs = [prepared_and_converted(build(), inputs, strict=strict) for strict in (True, False)]
    assert annotated(graphs[0]) == annotated(graphs[1])
    assert torch.equal(graphs[0](*inputs), graphs[1](*inputs))


@pytest.mark.parametrize("build", [subclassed, lambda: Functional(residual()).eval()], ids=["subclass", "functional"])
def test_spelling_of_the_model_does_not_matter(build: Callable[[], nn.Module]) -> None:
    inputs = (image(),)
    expected, got = quantized(residual(), inputs), quantized(build(), inputs)
    assert targets(got) == targets(expected)
    torch.testing.assert_close(got(*inputs), expected(*inputs), rtol=0, atol=0)


def test_residual_block_has_a_quantize_for_each_value_and_shares_it_across_the_pool() -> None:
    graph_module = quantized(residual(), (image(),))
    quantizes = [node for node in graph_module.graph.nodes if qdq.is_quantize(node)]
    # the input, relu of the first convolution, relu of the sum, behind the pool, behind flatten
    assert len(quantizes) == 5
    after_sum, after_pool, after_flatten = (qdq.qparams(node) for node in quantizes[2:])
    assert after_sum == after_pool == after_flatten
    assert all(qdq.qparams(node).dtype == torch.uint8 for node in quantizes)
    assert int8_layers(graph_module) == 3
    assert left_out(graph_module) == []


def test_attention_has_all_its_projections_in_int8() -> None:
    graph_module = quantized(attention(), (torch.randn(2, 6, 16),))
    assert int8_layers(graph_module) == 2  # query, key and value in one, and the output
    assert [name for name in left_out(graph_module) if "linear" in name] == []


class HeadsOfTheirOwn(nn.Module):
    """A linear, whose result each head multiplies by a constant matrix of its own, as relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.matrices = nn.Linear(16, 16), nn.Parameter(torch.randn(1, 4, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).unflatten(-1, (4, 4)).transpose(1, 2) @ self.matrices


def test_a_batch_of_different_matrices_is_no_linear() -> None:
    x = torch.randn(2, 6, 16)
    graph_module = quantized(HeadsOfTheirOwn().eval(), (x,))
    assert int8_layers(graph_module) == 1
    assert inductor_x86q.explain(graph_module, (x,)).missed == []


class OneMatrix(nn.Module):
    """A linear whose weight is a batch of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(1, 16, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


def test_a_batch_of_one_matrix_is_a_linear() -> None:
    x = torch.randn(2, 6, 16)
    graph_module = quantized(OneMatrix().eval(), (x,))
    assert int8_layers(graph_module) == 1
    result, report = inspection.run_fused(graph_module, (x,))
    assert len(report.fused) == 1
    with torch.no_grad():
        torch.testing.assert_close(result, graph_module(x))


def test_stays_close_to_float() -> None:
    model, x = residual(), image(16)
    with torch.no_grad():
        expected = model(x)
        error = quantized(model, (x,))(x) - expected
    assert 20 * torch.log10(expected.norm() / error.norm()) > 25


# --- ranges and storage -----------------------------------------------------------------------------------------------


def test_full_range_is_8_bits_of_everything() -> None:
    graph_module = inductor_x86q.quantize(residual(), (image(),), calibration=[image()], reduce_range=False)
    assert bits_of_layers(graph_module) == {"first": (8, 8), "second": (8, 8), "head": (8, 8)}


def test_reduced_range_takes_the_bit_from_the_weight_where_an_addition_makes_the_input() -> None:
    graph_module = inductor_x86q.quantize(residual(), (image(),), calibration=[image()], reduce_range=True)
    # A convolution that ends in an addition cannot clip to 7 bits: what reads the sum has 7-bit weights instead.
    assert bits_of_layers(graph_module) == {"first": (7, 8), "second": (7, 8), "head": (8, 7)}


def bits_of_layers(graph_module: torch.fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """The bits of each layer's input and weight."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
            x, weight = (qdq.qparams(node.args[i]) for i in (0, 1))
            name = layer(node)
            found[name] = tuple((p.quant_max - p.quant_min).bit_length() for p in (x, weight))
    return found


class Scaled(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.gamma = nn.Parameter(torch.linspace(-1, 2, math.prod(shape)).view(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x) * self.gamma))


@pytest.mark.parametrize(
    "shape, absorbed",
    [
        ((8, 1, 1), [("relu", "quantize"), ()]),
        # No weight takes up a map, nor what Inductor makes a number: the call ends in front of it, and is quantized there.
        ((6, 1), [("quantize",), ()]),
        ((1,), [("quantize",), ()]),
    ],
)
def test_a_constant_factor_of_each_channel_belongs_to_its_convolution(
    shape: tuple[int, ...], absorbed: list[tuple[str, ...]]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    report = inductor_x86q.explain(quantized(Scaled(*shape).eval(), (x,)), (x,))
    assert [fusion.absorbed for fusion in report.fused] == absorbed
    assert len(report.quantizes_left) == (1 if absorbed[0][0] == "relu" else 2)


class PaddedPool(nn.Module):
    """A max pool of the size that TensorFlow calls the same: its padding wins nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(torch.relu(self.first(x)), (0, 1, 0, 1), value=-math.inf)
        return self.second(F.max_pool2d(x, 3, 2))


def test_what_is_padded_with_infinity_stays_float() -> None:
    x = image(2)
    q = quantized(PaddedPool().eval(), (x,))
    result, report = inspection.run_fused(q, (x,))
    assert len(report.fused) == 2 and not report.missed
    testing.assert_same(result, q(x))


def test_weights_are_stored_in_int8_under_their_own_names_and_nothing_else() -> None:
    stored = {name: tensor.dtype for name, tensor in quantized(residual(), (image(),)).state_dict().items()}
    for name in ("first", "second", "head"):
        assert stored.pop(f"{name}.weight_int8") == torch.int8
        assert stored.pop(f"{name}.weight_scale").is_floating_point
        assert stored.pop(f"{name}.weight_zero_point") == torch.int64
    assert {name for name in stored if "weight" in name} == set()
    assert sorted(name.split(".")[0] for name in stored if "bias" in name) == ["first", "head", "second"]


def test_weights_are_symmetric_and_per_output_channel() -> None:
    model = residual()
    with torch.no_grad():
        model.second.weight[3] *= 100
    state = quantized(model, (image(),)).state_dict()
    scale = state["second.weight_scale"]
    assert scale.shape == (8,)
    assert scale.argmax() == 3
    assert not state["second.weight_zero_point"].any()
    restored = state["second.weight_int8"] * scale.view(-1, 1, 1, 1)
    assert ((restored - model.second.weight).abs() <= 0.51 * scale.view(-1, 1, 1, 1)).all()


def test_nothing_requires_grad_and_the_model_is_unchanged() -> None:
    model = residual()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph_module = quantized(model, (image(),))
    assert not any(tensor.requires_grad for tensor in graph_module.parameters())
    assert not graph_module(image()).requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_zeros_do_no_harm() -> None:
    model, x = residual(), image()
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.second.weight)
    graph_module = quantized(model, (x,))
    with torch.no_grad():
        assert torch.isfinite(graph_module(x)).all()
        torch.testing.assert_close(graph_module(x), model(x), rtol=0.05, atol=0.02)


# --- exclude ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["first"], ["first"]),
        (["sec*"], ["second"]),
        ([nn.Linear], ["head"]),
        ([nn.Conv2d], ["first", "second"]),
        (["head", "fir?t"], ["first", "head"]),
    ],
    ids=["name", "glob", "type", "two of a type", "two"],
)
def test_exclude(exclude: list[Any], left: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="inductor_x86q"):
        graph_module = quantized(residual(), (image(),), exclude=exclude)
    assert [name.split(" ")[0] for name in left_out(graph_module)] == left
    assert int8_layers(graph_module) == 3 - len(left)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert all(name in said for name in left)


def test_exclude_takes_what_is_below_a_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)).eval()
    graph_module = quantized(model, (torch.randn(2, 8),), exclude=["0"])
    assert [name.split(" ")[0] for name in left_out(graph_module)] == ["0.0", "0.2"]


def test_the_float_weights_are_gone_with_the_model():
    """torchao's steps keep every graph they have seen in a cache."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    q = inductor_x86q.quantize(net, (x,), calibration=[x])
    weights = [weakref.ref(net[position].weight) for position in (0, 3)]
    del net
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
    assert q(x).shape == (2, 8, 4, 4)
