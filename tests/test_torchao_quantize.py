"""Graphs of torchao's quantize_: products of integers that are scaled afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, inspection, testing
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.testing import QConv2d, QLinear

F = nn.functional

decomposed = torch.ops.quantized_decomposed


class KnownZeroPoint(nn.Module):
    """A convolution and a linear that read what is quantized by a computed scale, and by a zero point that is a number."""

    def __init__(self, zero_point: int) -> None:
        super().__init__()
        self.conv, self.linear, self.zero_point = QConv2d(8, 8, 3, padding=1), QLinear(8, 16), zero_point

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.flatten()[:1].abs().clamp(0.03, 0.09)
        zero_point = torch.full_like(scale, self.zero_point, dtype=torch.int64)

        def rounded(x: torch.Tensor) -> torch.Tensor:
            integers = decomposed.quantize_per_tensor(x, scale, zero_point, 0, 127, torch.uint8)
            return decomposed.dequantize_per_tensor(integers, scale, zero_point, 0, 127, torch.uint8)

        return self.linear(rounded(self.conv(rounded(x)).movedim(1, -1)))


@pytest.mark.parametrize("zero_point", [0, 63])
def test_a_number_for_a_zero_point_beside_a_computed_scale(zero_point: int) -> None:
    x = torch.linspace(-1, 1, 2 * 8 * 25).reshape(2, 8, 5, 5)
    q = testing.qdq_graph(KnownZeroPoint(zero_point), (x,))
    # A rounding that falls the other way moves one of the linear's inputs by a step.
    done = testing.assert_close_to_reference(q, (x,), options={"strict": True}, min_snr=35)
    if cpu.int8_lanes():
        assert not testing.int8_calls(done.code) and sum(testing.own_calls(done.code).values()) == 2


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x)))


def torchao_pair(name: str, **keywords: Any) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = Pair().eval()
    quantization.quantize_(model, getattr(quantization, name)(**keywords))
    return model


@pytest.mark.parametrize("rows", [14, 1])
def test_products_of_integers_become_calls(rows: int) -> None:
    # Reduced weights cannot overflow on any CPU.
    model = torchao_pair("Int8DynamicActivationInt8WeightConfig", reduce_range=True)
    x = torch.randn(rows, 64)
    with torch.no_grad():
        expected = model(x)
    done = testing.compile_once(model, (x,), options={"strict": True, "kernels": "onednn"})
    testing.assert_same(done.outputs, expected, min_snr=60)
    assert testing.int8_calls(done.code) == {"qlinear": 2} and testing.float_calls(done.code) == {}
    assert "_int_mm" not in done.code
    # One row has one scale, which is the call's; the call then takes bias and activation too.
    absorbed = sorted(fusion.absorbed for fusion in done.report.fused)
    assert absorbed == ([(), ("gelu",)] if rows == 1 else [(), ()])


class Product(nn.Module):
    """int8 rows by a constant, multiplied as uint8 that are `offset` higher, as torchao does where the CPU has VNNI."""

    def __init__(self, offset: int, subtracted: int, alpha: int) -> None:
        super().__init__()
        self.offset, self.alpha = offset, alpha
        weight = torch.randint(-60, 60, (64, 96), dtype=torch.int8)
        self.register_buffer("weight", weight.t().contiguous().t())
        self.register_buffer("subtracted", subtracted * weight.sum(0, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = (x.round().clamp(-20, 20).to(torch.int32) + self.offset).to(torch.uint8)
        return torch.sub(torch._int_mm(rows, self.weight), self.subtracted, alpha=self.alpha).float() * 0.1


@pytest.mark.parametrize(
    ("offset", "subtracted", "alpha", "calls"), [(128, 128, 1, 1), (30, 30, 1, 1), (30, 300, 1, 0), (30, 30, 2, 0)]
)
def test_products_of_unsigned_integers(offset: int, subtracted: int, alpha: int, calls: int) -> None:
    """What is subtracted is a zero point; 300 is none of uint8."""
    torch.manual_seed(0)
    model, x = Product(offset, subtracted, alpha), torch.randn(5, 64) * 9
    result, report = inspection.run_fused(model, (x,))
    assert len(report.fused) == calls and not report.missed
    testing.assert_same(result, model(x))


def test_products_of_8_bit_integers_overflow_without_vnni_only() -> None:
    model, x = torchao_pair("Int8DynamicActivationInt8WeightConfig"), torch.randn(14, 64)
    report = inductor_x86q.explain(model, (x,))
    reasons = [miss.reason for miss in report.missed]
    assert (len(report.fused), reasons) == ((2, []) if cpu.has_vnni() else (0, [Reason.SATURATES] * 2))


def test_smoothquant() -> None:
    smoothquant = pytest.importorskip("torchao.prototype.smoothquant")
    quantization = pytest.importorskip("torchao.quantization")
    base = quantization.Int8DynamicActivationInt8WeightConfig(reduce_range=True)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval().requires_grad_(False)
    x = torch.randn(14, 64) * torch.linspace(0.1, 30, 64)  # some channels of the input are larger than others
    config = smoothquant.SmoothQuantConfig(base_config=base, step="prepare", alpha=0.5)
    quantization.quantize_(model, config)
    model(x)
    config.step = "convert"
    quantization.quantize_(model, config)
    done = testing.compile_once(model, (x,), options={"strict": True, "kernels": "onednn"})
    testing.assert_same(done.outputs, model(x), min_snr=60)
    assert testing.int8_calls(done.code) == {"qlinear": 2} and "_int_mm" not in done.code


def test_float16_weights() -> None:
    """As torchao's quantizer asks for them with get_x86_inductor_linear_dynamic_fp16_config()."""

    class Half(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            convert = torch.ops.quantized_decomposed.convert_element_type.no_fuse
            return F.linear(x, convert(convert(self.weight, torch.float16), torch.float32), self.bias)

    model = nn.Sequential(Half(64, 96), nn.ReLU(), Half(96, 32, bias=False), nn.Conv2d(1, 1, 1), Half(32, 48)).eval()
    with torch.no_grad():
        model[3].weight.fill_(1.0)  # something between two linears
    x = torch.randn(1, 14, 64)
    done = testing.compile_once(model.requires_grad_(False), (x,))
    testing.assert_same(done.outputs, model(x))
    calls = testing.kernel_calls(done.code)
    assert calls["onednn::linear_relu_dynamic_fp16"] == 1 and calls["onednn::linear_dynamic_fp16"] == 2
    named = [miss for miss in done.report.kept_float if "its weight is float16" in str(miss)]
    assert [miss.macs for miss in named] == [14 * 64 * 96, 14 * 96 * 32, 14 * 32 * 48]
    assert not done.report.missed


def test_weight_only_int8_is_left_to_inductor() -> None:
    report = inductor_x86q.explain(torchao_pair("Int8WeightOnlyConfig"), (torch.randn(14, 64),))
    assert report.fused == [] and report.missed == []
    assert len(report.kept_float) == 2
    assert all("only its weight is int8" in str(miss) for miss in report.kept_float)
