"""Which layers get a kernel that is generated, how wide and in which blocks, and which stay calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, testing
from inductor_x86q.inductor.lowering import layer as layers
from inductor_x86q.kernels.convolution import Convolution
from inductor_x86q.testing import QConv2d, quantize_dequantize
from tests.models import Quantized

QD = quantize_dequantize
MODE = "max-autotune"
needs_avx2 = pytest.mark.skipif(not cpu.int8_lanes(), reason="kernels are generated for CPUs with AVX2")


@pytest.mark.parametrize(
    ("halves", "channels", "vectors", "expected"),
    [
        (False, 8, 1, 8), (False, 24, 1, 16), (False, 32, 4, 8), (False, 40, 4, 16),
        (True, 8, 1, 8), (True, 24, 1, 8), (True, 48, 1, 16), (True, 72, 4, 8), (True, 144, 4, 8), (True, 384, 4, 16),
    ],
)  # fmt: skip
def test_vectors_are_as_wide_as_channels_fill(
    halves: bool, channels: int, vectors: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "int8_lanes", lambda: 16)
    monkeypatch.setattr(cpu, "halves_512", lambda: halves)
    assert layers.lanes(channels, vectors) == expected
    monkeypatch.setattr(cpu, "int8_lanes", lambda: 8)
    assert layers.lanes(channels, vectors) == 8


def test_blocks_waste_little() -> None:
    """Six vectors are two blocks of three columns, and 49 pixels seven of seven rows."""
    conv = Convolution(1, 7, 7, 16, 96, (1, 1), (1, 1), (0, 0), (1, 1), 1, 16, False, False)
    assert conv.blockings(32)[0] == (7, 3)


@needs_avx2
def test_an_output_scale_that_is_far_too_small() -> None:
    """More steps than an integer holds would change their sign."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QConv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return QD(self.layer(QD(x)), 1e-12, 0)

    q = testing.qdq_graph(Net(), (torch.randn(1, 8, 4, 4),))
    report = inductor_x86q.explain(q, (torch.randn(1, 8, 4, 4),), mode=MODE)
    assert any("an output scale so small" in note for note in report.notes)


def test_constants_that_are_written_out_leave_the_calls() -> None:
    """A layer's numbers are no tensors then, which the choice between kernels would read."""
    x = torch.randn(1, 8, 4, 4)
    options = {"always_keep_tensor_constants": False}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QConv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(QD(x))

    q = testing.qdq_graph(Net(), (x,))
    compiled = testing.assert_close_to_reference(q, (x,), mode=MODE, options=options)
    assert compiled.calls["qconv"] == 1
    assert any("always_keep_tensor_constants=False" in note for note in compiled.report.notes)


def test_the_faster_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the call measures faster it stays, and the weight packed for the kernel is gone."""
    import torch._inductor.lowering

    from inductor_x86q.inductor.lowering import choice as lowering

    monkeypatch.setattr(lowering._Call, "benchmark", lambda self, *values, out: 0.0)
    q = testing.qdq_graph(nn.Sequential(Quantized(QConv2d(8, 8, 3))), (torch.randn(1, 8, 6, 6),))
    compiled = testing.assert_close_to_reference(q, (torch.randn(1, 8, 6, 6),), mode=MODE)
    assert sum(testing.int8_calls(compiled.code).values()) == 1
    assert "struct Shape {" not in compiled.code


def test_other_modes_generate_nothing() -> None:
    q = testing.qdq_graph(Quantized(QConv2d(8, 8, 3)), (torch.randn(1, 8, 6, 6),))
    compiled = testing.compile_once(q, (torch.randn(1, 8, 6, 6),))
    assert testing.int8_calls(compiled.code) and "inductor_x86q::" not in compiled.code


def test_what_is_not_generated_is_named() -> None:
    """A layer of a kind for which there is no kernel keeps its call, and the report says so."""
    q = testing.qdq_graph(Quantized(QConv2d(4, 8, 3, groups=4)), (torch.randn(1, 4, 6, 6),))
    compiled = testing.assert_close_to_reference(q, (torch.randn(1, 4, 6, 6),), mode=MODE)
    assert testing.int8_calls(compiled.code)
    assert "layer stays a call: no kernel is generated for a depthwise convolution with more than one" in str(
        compiled.report
    )
