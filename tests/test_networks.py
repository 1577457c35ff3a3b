"""Whole networks, every layer in int8 and the numbers of the graph run eagerly; test_zoo.py has more of them, uncompiled."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q.testing import assert_fused, snr
from inductor_x86q.tools.zoo import rounding_floor
from tests.test_backend import compiled

RESNETS = {
    "resnet18": {"qconv": 12, "qconv.binary": 8, "qlinear": 1},
    "resnet50": {"qconv": 37, "qconv.binary": 16, "qlinear": 1},
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def realistic(model: nn.Module) -> nn.Module:
    """The model in eval mode with batch-norm statistics of data that it has seen: without, a random net is constant."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of what it sees
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 3, 128, 128))
    return model.eval()


@pytest.mark.torchvision
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_resnets_whole(name: str, layout: str) -> None:
    import torchvision

    model = realistic(getattr(torchvision.models, name)()).to(memory_format=LAYOUTS[layout])
    x = torch.randn(2, 3, 128, 128).to(memory_format=LAYOUTS[layout])
    quantized = inductor_x86q.quantize(model, (x,), calibration=[x, torch.randn(2, 3, 128, 128)])
    report = inductor_x86q.explain(quantized, (x,), options={"strict": True})
    assert report.kept_float == []
    assert report.int8_share_of_macs == 1.0
    assert Counter(fusion.operator for fusion in report.fused) == {"conv": sum(RESNETS[name].values()) - 1, "linear": 1}
    # One at the input; the other writes the classifier's input behind the average pool.
    assert len(report.quantizes_left) <= 2
    assert_fused(quantized, (x,), RESNETS[name])
    with torch.no_grad():
        got, expected = compiled(quantized)(x), quantized(x)
    # 30 dB, or what one rounding in 100,000 does to this random network.
    ratio = snr(got, expected)
    assert ratio >= 30 or ratio >= max(rounding_floor(quantized, (x,)) - 6, 10)
