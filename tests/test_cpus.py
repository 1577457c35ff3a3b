"""Other CPUs than the one a model was made for: clear warnings, right numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, inspection, testing
from inductor_x86q.graph.reasons import Reason
from tests.models import EightBits, X, reasons


def test_eight_bits_without_vnni(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu, "has_vnni", lambda: False)
    with caplog.at_level(logging.WARNING, "inductor_x86q"):
        result, report = inspection.run_fused(EightBits(), (X,))
    assert reasons(report) == [Reason.SATURATES] and not report.fused
    assert "this CPU has no VNNI" in caplog.text and "reduce_range=True" in caplog.text and "fc" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(result, EightBits()(X))


def test_eight_bits_with_vnni(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu, "has_vnni", lambda: True)
    with caplog.at_level(logging.WARNING, "inductor_x86q"):
        report = inspection.explain(EightBits(), (X,))
    assert len(report.fused) == 1 and not reasons(report) and not caplog.text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.fc = nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("made_with", [True, False], ids=["made with VNNI", "made without"])
@pytest.mark.parametrize("compiled_with", [True, False], ids=["compiled with", "compiled without"])
def test_made_on_one_machine_compiled_on_another(
    made_with: bool, compiled_with: bool, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "has_vnni", lambda: made_with)
    quantized = inductor_x86q.quantize(Net().eval(), (images,), calibration=[images])
    monkeypatch.setattr(cpu, "has_vnni", lambda: compiled_with)
    report = inspection.explain(quantized, (images,))
    if made_with and not compiled_with:
        assert set(reasons(report)) == {Reason.SATURATES}
        # Only what cannot overflow runs in int8, so the numbers hold on whatever CPU runs this test.
        result, _ = inspection.run_fused(quantized, (images,))
        with torch.no_grad():
            assert testing.snr(result, quantized(images)) > 30
    else:
        assert len(report.fused) == 2 and not reasons(report)


WITHOUT_VNNI = """
import torch
import inductor_x86q
from inductor_x86q import cpu
from inductor_x86q import inspection
from inductor_x86q import testing

assert not cpu.has_vnni()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 48)).eval()
x = torch.randn(16, 64)
quantized = inductor_x86q.quantize(net, (x,), calibration=[x])
result, report = inspection.run_fused(quantized, (x,))
assert len(report.fused) == 2 and not report.missed, report
with torch.no_grad():
    ratio, drift = testing.snr(result, quantized(x)), testing.snr(result, net(x))
assert ratio > 40 and drift > 20, (ratio, drift)
"""


def test_without_vnni_nothing_saturates(run_python: Callable[..., Any]) -> None:
    """The library really runs without it here."""
    run_python(WITHOUT_VNNI, ONEDNN_MAX_CPU_ISA="AVX2")
