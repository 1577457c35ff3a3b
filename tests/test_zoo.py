"""Every classification family of torchvision, two segmentation and three video networks: all in int8, and right.

The fused graph is run eagerly here, which needs no C++ compiler; test_networks.py compiles networks whole.
"""

import pytest
import torch

pytest.importorskip("torchvision")

from inductor_x86q import quantize
from inductor_x86q.inspection import run_fused
from inductor_x86q.testing import snr
from inductor_x86q.tools.zoo import ZOO, build, rounding_floor

pytestmark = pytest.mark.torchvision

# network: convolutions, of these with an addition inside the call; linears, of these with an addition; share of
# multiply-accumulates in int8 (below 1 where attention multiplies two activations)
EXPECTED = {
    "alexnet": (5, 0, 3, 0, 1.0),
    "convnext_tiny": (22, 0, 37, 0, 1.0),
    "deeplabv3_mobilenet_v3_large": (70, 10, 0, 0, 1.0),
    "densenet121": (120, 0, 1, 0, 1.0),
    "efficientnet_b0": (81, 9, 1, 0, 1.0),
    "efficientnet_v2_s": (170, 33, 1, 0, 1.0),
    "fcn_resnet50": (55, 16, 0, 0, 1.0),
    "googlenet": (57, 0, 1, 0, 1.0),
    "inception_v3": (94, 0, 1, 0, 1.0),
    "maxvit_t": (61, 11, 90, 44, 0.96),
    "mc3_18": (20, 0, 1, 0, 1.0),
    "mnasnet0_5": (52, 10, 1, 0, 1.0),
    "mobilenet_v2": (52, 10, 1, 0, 1.0),
    "mobilenet_v3_large": (62, 10, 2, 0, 1.0),
    "mobilenet_v3_small": (52, 6, 2, 0, 1.0),
    "r3d_18": (20, 0, 1, 0, 1.0),
    "regnet_x_400mf": (71, 22, 1, 0, 1.0),
    "regnet_y_400mf": (85, 16, 1, 0, 1.0),
    "resnet18": (20, 8, 1, 0, 1.0),
    "resnet50": (53, 16, 1, 0, 1.0),
    "resnext50_32x4d": (53, 16, 1, 0, 1.0),
    "s3d": (78, 0, 0, 0, 1.0),
    "shufflenet_v2_x0_5": (56, 0, 1, 0, 1.0),
    "shufflenet_v2_x1_0": (56, 0, 1, 0, 1.0),
    "squeezenet1_1": (26, 0, 0, 0, 1.0),
    "swin_t": (1, 0, 52, 22, 0.94),
    "swin_v2_t": (1, 0, 52, 0, 0.94),
    "vgg11_bn": (8, 0, 3, 0, 1.0),
    "vit_b_16": (1, 0, 49, 24, 0.95),
    "wide_resnet50_2": (53, 16, 1, 0, 1.0),
}


# A network for each kind of block; the rest takes minutes: `pytest -m slow tests/test_zoo.py`.
QUICK = {
    "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small", "r3d_18", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
}  # fmt: skip


@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ZOO]
)
def test_zoo(network: str) -> None:
    model, x = build(network), ZOO[network].example()
    quantized = quantize(model, (x,), calibration=[x])
    reference = quantized(x)
    output, report = run_fused(quantized, (x,))
    assert not report.missed
    assert not [miss for miss in report.kept_float if miss.operator not in ("matmul", "attention")]
    counts = tuple(
        sum(f.operator == operator and (not added or "add" in f.absorbed) for f in report.fused)
        for operator in ("conv", "linear")
        for added in (False, True)
    )
    assert counts == EXPECTED[network][:4]
    assert report.int8_share_of_macs >= EXPECTED[network][4]
    assert torch.isfinite(reference).all() and reference.std() > 0
    # 30 dB, or what one rounding in 100,000 does to this network: see rounding_floor.
    ratio = snr(output, reference)
    assert ratio >= 30 or ratio >= max(rounding_floor(quantized, (x,)) - 6, 10)
