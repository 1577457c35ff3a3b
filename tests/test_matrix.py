"""Every kind of fused call: its kernel and output type in the generated C++, and its numbers, in one table.

{conv, conv + post-op, conv + add, linear, linear + post-op, linear + add} × {float32, bfloat16} × {int8, float output}
× {static, dynamic quantization (linears)} × {fixed, dynamic batch}. The cases of one type and batch share a graph. Those
of a dynamic batch are compiled; of a fixed one the code is generated, and the fused graph run without compiling it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

from inductor_x86q import cpu, inspection, testing
from inductor_x86q.inductor import cpp_text
from inductor_x86q.report import Report
from inductor_x86q.testing import QConv2d, QLinear, quantize_dequantize

QD = quantize_dequantize
OUTPUT = {"scale": 0.03, "zero_point": 90, "quant_min": 0, "quant_max": 255, "dtype": torch.uint8}
SHAPES = ((4, 8, 6, 6), (4, 32))
MORE = ((7, 8, 6, 6), (7, 32))


def dynamically_quantized(x: torch.Tensor) -> torch.Tensor:
    """Scale and zero point from the tensor itself, at run time."""
    choose = torch.ops.quantized_decomposed.choose_qparams.tensor
    return QD(x, *choose(x, 0, 127, 2**-12, torch.uint8))


class Block(nn.Module):
    """One case: a layer, what stands behind it, and how its input and output are quantized."""

    def __init__(self, family: str, post: str, to_int8: bool, dynamic: bool) -> None:
        super().__init__()
        is_conv = family == "conv"
        self.layer = QConv2d(8, 8, 3, padding=1) if is_conv else QLinear(32, 24)
        if post == "add" and not to_int8:
            self.first = QConv2d(8, 8, 1) if is_conv else QLinear(32, 24, bias=False)
        self.other_features = None if is_conv else 24
        self.post, self.to_int8, self.dynamic = post, to_int8, dynamic

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post == "add" and self.to_int8:
            other = QD(x[..., : self.other_features] * 0.5, 0.03, 50)  # an accumulator of integers
        elif self.post == "add":
            other = self.first(QD(x * 2, 0.03, 50))
        y = self.layer(dynamically_quantized(x) if self.dynamic else QD(x))
        if self.post == "relu":
            y = torch.relu(y)
        elif self.post == "add":
            y = y + other
        if not self.to_int8:
            return y
        return torch.ops.quantized_decomposed.quantize_per_tensor.default(y, *OUTPUT.values())


@dataclasses.dataclass(frozen=True)
class Case:
    """`number` is the block's place among those of its compile."""

    number: int
    family: str
    post: str
    to_int8: bool
    dynamic: bool
    autocast: bool
    any_batch: bool

    def __str__(self) -> str:
        post = {"none": "", "relu": " + relu", "add": " + add"}[self.post]
        return (
            f"{self.family}{post}, {'bf16' if self.autocast else 'fp32'}, {'int8' if self.to_int8 else 'float'} out, "
            f"{'dynamic' if self.dynamic else 'static'}, {'any' if self.any_batch else 'fixed'} batch"
        )

    @property
    def kernel(self) -> str:
        return f"q{self.family}{'.binary' if self.post == 'add' else ''}"

    def output_type(self, has_bf16: bool) -> str:
        if self.to_int8:
            return "uint8"
        return "bfloat16" if self.autocast and has_bf16 else "float32"


BLOCKS = [
    (family, post, to_int8, dynamic)
    for family, post, to_int8, dynamic in itertools.product(
        ("conv", "linear"), ("none", "relu", "add"), (True, False), (False, True)
    )
    if not (family == "conv" and dynamic)  # torch quantizes what a linear reads at run time, not images
]
CASES = [
    Case(number, *block, autocast, any_batch)
    for autocast, any_batch, (number, block) in itertools.product((False, True), (False, True), enumerate(BLOCKS))
]


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*block) for block in BLOCKS)
        self.families = [block[0] for block in BLOCKS]

    def forward(self, image: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self.blocks, self.families, strict=True)
        return [block(image if family == "conv" else rows) for block, family in pairs]


def autocast(enabled: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()


def inputs_of(shapes: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(len(shapes[0]) + shapes[0][0])
    image, rows = (torch.rand(shape, generator=random) * 2 - 1 for shape in shapes)
    # The layout that the kernels write: run without Inductor, which would convert, they take no other accumulator.
    return image.contiguous(memory_format=torch.channels_last), rows


@functools.cache
def graph(any_batch: bool) -> torch.fx.GraphModule:
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"image": {0: batch}, "rows": {0: batch}} if any_batch else None
    return testing.qdq_graph(Together(), inputs_of(SHAPES), dynamic_shapes=shapes)


@dataclasses.dataclass
class Results:
    """Of one graph: the code, the report, and for each batch size called with what came and what should have."""

    code: str
    report: Report
    compiles: int
    calls: list[tuple[list[torch.Tensor], list[torch.Tensor]]]


@functools.cache
def results_of(in_bf16: bool, any_batch: bool) -> Results:
    q, inputs = graph(any_batch), inputs_of(SHAPES)
    with autocast(in_bf16), torch.no_grad():
        return compiled(q, inputs) if any_batch else uncompiled(q, inputs)


def compiled(q: torch.fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> Results:
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 0)
    result = testing.compile_once(q, inputs, options={"kernels": "onednn"})
    layers = len(result.report.fused)
    more = inputs_of(MORE)
    calls = [(result.outputs, q(*inputs)), (result.run(*more), q(*more))]
    return Results(result.code, result.report, len(result.report.fused) // layers, calls)


def uncompiled(q: torch.fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> Results:
    outputs, report = inspection.run_fused(q, inputs)
    return Results(inspection.cpp_code(q, inputs, options={"kernels": "onednn"}), report, 1, [(outputs, q(*inputs))])


def output_types(code: str, layer: str) -> dict[str, str]:
    """The onednn kernels that serve a layer, with the type of what each writes."""
    types = dict(re.findall(r"int32_t (var_\d+) = cached_torch_dtype_(\w+);", code))
    found = {}
    calls = cpp_text.only_layer(code, layer).split("\n\n")[0]  # then follow the generated kernels
    for line in calls.splitlines():
        for name in cpp_text.kernel_calls(f"inductor_entry_impl(\n    {line}\n"):
            if name in testing.code.INT8_KERNELS:
                (found[name],) = (types[variable] for variable in re.findall(r"&(var_\d+)", line) if variable in types)
    return found


def check_numbers(case: Case, actual: torch.Tensor, reference: torch.Tensor) -> None:
    if not case.autocast:
        testing.assert_same(actual, reference)
        return
    assert actual.dtype == reference.dtype
    if case.to_int8:  # what bf16 rounds before the quantize, the kernel does not
        assert (actual.int() - reference.int()).abs().max() <= 2
        actual, reference = (x.float() - OUTPUT["zero_point"] for x in (actual, reference))  # type: ignore[operator]
    testing.assert_same(actual.float(), reference.float(), min_snr=30)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused(case: Case) -> None:
    results = results_of(case.autocast, case.any_batch)
    layer = f"blocks.{case.number}.layer"
    assert output_types(results.code, layer) == {case.kernel: case.output_type(cpu.has_bf16())}
    for actual, reference in results.calls:
        check_numbers(case, actual[case.number], reference[case.number])


@pytest.mark.parametrize("any_batch", [False, True], ids=["fixed batch", "any batch"])
@pytest.mark.parametrize("in_bf16", [False, True], ids=["fp32", "bf16"])
def test_nothing_else(in_bf16: bool, any_batch: bool) -> None:
    """All layers are int8 calls, in one compile for all batch sizes, and float additions write in place."""
    results = results_of(in_bf16, any_batch)
    assert not results.report.missed and not results.report.kept_float
    assert not testing.float_calls(results.code)
    assert results.compiles == 1
    convs, linears = (sum(block[0] == family for block in BLOCKS) for family in ("conv", "linear"))
    sums = [sum(block[:2] == (family, "add") for block in BLOCKS) for family in ("conv", "linear")]
    firsts = [sum(block[:3] == (family, "add", False) for block in BLOCKS) for family in ("conv", "linear")]
    assert testing.int8_calls(results.code) == {
        "qconv": convs - sums[0] + firsts[0], "qconv.binary": sums[0],
        "qlinear": linears - sums[1] + firsts[1], "qlinear.binary": sums[1],
    }  # fmt: skip
    assert results.code.count('"sum"') == sum(sums)
    assert ("no bf16 instructions" in str(results.report)) == (in_bf16 and not cpu.has_bf16())


# --- as on a CPU that has bf16 instructions ---------------------------------------------------------------------------


@pytest.fixture
def bf16_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes take this CPU to have bf16 instructions; oneDNN's reference kernels make up for them."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: True)


@functools.cache
def with_bf16_kernels(any_batch: bool) -> Results:
    inputs = inputs_of(SHAPES)
    for x in inputs if any_batch else ():
        torch._dynamo.mark_dynamic(x, 0)
    with autocast(True), torch.no_grad():
        return uncompiled(graph(any_batch), inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.autocast], ids=str)
def test_fused_with_bf16_kernels(case: Case, bf16_kernels: None) -> None:
    results = with_bf16_kernels(case.any_batch)
    ((actual, reference),) = results.calls
    assert output_types(results.code, f"blocks.{case.number}.layer") == {case.kernel: case.output_type(True)}
    check_numbers(case, actual[case.number], reference[case.number])
