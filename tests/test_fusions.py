"""Each pass on small hand-built graphs: what it turns into, its numbers, and what it must leave alone.

The counts are asserted case by case on generated code, which needs no C++ compiler; the numbers of all cases together
in one compiled module, since a compile costs seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import inductor_x86q
from inductor_x86q import inspection, testing
from inductor_x86q.testing import QConv1d, QConv2d, QConv3d, QLinear, quantize_dequantize
from tests.fuzz.bounds import bounds
from tests.fuzz.intervals import Interval

F = nn.functional
QD = quantize_dequantize


class Case(nn.Module):
    """Layers under names, and a function of these and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def conv(**arguments: Any) -> QConv2d:
    return QConv2d(16, 16, 3, **{"padding": 1, **arguments})


def signed(x: torch.Tensor, zero_point: int = 5) -> torch.Tensor:
    return QD(x, 0.02, zero_point, dtype=torch.int8, quant_min=-128, quant_max=127)


class Factor(nn.Module):
    """A constant of numbers of both signs."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.linspace(-1.5, 2.0, shape[0]).view(shape))

    def forward(self) -> torch.Tensor:
        return self.factor


IMAGE = (2, 16, 8, 8)
ROWS = (4, 32)
TOKENS = (2, 5, 32)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    calls: dict[str, int]  # int8 and float oneDNN calls; "cpp": generated kernels
    text: str = '"none"'  # in the code: a post-op that one of the calls does, or a line of a kernel
    rounds_inside: bool = False  # a quantized value between two layers


def row(name: str, function: Callable[..., Any], layers: dict[str, nn.Module], shapes: Any, calls: dict[str, int],
        post_op: str = "none", rounds_inside: bool = False, text: str = "") -> Row:  # fmt: skip
    shapes = shapes if isinstance(shapes[0], tuple) else (shapes,)
    return Row(name, Case(function, **layers), shapes, calls, text or f'"{post_op}"', rounds_inside)


def after(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda m, x: function(m.layer(QD(x)))


C, L = {"layer": conv()}, {"layer": QLinear(32, 48)}

FUSED = [
    row("conv", after(lambda y: y), C, IMAGE, {"qconv": 1}),
    row("conv without bias", after(lambda y: y), {"layer": conv(bias=False)}, IMAGE, {"qconv": 1}),
    row("conv, stride, padding, dilation", after(lambda y: y),
        {"layer": conv(stride=(2, 1), padding=(2, 1), dilation=(1, 2))}, IMAGE, {"qconv": 1}),
    row("conv, groups", after(lambda y: y), {"layer": conv(groups=4)}, IMAGE, {"qconv": 1}),
    row("conv, depthwise", after(lambda y: y), {"layer": conv(groups=16)}, IMAGE, {"qconv": 1}),
    row("conv1d", after(lambda y: y), {"layer": QConv1d(16, 16, 3)}, (2, 16, 9), {"qconv": 1}),
    row("conv3d", after(lambda y: y), {"layer": QConv3d(16, 16, 3)}, (1, 16, 4, 5, 6), {"qconv": 1}),
    row("conv, relu", after(torch.relu), C, IMAGE, {"qconv": 1}, "relu"),
    row("conv, relu6", after(F.relu6), C, IMAGE, {"qconv": 1}, "hardtanh"),
    row("conv, hardtanh", after(lambda y: F.hardtanh(y, -0.5, 0.75)), C, IMAGE, {"qconv": 1}, "hardtanh"),
    row("conv, hardswish", after(F.hardswish), C, IMAGE, {"qconv": 1}, "hardswish"),
    row("conv, silu", after(F.silu), C, IMAGE, {"qconv": 1}, "swish"),
    row("conv, relu, conv: int8 between them",
        lambda m, x: m.second(QD(torch.relu(m.first(QD(x))), 0.02, 0)),
        {"first": conv(), "second": conv()}, IMAGE, {"qconv": 2}, rounds_inside=True),
    row("linear", after(lambda y: y), L, ROWS, {"qlinear": 1}),
    row("linear without bias", after(lambda y: y), {"layer": QLinear(32, 48, bias=False)}, ROWS, {"qlinear": 1}),
    row("linear of 3 dimensions", after(lambda y: y), L, TOKENS, {"qlinear": 1}),
    row("linear of 4 dimensions", after(lambda y: y), L, (2, 3, 5, 32), {"qlinear": 1}),
    row("linear of one row", after(lambda y: y), L, (1, 32), {"qlinear": 1}),
    row("linear, relu", after(torch.relu), L, ROWS, {"qlinear": 1}, "relu"),
    row("linear, gelu", after(F.gelu), L, TOKENS, {"qlinear": 1}, "gelu"),
    row("linear, gelu of tanh", after(lambda y: F.gelu(y, approximate="tanh")), L, TOKENS, {"qlinear": 1}, "gelu"),
    row("linear of signed input", lambda m, x: m.layer(signed(x)), {"layer": QLinear(32, 48, largest=63)}, ROWS,
        {"qlinear": 1}),
    row("linear, relu, linear", lambda m, x: m.second(QD(torch.relu(m.first(QD(x))), 0.02, 0)),
        {"first": QLinear(32, 48), "second": QLinear(48, 32)}, TOKENS, {"qlinear": 2}, rounds_inside=True),
    row("conv times a factor of each channel, relu", lambda m, x: torch.relu(m.layer(QD(x)) * m.factor()),
        {"layer": conv(), "factor": Factor(16, 1, 1)}, IMAGE, {"qconv": 1}, "relu"),
    row("linear times a factor of each output", lambda m, x: m.factor() * m.layer(QD(x)),
        {"layer": QLinear(32, 48), "factor": Factor(48)}, TOKENS, {"qlinear": 1, "cpp": 1}),
    row("residual sum of convs", lambda m, x: m.second(QD(x)) + m.first(QD(torch.relu(x), 0.02, 0)),
        {"first": conv(), "second": conv()}, IMAGE, {"qconv": 1, "qconv.binary": 1}),
    row("residual sum of convs, relu", lambda m, x: torch.relu(m.second(QD(x)) + m.first(QD(torch.relu(x), 0.02, 0))),
        {"first": conv(), "second": conv()}, IMAGE, {"qconv": 1, "qconv.binary": 1}, "relu"),
    row("residual sum of linears, relu", lambda m, x: torch.relu(m.second(QD(x)) + m.first(QD(x, 0.03, 20))),
        {"first": QLinear(32, 48), "second": QLinear(32, 48)}, ROWS, {"qlinear": 1, "qlinear.binary": 1}),
    row("linear adds a graph input", lambda m, x, y: m.layer(QD(x)) + y, L, (ROWS, (4, 48)), {"qlinear.binary": 1}),
    row("max pool between convs", lambda m, x: m.second(QD(F.max_pool2d(QD(m.first(QD(x))), 2))),
        {"first": conv(), "second": conv()}, IMAGE, {"qconv": 2}, rounds_inside=True),
    row("max pool of a large window between convs",
        lambda m, x: m.second(QD(F.max_pool2d(QD(m.first(QD(x))), 7, 1, 3))),
        {"first": conv(), "second": conv()}, IMAGE, {"qconv": 2, "cpp": 3}, rounds_inside=True),
    row("max pool of a large box in front of a conv", lambda m, x: m.layer(QD(F.max_pool3d(QD(x), 3, 1, 1))),
        {"layer": QConv3d(16, 16, 3)}, (1, 16, 4, 5, 6), {"qconv": 1, "cpp": 4}, text="most = value > most"),
    row("average pool over the whole image", lambda m, x: m.fc(QD(F.avg_pool2d(QD(m.conv(QD(x))), 8, 1).flatten(1))),
        {"conv": conv(), "fc": QLinear(16, 24)}, IMAGE, {"qconv": 1, "qlinear": 1, "cpp": 2}, rounds_inside=True),
    row("flatten in front of a linear", lambda m, x: m.fc(QD(torch.flatten(QD(m.conv(QD(x))), 1))),
        {"conv": conv(), "fc": QLinear(16 * 64, 24)}, IMAGE, {"qconv": 1, "qlinear": 1}, rounds_inside=True),
]  # fmt: skip

LEFT_ALONE = [
    row("the accumulator is a graph input", lambda m, x, y: m.layer(QD(x)) + y, C, (IMAGE, IMAGE), {"qconv": 1}),
    row("the accumulator is read later",
        lambda m, x: (lambda a: (m.second(QD(x)) + a, a * 2))(m.first(QD(x, 0.03, 50))),
        {"first": conv(), "second": conv()}, IMAGE, {"qconv": 2}),
    row("the factor is a map", lambda m, x: torch.relu(m.layer(QD(x)) * m.factor()),
        {"layer": conv(), "factor": Factor(8, 1)}, IMAGE, {"qconv": 1}),
    row("the addition broadcasts", lambda m, x, y: m.layer(QD(x)) + y, C, (IMAGE, (1, 16, 1, 1)), {"qconv": 1}),
    row("the addition broadcasts to a linear's result", lambda m, x, y: m.layer(QD(x)) + y, L, (ROWS, (4, 1)),
        {"qlinear": 1}),
    row("the addition scales by alpha", lambda m, x: torch.add(m.second(QD(x)), m.first(QD(x, 0.03, 50)), alpha=2),
        {"first": conv(), "second": conv()}, IMAGE, {"qconv": 2}),
    row("the addition adds a double", lambda m, x, y: m.layer(QD(x)) + y.double(), C, (IMAGE, IMAGE), {"qconv": 1}),
    row("the conv is added to itself", lambda m, x: (lambda y: y + y)(m.layer(QD(x))), C, IMAGE, {"qconv": 1}),
    row("the conv has several users", lambda m, x: (lambda y: (torch.relu(y), y * 3))(m.layer(QD(x))), C, IMAGE,
        {"qconv": 1}),
    row("sigmoid is no post-op of a conv", after(torch.sigmoid), C, IMAGE, {"qconv": 1}),
    row("the average pool's window is not the whole image",
        lambda m, x: m.fc(QD(F.avg_pool2d(QD(m.conv(QD(x))), (8, 4), 1).flatten(1))),
        {"conv": conv(), "fc": QLinear(80, 24)}, IMAGE, {"qconv": 1, "qlinear": 1, "avg_pool2d": 1}),
    row("gelu is no post-op of a conv", after(F.gelu), C, IMAGE, {"qconv": 1}),
]  # fmt: skip


def part(name: str, function: Callable[[torch.Tensor], torch.Tensor], whole: nn.Module, shape: tuple[int, ...]) -> Row:
    """Adds a convolution to part of another's result, whose elements do not lie side by side."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        accumulator = function(m.whole(QD(x)))
        return torch.relu(m.layer(QD(accumulator)) + accumulator)

    layers = {"whole": whole, "layer": QConv2d(8, 8, 1)}
    return row(f"the accumulator is {name}", forward, layers, shape, {"qconv": 2}, rounds_inside=True)


def int8_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    accumulator = QD(m.whole(QD(x)))[:, :, 1:]
    return QD(m.layer(QD(accumulator * 1.5, 0.03)) + accumulator)


# The library refuses to write into them.
PARTS = [
    part("rows of an image", lambda y: y[:, :, 1:], QConv2d(8, 8, 3), (2, 8, 5, 6)),
    part("columns of an image", lambda y: y[..., 1:], QConv2d(8, 8, 3), (2, 8, 5, 6)),
    part("every other image", lambda y: y[::2], QConv2d(8, 8, 3), (4, 8, 5, 6)),
    part("channels of an image", lambda y: y[:, 8:], QConv2d(8, 16, 3), (2, 8, 5, 6)),
    part("a frame of a volume", lambda y: y.select(2, 0), QConv3d(8, 8, (1, 3, 3)), (2, 8, 3, 5, 6)),
    row("int8 sum into rows of an image", int8_part, {"whole": QConv2d(8, 8, 3), "layer": QConv2d(8, 8, 1)},
        (2, 8, 5, 6), {"qconv": 1, "qconv.binary": 1}, "sum", rounds_inside=True),
    row("linear adds part of another's result", lambda m, x: m.second(QD(x)) + m.first(QD(x, 0.03, 20))[:, 8:56],
        {"first": QLinear(32, 64), "second": QLinear(32, 48)}, ROWS, {"qlinear": 1, "qlinear.binary": 1}),
]  # fmt: skip

ALL = FUSED + LEFT_ALONE + PARTS


def inputs_of(case: Row) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(len(case.name))
    return tuple(torch.rand(shape, generator=random) * 2 - 1 for shape in case.shapes)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_kernels(case: Row) -> None:
    inputs = inputs_of(case)
    code = testing.assert_fused(testing.qdq_graph(case.module, inputs), inputs, case.calls)
    assert case.text in code


class Together(nn.Module):
    def __init__(self, cases: list[Row]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(case.module for case in cases)
        self.counts = [len(case.shapes) for case in cases]

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        pending = iter(inputs)
        return [case(*(next(pending) for _ in range(n))) for case, n in zip(self.cases, self.counts, strict=True)]


@pytest.fixture(scope="module")
def together() -> tuple[list[Any], list[Any], list[Any]]:
    """Results of all cases: eager, of a first and of a second compiled call."""
    inputs = tuple(x for case in ALL for x in inputs_of(case))
    q = testing.qdq_graph(Together(ALL), inputs)
    with torch.no_grad():
        reference = q(*inputs)
    before = [x.clone() for x in inputs]
    compiled = testing.compile_once(q, inputs)
    second = compiled.run(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(before, inputs, strict=True)), "an input was written to"
    return reference, compiled.outputs, second


class OfOneInput(nn.Module):
    """A case with names for its inputs, by which it is traced."""

    def __init__(self, case: nn.Module) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: torch.Tensor) -> Any:
        return self.case(x)


def allowed(case: Row) -> list[Interval]:
    """What each result may be: a value near a tie may be rounded either way."""
    with torch.no_grad():
        return bounds(OfOneInput(case.module), inputs_of(case))


@pytest.mark.parametrize("number", range(len(ALL)), ids=lambda n: ALL[n].name)
def test_numbers(number: int, together: tuple[list[Any], list[Any], list[Any]]) -> None:
    reference, first, second = (results[number] for results in together)
    if ALL[number].rounds_inside:  # one that fell the other way shows in everything that is computed from it
        for interval, value in zip(allowed(ALL[number]), pytree.tree_leaves(first), strict=True):
            assert not interval.excludes(value).any(), f"{int(interval.excludes(value).sum())} elements are not allowed"
    else:
        testing.assert_same(first, reference)
    testing.assert_same(second, first)


def test_parts_in_max_autotune() -> None:
    inputs = tuple(x for case in PARTS for x in inputs_of(case))
    q = testing.qdq_graph(Together(PARTS), inputs)
    testing.assert_close_to_reference(q, inputs, mode="max-autotune", min_snr=35)


class TwoConstants(nn.Module):
    """A linear with a bias, and another constant that is added to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.more = nn.Linear(16, 8), nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.more


def test_what_is_added_to_a_bias_does_not_replace_it() -> None:
    x = torch.randn(5, 16)
    q = inductor_x86q.quantize(TwoConstants().eval(), (x,), dynamic="per_token", reduce_range=True)
    outputs, report = inspection.run_fused(q, (x,))
    assert len(report.fused) == 1
    with torch.no_grad():
        testing.assert_same(outputs, q(x), min_snr=60)
