"""The table of operators: what must agree with it, and what else stands in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import inductor_x86q
from inductor_x86q import inspection
from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.disjoint_sets import DisjointSets
from inductor_x86q.graph.operators import OPERATORS, Role, targets
from inductor_x86q.inductor import decompositions
from inductor_x86q.kernels import epilogue
from inductor_x86q.passes.normalize import spelling
from inductor_x86q.quantization import plan
from tests.fuzz import bounds, catalogue, graphs

aten = torch.ops.aten


def test_each_overload_stands_in_one_row() -> None:
    overloads = [target for row in OPERATORS for target in row.overloads]
    assert len(overloads) == len(set(overloads))


def test_factors_and_arguments_are_the_operators_own() -> None:
    """Positions and names in the rows are those of the schemas."""
    for row in OPERATORS:
        for target in row.overloads if row.factors or row.post_operations else ():
            names = [argument.name for argument in target._schema.arguments]
            assert max(row.factors, default=0) < len(names), target
            for post in row.post_operations:
                named = {*post.scalars, *([post.algorithm] if post.algorithm else [])}
                assert named <= set(names), target


def test_what_the_kernels_take_is_kept_whole() -> None:
    """Inductor decomposes nothing, before the passes run, that a call can end in."""
    from torch._inductor.decomposition import select_decomp_table

    kept = set(decompositions.KEPT_WHOLE)
    assert kept <= set(targets(Role.ACTIVATION))
    decomposed = {t for t in operators.UNARIES if t in select_decomp_table() and not t._schema.is_mutable}
    assert decomposed <= kept
    # The others are spelled as one of these, alone or with what they gate.
    assert kept - decomposed == {aten.clamp.default, aten.hardsigmoid.default}


def test_generated_kernels_name_activations_as_the_table_does() -> None:
    names = {post.name for row in OPERATORS if row.role is Role.ACTIVATION for post in row.post_operations}
    ours = {name.removesuffix("_erf").removesuffix("_tanh") for name in epilogue.ACTIVATIONS}  # the forms of gelu
    operators_ = {
        str(target).split(".")[1] for row in OPERATORS if row.role is Role.ACTIVATION for target in row.overloads
    }
    assert ours - {"none"} <= names | operators_
    assert set(epilogue.LIMITS) <= {"none", *names}
    clips = {post.name for row in OPERATORS if row.clips for post in row.post_operations}
    assert set(epilogue.LIMITS) - {"none"} == clips


@pytest.mark.parametrize(
    "row", [row for row in OPERATORS if row.role is Role.ACTIVATION], ids=lambda row: row.overloads[0]
)
def test_the_fuzzer_draws_each_activation(row: operators.Operator) -> None:
    drawn = set()
    for text in catalogue.UNARIES:
        function = eval(f"lambda x: {text.format('x')}", dict(graphs.HELPERS))
        traced = torch.export.export(_Module(function), (torch.ones(3),)).graph
        drawn |= {node.target for node in traced.nodes}
    assert drawn & set(row.overloads)


class _Module(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[operator]


def test_the_fuzzer_has_bounds_for_what_it_draws() -> None:
    for text in catalogue.UNARIES:
        function = eval(f"lambda x: {text.format('x')}", dict(graphs.HELPERS))
        (bound,) = bounds.bounds(_Module(function), (torch.linspace(-3, 3, 41),))
        actual = function(torch.linspace(-3, 3, 41)).double()
        assert ((bound.low <= actual) & (actual <= bound.high)).all(), text


def test_names() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = {
        aten._softmax.default: "softmax", aten.addmm.default: "matmul", aten.constant_pad_nd.default: "pad",
        torch.ops.prims.convert_element_type.default: "cast", aten.view.default: "view",
        torch.ops.quantized_decomposed.dequantize_per_token.default: "dequantize",
    }  # fmt: skip
    for target, name in called.items():
        assert operators.name(graph.call_function(target, (x,))) == name
    assert operators.own_name(graph.call_function(aten.addmm.default, (x, x, x))) == "addmm"
    assert operators.name(x) == "x"


def test_factors_are_found_by_position_and_by_name() -> None:
    graph = fx.Graph()
    bias, x, weight = (graph.placeholder(name) for name in ("bias", "x", "weight"))
    assert operators.factors(graph.call_function(aten.addmm.default, (bias, x, weight))) == (x, weight)
    assert operators.factors(graph.call_function(aten.linear.default, (x,), {"weight": weight})) == (x, weight)
    assert operators.factors(graph.call_function(aten.relu.default, (x,))) == ()


def test_disjoint_sets() -> None:
    sets: DisjointSets[int] = DisjointSets(order=lambda item: item)
    for first, second in ((5, 3), (9, 8), (3, 8), (1, 2)):
        sets.join(first, second)
    assert sets.sets() == {3: [5, 3, 9, 8], 1: [1, 2]}
    unordered: DisjointSets[str] = DisjointSets()
    unordered.join("b", "a")
    unordered.join("a", "c")
    assert unordered.root("c") == "b" and unordered.root("d") == "d"
    long: DisjointSets[int] = DisjointSets(order=lambda item: -item)
    for item in range(5000):
        long.join(item, item + 1)
    assert long.root(0) == 5000 and "recurs" not in inspect.getsource(DisjointSets)


# --- what a row does --------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two convolutions, a max pool behind the first, and something between them."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.pool, self.second = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.pool(self.first(x))))


def scales(quantized: fx.GraphModule) -> list[float]:
    """Of each quantize, in the order of the graph."""
    return [qdq.qparams(node).scale for node in quantized.graph.nodes if qdq.is_quantize(node)]


def between(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[fx.GraphModule, tuple[torch.Tensor]]:
    x = torch.randn(2, 3, 10, 10)
    return inductor_x86q.quantize(Between(function).eval(), (x,), calibration=[x], reduce_range=True), (x,)


MOVEMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transpose": lambda x: x.transpose(2, 3),
    "movedim": lambda x: x.movedim((2, 3), (3, 2)),
    "moveaxis": lambda x: torch.moveaxis(x, 2, 3),
    "swapdims": lambda x: torch.swapdims(x, 2, 3),
    "tile": lambda x: x.tile((1, 1, 2, 1)),
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "index": lambda x: x[:, [3, 0, 2, 1, 7, 6, 5, 4]],
    "index_select": lambda x: x.index_select(1, torch.arange(7, -1, -1)),
    "unfold": lambda x: x.unfold(2, 2, 2).flatten(3),
    "tensor_split": lambda x: torch.cat(x.tensor_split(3, 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("function", [pytest.param(f, id=name) for name, f in MOVEMENTS.items()])
def test_what_moves_between_int8_layers_moves_int8(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    quantized, inputs = between(function)
    first, *others = scales(quantized)
    assert len(others) >= 3 and len(set(others)) == 1 and first != others[0]  # conv, pool and what moves share it
    result, report = inspection.run_fused(quantized, inputs)
    assert report.float_subgraphs == 0 and report.quantizes_left == ["quantize_per_tensor"] and not report.missed
    with torch.no_grad():
        torch.testing.assert_close(result, quantized(*inputs), atol=1e-4, rtol=1e-4)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "elu": lambda x: F.elu(x),
    "celu": lambda x: F.celu(x, 0.7),
    "selu": lambda x: F.selu(x),
    "softplus": lambda x: F.softplus(x),
}  # fmt: skip


@pytest.mark.parametrize("function", [pytest.param(f, id=name) for name, f in ACTIVATIONS.items()])
def test_an_activation_between_int8_reads_and_writes_int8(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    quantized, inputs = between(function)
    _, convolved, pooled, activated = scales(quantized)
    assert convolved == pooled != activated
    result, report = inspection.run_fused(quantized, inputs)
    assert not report.missed and len(report.fused) == 2
    with torch.no_grad():
        torch.testing.assert_close(result, quantized(*inputs), atol=0.02, rtol=0.02)


def test_what_gives_its_shape_only_is_no_part_of_what_moves() -> None:
    quantized, _ = between(lambda x: x.mean((2, 3), keepdim=True).expand_as(x))
    _, convolved, pooled, mean, expanded = scales(quantized)
    assert convolved == pooled != mean == expanded


def test_which_layers_end_in_a_clip_to_any_range() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    made = {name: graph.call_function(getattr(aten, name).default, (x, weight))
            for name in ("conv1d", "conv2d", "conv3d", "linear", "mm", "relu")}  # fmt: skip
    assert [name for name, node in made.items() if operators.can_clip(node)] == ["conv2d", "linear", "mm"]
    assert not operators.can_clip(x)


@pytest.mark.parametrize(
    ("mode", "fill", "shares"), [("constant", 0.0, True), ("constant", 1.0, False), ("reflect", 0.0, True)]
)
def test_a_pad_shares_its_range_where_it_adds_no_value(mode: str, fill: float, shares: bool) -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.pad.default, (graph.placeholder("x"), [1, 1], mode, fill))
    assert plan.shares(node) is shares


def test_the_dimension_along_which_scales_vary() -> None:
    column = torch.tensor([[1.0], [2.0]])
    tensors = (column.expand(2, 2), column.t().repeat(2, 1), torch.ones(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert [spelling._varying_axis(tensor) for tensor in tensors] == [0, 1, 0, None]
