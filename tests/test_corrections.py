"""quantize(accuracy=…): each correction gains what it is for, leaves the model alone, and "best" keeps what helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import inductor_x86q
from inductor_x86q import LayerConfig, QuantizationError, testing
from inductor_x86q.graph import qdq
from inductor_x86q.quantization import torchao
from inductor_x86q.quantization.corrections import prepared


def batches(*shape: int, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def ratio(model: nn.Module, data: list[torch.Tensor], **keywords: Any) -> float:
    """In dB, on data that nothing was calibrated with."""
    quantized = inductor_x86q.quantize(model, (data[0],), calibration=data[:-1], **keywords)
    with torch.no_grad():
        return testing.snr(quantized(data[-1]), model(data[-1]))


def apart() -> nn.Module:
    """A depthwise convolution whose channels' ranges are apart by 1,000 times, all of them equally important."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    factors = torch.logspace(-1.5, 1.5, 16)
    with torch.no_grad():
        net[0].weight *= factors[:, None, None, None]  # type: ignore[operator]
        net[0].bias *= factors  # type: ignore[operator]
        net[2].weight /= factors[:, None, None, None]  # type: ignore[operator]
    return net.eval()


class Block(nn.Module):
    """A norm that linears and a residual read, with some channels far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.LayerNorm(32)
        self.a, self.b, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.norm.weight[:2] *= 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.out(torch.tanh(0.02 * x) + self.a(x) * torch.sigmoid(self.b(x)))


def test_equalizing_brings_a_depthwise_layer_back() -> None:
    data = batches(4, 3, 10, 10)
    default, equalized = ratio(apart(), data), ratio(apart(), data, accuracy="equalize")
    assert equalized > default + 8, (default, equalized)


def clipped() -> nn.Module:
    """Depthwise blocks as MobileNets have them: relu6, padding on its own, and channels that stay far below 6."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(16, 16, 3, groups=16), nn.Hardtanh(0, 6),
        nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    factors = torch.logspace(-2.5, 0.5, 16)
    with torch.no_grad():
        net[0].weight *= factors[:, None, None, None]  # type: ignore[operator]
        net[0].bias *= factors  # type: ignore[operator]
        net[3].weight /= factors[:, None, None, None]  # type: ignore[operator]
    return net.eval()


def test_equalizing_below_a_relu6() -> None:
    """Channels that stay below 6 grow towards it; none is clipped that was not."""
    data = [3 * x for x in batches(4, 3, 10, 10)]
    with torch.no_grad():
        reached = nn.Sequential(*list(clipped())[:2])(data[0]).amax((0, 2, 3))
    assert reached.max() == 6 and reached.min() < 0.1
    default, equalized = ratio(clipped(), data), ratio(clipped(), data, accuracy="equalize")
    assert equalized > default + 8, (default, equalized)


@pytest.mark.parametrize("dynamic", [False, "per_tensor"])
def test_smoothing_outliers_behind_a_norm(dynamic: Any) -> None:
    model, data = Block().eval(), batches(16, 32)
    config = dynamic or None
    default, smoothed = ratio(model, data, config=config), ratio(model, data, config=config, accuracy="smooth")
    assert smoothed > default + 2, (default, smoothed)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("names", ["rounding", "bias", ("rounding", "bias")])
def test_layerwise_corrections(names: Any) -> None:
    data = [x + 1 for x in batches(8, 3, 10, 10)]
    default, corrected = coarsely(net(), data), coarsely(net(), data, accuracy=names)
    assert corrected > default + 1.5, (default, corrected)


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (8, 4, 30)), (nn.Conv3d, (4, 4, 6, 7, 8))])
def test_rounding_of_convolutions_of_any_dimensions(kind: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(kind(4, 8, 3, padding=1, stride=2), nn.ReLU(), kind(8, 8, 2, groups=2, dilation=2)).eval()
    data = [x + 1 for x in batches(*shape)]
    default, corrected = coarsely(model, data), coarsely(model, data, accuracy="rounding")
    assert corrected > default + 0.7, (default, corrected)


def coarsely(model: nn.Module, data: list[torch.Tensor], **keywords: Any) -> float:
    """With weights of four bits, so that what rounding them costs stands out."""
    four_bits = torchao.QuantizationSpec(
        torch.int8, torchao.PerChannelMinMaxObserver, -8, 7, torch.per_channel_symmetric, ch_axis=0
    )
    return ratio(model, data, config={"": LayerConfig(weight=four_bits)}, **keywords)


def test_rounding_stays_on_the_weights_grid() -> None:
    data = batches(8, 3, 10, 10)
    graphs = [inductor_x86q.quantize(net(), (data[0],), calibration=data, accuracy=how) for how in (None, "rounding")]
    before, after = (graph.state_dict() for graph in graphs)
    name = next(name for name in before if name.endswith("3.weight_int8"))
    scale = name.replace("int8", "scale")
    assert torch.equal(before[scale], after[scale]) and not torch.equal(before[name], after[name])
    assert (before[name].int() - after[name].int()).abs().max() <= 3


def test_a_bias_where_there_was_none() -> None:
    data = batches(8, 3, 10, 10)
    graph = inductor_x86q.quantize(net(), (data[0],), calibration=data, accuracy="bias")
    convolutions = [node for node in graph.graph.nodes if "conv" in str(node.target)]
    assert all(qdq.schema_arguments(node)["bias"] is not None for node in convolutions)


def test_best_is_no_worse_and_the_model_is_not_changed() -> None:
    model, data = apart(), batches(4, 3, 10, 10, count=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ratio(model, data, accuracy="best") > ratio(model, data, accuracy="equalize") - 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_corrections() -> None:
    for wrong in ("most", ["bias", "best"], 3):
        with pytest.raises(QuantizationError, match=r"accuracy: .* expected 'best' or some of 'ranges'"):
            inductor_x86q.quantize(net(), (torch.randn(1, 3, 10, 10),), calibration=[], accuracy=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
def test_a_bias_that_two_layers_share_is_changed_for_one(shared: bool) -> None:
    root = nn.Module()
    root.first, root.second, root.bias = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))
    graph = fx.Graph()
    x, bias = graph.placeholder("x"), graph.get_attr("bias")
    weight, other = graph.get_attr("first.weight"), graph.get_attr("second.weight")
    first = graph.call_function(torch.ops.aten.linear.default, (x, weight, bias))
    second = graph.call_function(torch.ops.aten.linear.default, (x, other, *([bias] if shared else [])))
    graph.output((first, second))
    module = fx.GraphModule(root, graph)
    prepared.set_bias(module, prepared.Layer(first, x, weight, None), torch.zeros(4))
    module.recompile()
    with torch.no_grad():
        results = module(torch.zeros(1, 4))
    assert [bool(result.any()) for result in results] == [False, shared]
    assert len(list(module.parameters())) + len(list(module.buffers())) == (4 if shared else 3)
