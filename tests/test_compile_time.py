"""What keeps compiling and starting short: nothing computed twice, nothing generated that could be stored."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from inductor_x86q import cpp_code, testing
from inductor_x86q.inductor import caches, patches
from inductor_x86q.inductor.patches import constant_folding
from inductor_x86q.testing import QConv2d, QLinear, quantize_dequantize


class Chain(nn.Module):
    """Four layers of one shape and scale, with zero points of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QLinear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(quantize_dequantize(x, 0.02, 0)))
        return x


def test_constants_of_the_same_contents_are_one() -> None:
    inputs = (torch.randn(4, 16),)
    quantized = testing.qdq_graph(Chain(), inputs)
    code = cpp_code(quantized, inputs, options={"kernels": "onednn"})
    # each weight; and for all of them one: scale and zero point of activations, scales and zero points of weights
    assert len(set(_constants(code))) == 4 + 4
    testing.assert_close_to_reference(quantized, inputs)


class Expanded(nn.Module):
    """A constant of one element that says it has a stride of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = QLinear(16, 16, bias=False)
        self.register_buffer("shift", torch.tensor(0.5).expand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.layer(quantize_dequantize(x, 0.02, 0))) - self.shift


def test_contents_are_read_whatever_the_strides_are() -> None:
    inputs = (torch.randn(4, 16),)
    testing.assert_close_to_reference(testing.qdq_graph(Expanded(), inputs), inputs)


def _constants(code: str) -> list[str]:
    lines = code.splitlines()
    return [line for line in lines if "= std::move(inputs[" in line and "arg" not in line.split("=")[0]]


class Masked(nn.Module):
    """A mask written in parts, as shifted windows' attention writes it, added to an int8 layer's result."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.layer = QLinear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(self.size, 16)
        for number, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, None))):
            mask[rows, number:] = number + 1.5
        return self.layer(quantize_dequantize(x, 0.02, 60)) * 2 + mask.masked_fill(mask == 1.5, -100.0)[: x.shape[0]]


def test_a_mask_written_in_parts_is_stored() -> None:
    inputs = (torch.randn(5, 16),)
    quantized = testing.qdq_graph(Masked(5), inputs)
    code = cpp_code(quantized, inputs)
    assert "1.5" not in code and "-100" not in code
    testing.assert_close_to_reference(quantized, inputs)


def test_what_is_large_and_constructed_is_computed_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constant_folding, "LARGEST_CONSTRUCTED", 5 * 16 - 1)
    inputs = (torch.randn(5, 16),)
    quantized = testing.qdq_graph(Masked(5), inputs)
    assert "-100" in cpp_code(quantized, inputs)
    testing.assert_close_to_reference(quantized, inputs)


class Normalized(nn.Module):
    """A batch norm that no convolution takes up, between two int8 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = QConv2d(8, 8, 1), QConv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8).eval()
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = quantize_dequantize(self.before(quantize_dequantize(x, 0.02, 60)), 0.02, 60)
        return self.behind(quantize_dequantize(torch.relu(self.norm(x)), 0.04, 0))


def test_a_batch_norm_reads_two_constants_for_each_channel() -> None:
    inputs = (torch.randn(2, 8, 6, 6),)
    quantized = testing.qdq_graph(Normalized(), inputs)
    code = cpp_code(quantized, inputs, options={"kernels": "onednn"})
    (signature,) = (
        part.split(")")[0] for part in code.split("void") if "batch_norm" in part.split("(")[0] and "{" in part
    )
    assert signature.count("const float*") == 2
    testing.assert_close_to_reference(quantized, inputs)


def test_fake_values_are_computed_once_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: Counter[str] = Counter()
    stock = FakeTensorProp.run_node

    def run_node(self: FakeTensorProp, n: fx.Node) -> object:
        computed[str(n.target)] += n.op == "call_function"
        return stock(self, n)

    monkeypatch.setattr(FakeTensorProp, "run_node", run_node)
    inputs = (torch.randn(4, 16),)
    cpp_code(testing.qdq_graph(Chain(), inputs), inputs)
    assert computed["aten.relu.default"] == 4


def test_a_fake_value_is_computed_anew_when_an_operand_changes() -> None:
    graph = fx.Graph()
    weight = graph.get_attr("weight")
    doubled = graph.call_function(torch.ops.aten.add.Tensor, (weight, weight))
    graph.output(doubled)
    module = fx.GraphModule({"weight": torch.ones(2, 3)}, graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with patches.applied(lambda graph: None):
        FakeTensorProp(module, mode).propagate()
        first = doubled.meta["val"]
        FakeTensorProp(module, mode).propagate()
        assert doubled.meta["val"] is first
        module.weight = torch.ones(3, 2).t()
        FakeTensorProp(module, mode).propagate()
        assert doubled.meta["val"].stride() == (1, 2)
        another = FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(module, another).propagate()
    assert doubled.meta["val"].fake_mode is another


def test_the_calling_function_is_compiled_beside_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.cpp_builder import CppBuilder

    build, both, met = CppBuilder.build, threading.Barrier(2), set()

    @functools.wraps(build)
    def meeting(self: CppBuilder) -> None:
        kind = "".join(Path(self.get_target_file_path()).suffixes)
        if kind in (".main.o", ".optimized.o"):
            both.wait(120)  # breaks where one is built after the other
            met.add(kind)
        build(self)

    monkeypatch.setattr(CppBuilder, "build", meeting)
    inputs = (torch.randn(4, 16),)
    quantized = testing.qdq_graph(Chain(), inputs)
    with caches.isolated_caches(str(tmp_path)):
        result = torch.compile(quantized, backend="inductor_x86q")(*inputs)
    testing.assert_same(result, quantized(*inputs), min_snr=30)
    assert len(met) == 2


def test_headers_are_precompiled_before_they_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import codecache

    stock = codecache._precompile_header
    asked: dict[bool, set[object]] = {True: set(), False: set()}

    @functools.wraps(stock)
    def recorded(header: str, flags: str, **keywords: object) -> str:
        asked[threading.current_thread() is threading.main_thread()].add((header, flags, *sorted(keywords.items())))
        return stock(header, flags, **keywords)

    monkeypatch.setattr(codecache, "_precompile_header", recorded)
    inputs = (torch.randn(4, 16),)
    quantized = testing.qdq_graph(Masked(4), inputs)
    with caches.isolated_caches(str(tmp_path)):
        torch.compile(quantized, backend="inductor_x86q")(*inputs)
    assert len(asked[False]) == 2 and asked[True] == asked[False]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = QConv2d(8, 8, 1), QConv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = quantize_dequantize(self.before(quantize_dequantize(x, 0.02, 60)), 0.03, 60)
        return self.behind(quantize_dequantize(nn.functional.max_pool2d(x, (3, 2), (2, 1), (1, 0), 1, True), 0.03, 60))


def test_a_pool_needs_no_headers_of_the_dispatcher() -> None:
    inputs = (torch.randn(2, 8, 7, 6),)
    quantized = testing.qdq_graph(Pooled(), inputs, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch._dynamo.mark_dynamic(inputs[0], 0)  # else the pool is ours
    code = cpp_code(quantized, inputs)
    assert 'torch_call_dispatcher("quantized::max_pool2d"' in code and "Dispatcher.h" not in code
    assert testing.kernel_calls(code)["quantized::max_pool2d"] == 1  # so that `explain --timing` lists it
    testing.assert_close_to_reference(quantized, inputs)
