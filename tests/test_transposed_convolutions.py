"""Transposed convolutions in int8: as an ordinary one whose channels are the phases of the stride."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import inspection, testing

F = nn.functional
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Block(nn.Module):
    """A transposed convolution by hand behind a quantized input, with what `behind` does to its result."""

    def __init__(self, dimensions: int, kernel: Any, *, groups: int = 1, behind: Any = None, **geometry: Any) -> None:
        super().__init__()
        kernel = (kernel,) * dimensions if isinstance(kernel, int) else kernel
        self.function, self.behind = TRANSPOSED[dimensions], behind
        self.geometry = {"groups": groups, **geometry}
        outputs = 6 // groups
        self.register_buffer("weight", torch.randint(-63, 64, (8, outputs, *kernel), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(outputs) / 100 + 0.001)
        self.register_buffer("zero_point", torch.zeros(outputs, dtype=torch.int64))
        self.register_buffer("bias", torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.scale, self.zero_point, 1, -127, 127, torch.int8
        )
        y = self.function(testing.quantize_dequantize(x), weight, self.bias, **self.geometry)
        return y if self.behind is None else self.behind(y)


GEOMETRIES: list[tuple[int, Any, dict[str, Any]]] = [
    (2, 2, {"stride": 2}),
    (2, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
    (2, 4, {"stride": 2, "padding": 1}),
    (2, 3, {}),
    (2, (1, 3), {"stride": (3, 2), "padding": (0, 1)}),
    (2, (3, 2), {"stride": (2, 3), "output_padding": (1, 0), "dilation": (2, 1)}),
    (2, 3, {"stride": 2, "dilation": 2, "padding": 2, "output_padding": 1}),
    (2, 5, {"stride": 3, "padding": 1, "groups": 2, "output_padding": 2}),
    (1, 4, {"stride": 3, "padding": 1}),
    (3, (2, 3, 2), {"stride": (2, 1, 2), "padding": (0, 1, 0)}),
]


@pytest.mark.parametrize("dimensions, kernel, geometry", GEOMETRIES)
def test_geometry(dimensions: int, kernel: Any, geometry: dict[str, Any]) -> None:
    x = torch.rand(2, 8, 5, 4, 3)[(..., *[0] * (3 - dimensions))]
    q = testing.qdq_graph(Block(dimensions, kernel, **geometry), (x,))
    outputs, report = inspection.run_fused(q, (x,))
    assert [fusion.operator for fusion in report.fused] == ["conv"]
    assert not report.missed
    assert not report.kept_float
    testing.assert_same(outputs.contiguous(), q(x))


def test_what_reads_padding_only_stays_float() -> None:
    x = torch.rand(1, 8, 3, 3)
    q = testing.qdq_graph(Block(2, 2, stride=2, output_padding=1), (x,))
    (miss,) = inductor_x86q.explain(q, (x,)).kept_float
    assert "transposed convolution" in str(miss)


def test_a_bias_is_a_constant_or_none() -> None:
    x = torch.rand(2, 8, 4, 4)
    without, computed = Block(2, 2, stride=2), Block(2, 2, stride=2)
    without.bias = None
    computed.function = lambda x, weight, bias, **geometry: F.conv_transpose2d(x, weight, bias * x.mean(), **geometry)
    for block, fused in ((without, 1), (computed, 0)):
        q = testing.qdq_graph(block, (x,))
        outputs, report = inspection.run_fused(q, (x,))
        assert len(report.fused) == fused
        testing.assert_same(outputs.contiguous(), q(x))


def test_activation_and_quantize_belong_to_the_call() -> None:
    x = torch.rand(2, 8, 4, 4)
    block = Block(2, 2, stride=2, behind=lambda y: testing.quantize_dequantize(torch.relu(y), 0.03, 0))
    q = testing.qdq_graph(block, (x,))
    outputs, report = inspection.run_fused(q, (x,))
    assert report.fused[0].absorbed == ("relu", "quantize")
    testing.assert_same(outputs, q(x), step=0.03)


class Decoder(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.up(torch.relu(self.first(x))))))


@pytest.mark.parametrize("groups, output", [(1, "uint8"), (2, "float32")])  # whose batch norm torch cannot fold
def test_the_quantizer_takes_them(groups: int, output: str) -> None:
    model, x = Decoder(groups).eval(), torch.randn(2, 3, 6, 6)
    q = inductor_x86q.quantize(model, (x,), calibration=[x], reduce_range=True)
    assert q.state_dict()["up.weight_scale"].shape == (6 // groups,)
    outputs, report = inspection.run_fused(q, (x,))
    assert [fusion.layer for fusion in report.fused] == ["first", "up", "last"]
    assert [fusion.output_dtype for fusion in report.fused] == ["uint8", output, "float32"]
    testing.assert_same(outputs, q(x), min_snr=35)
    assert testing.snr(q(x), model(x)) > 25


def test_training_leaves_them_in_float() -> None:
    x = torch.randn(2, 3, 6, 6)
    prepared = inductor_x86q.prepare_qat(Decoder().train(), (x,))
    prepared(x).sum().backward()
    prepared.eval()
    q = inductor_x86q.convert(prepared)
    outputs, report = inspection.run_fused(q, (x,))
    assert [fusion.layer for fusion in report.fused] == ["first", "last"]
    assert [miss.layer for miss in report.kept_float] == ["up"]
    testing.assert_same(outputs, q(x), min_snr=35)
