"""quantize(config=…): each choice reaches the layers it is made for, and what is impossible is refused by name."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

import inductor_x86q
from inductor_x86q import LayerConfig, QuantizationError, inspection, testing
from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.origin import layer
from inductor_x86q.quantization import torchao

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.head(torch.relu(self.down(torch.nn.functional.gelu(self.up(x)))))


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net().eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def quantize(config: Any, **keywords: Any) -> fx.GraphModule:
    return inductor_x86q.quantize(net(), (X,), **{"calibration": [X], "config": config, **keywords})


def how(graph: fx.GraphModule) -> dict[str, str]:
    """How the input of each layer is quantized."""
    names = {qdq.DEQUANTIZE: "static", qdq.DEQUANTIZE_TENSOR: "per_tensor", qdq.DEQUANTIZE_TOKEN: "per_token"}
    return {
        layer(node): names.get(operators.factors(node)[0].target, "float")
        for node in graph.graph.nodes
        if operators.role(node) in (operators.Role.CONVOLUTION, operators.Role.LINEAR)
    }


def scale(graph: fx.GraphModule, number: int = 0) -> float:
    nodes = [node for node in graph.graph.nodes if qdq.is_quantize(node)]
    return qdq.qparams(nodes[number]).scale


def refusal(config: Any, **keywords: Any) -> str:
    with pytest.raises(QuantizationError) as raised:
        quantize(config, **keywords)
    return str(raised.value)


# --- choices ----------------------------------------------------------------------------------------------------------


def test_convolutions_static_linears_dynamic_the_head_float() -> None:
    graph = quantize({nn.Linear: "per_token", "up": "per_tensor", "head": "float"})
    assert how(graph) == {
        "first": "static", "second": "static", "up": "per_tensor", "down": "per_token", "head": "float",
    }  # fmt: skip
    assert testing.snr(graph(X), net()(X)) > 20


def test_the_more_specific_selector_wins() -> None:
    config = {"d*": "per_tensor", "down": "static", "": "float", aten.linear.default: "per_token", nn.Linear: "static"}
    assert how(quantize(config)) == {
        "first": "float", "second": "float", "up": "static", "down": "static", "head": "static",
    }  # fmt: skip


class Both(nn.Module):
    """Two linears that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.base(x))
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("mode", ["per_token", "float", "bfloat16"])
def test_a_linear_that_reads_what_a_static_one_reads(mode: str) -> None:
    """One that stays float reads the value before it is rounded, and is none that should have been int8."""
    model, x = Both().eval(), torch.randn(4, 8)
    graph = inductor_x86q.quantize(model, (x,), calibration=[x], config={"b": mode})
    assert how(graph) == {"base": "static", "a": "static", "b": mode if mode == "per_token" else "float"}
    assert testing.snr(graph(x), model(x)) > 25
    assert not inspection.run_fused(graph, (x,))[1].missed


def test_dynamic_throughout_needs_no_data() -> None:
    assert set(how(quantize({"": "per_token"}, calibration=None)).values()) == {"float", "per_token"}
    assert "'first' is to be static" in refusal({nn.Linear: "per_token"}, calibration=None)


@pytest.mark.parametrize("observer", ["minmax", "percentile:99", torchao.MinMaxObserver])
def test_observers(observer: Any) -> None:
    x = X.clone()
    x[0, 0, 0, 0] = 100
    found = 255 * scale(inductor_x86q.quantize(net(), (x,), calibration=[x], config=observer, reduce_range=False))
    assert (found > 100) == (observer in ("minmax", torchao.MinMaxObserver))
    if observer == "percentile:99":
        low, high = torch.quantile(x.flatten(), torch.tensor([0.01, 0.99]))
        assert found == pytest.approx(float(high - low), rel=0.1)


def test_the_least_squared_error_is_the_least() -> None:
    x = torch.randn(40_000)
    observer = {name: make.with_args(dtype=torch.uint8, quant_min=0, quant_max=15)() for name, make in (
        ("mse", inductor_x86q.quantization.observers.MeanSquaredErrorObserver), ("minmax", torchao.MinMaxObserver),
    )}  # fmt: skip

    def error(name: str) -> float:
        observer[name](x)
        s, z = observer[name].calculate_qparams()
        return float((torch.fake_quantize_per_tensor_affine(x, float(s), int(z), 0, 15) - x).square().mean())

    assert error("mse") < 0.7 * error("minmax")


def test_a_specification_and_reduce_range_together() -> None:
    spec = torchao.QuantizationSpec(
        torch.uint8, torchao.MinMaxObserver.with_args(eps=2**-12), 0, 255, torch.per_tensor_symmetric
    )
    graph = quantize({"": spec}, reduce_range=False)
    first = next(node for node in graph.graph.nodes if qdq.is_quantize(node))
    assert qdq.qparams(first).zero_point == 127 and qdq.qparams(first).quant_max == 255
    first = next(node for node in quantize({"": spec}, reduce_range=True).graph.nodes if qdq.is_quantize(node))
    assert qdq.qparams(first).quant_max == 127


def test_weights_per_tensor() -> None:
    graph = quantize({"second": LayerConfig(weight="per_tensor")})
    scales = {name: tensor.numel() for name, tensor in graph.state_dict().items() if name.endswith("weight_scale")}
    assert scales == {name: size for name, size in {
        "first.weight_scale": 8, "up.weight_scale": 16, "down.weight_scale": 8, "head.weight_scale": 4,
    }.items()}  # fmt: skip
    assert testing.snr(graph(X), net()(X)) > 20


def test_a_layer_in_bfloat16() -> None:
    graph = quantize({"second": "bfloat16", "up": "bfloat16"})
    types = {name: tensor.dtype for name, tensor in graph.state_dict().items() if name.endswith(("16", "int8"))}
    narrow = {f"{name}_bfloat16": torch.bfloat16 for name in ("second.weight", "second.bias", "up.weight", "up.bias")}
    assert types == narrow | {f"{name}.weight_int8": torch.int8 for name in ("first", "down", "head")}
    only_float = quantize({"second": "float", "up": "float"})
    assert 20 < testing.snr(graph(X), only_float(X)) < 80
    outputs, report = inspection.run_fused(graph, (X,))
    assert testing.snr(outputs, graph(X)) > 60
    assert [miss.layer for miss in report.kept_float] == ["second", "up"] and not report.missed


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_no_kernel_takes_is_refused_where_it_is_given() -> None:
    spec = torchao.QuantizationSpec(torch.int8, torchao.MinMaxObserver, -128, 127, torch.per_tensor_symmetric)
    assert "config of 'up'" in refusal({"up": spec}) and "activations are torch.uint8" in refusal({"up": spec})
    assert "config of 'up'" in refusal({"up": torchao.PerChannelMinMaxObserver})
    affine = torchao.QuantizationSpec(torch.int8, torchao.MinMaxObserver, -128, 127, torch.per_tensor_affine)
    assert "weights are symmetric" in refusal({"up": LayerConfig(weight=affine)})
    text = refusal({"second": "per_token"})
    assert "'second'" in text and "conv2d" in text and "'static', 'bfloat16' and 'float' are possible" in text
    assert "'histogram', 'mse', 'percentile:99.99'" in refusal("entropy")
    assert "between 50 and 100" in refusal("percentile:101")


def test_contradictions() -> None:
    assert "'u*' asks for mode 'float'" in refusal({"u*": "float", "*p": "per_token"})
    assert "contradict" in refusal({"up": LayerConfig(mode="per_token", activation="mse")})
    assert "a float layer has not" in refusal({"up": LayerConfig(mode="float", weight="per_tensor")})
    assert "excluded" in refusal({"up": "per_token"}, exclude=["up"])
    assert "excluded" in refusal({"up": "bfloat16"}, exclude=["up"])
    assert "both of the whole model" in refusal("mse", dynamic=True)


def test_names_that_match_nothing() -> None:
    text = refusal({"secnd": "mse"})
    assert "'secnd' matches no convolution or linear" in text and "'second'" in text
    assert "matches no" in refusal({"blocks.*": "float"})
    assert "exclude: 'dwon' matches no convolution or linear" in refusal(None, exclude=["dwon", nn.Conv3d])
    assert "some that it has: 'first'" in refusal(None, exclude="layer1.*")
    assert "is no convolution or linear" in refusal({aten.relu.default: "float"})
    assert "selects nothing" in refusal({3: "float"})
    quantize({nn.Conv1d: "float"})  # said of many models


class Fork(nn.Module):
    """Two linears that read the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


def test_layers_that_read_the_same_values_have_one_activation() -> None:
    x = X.reshape(-1, 8)

    def forked(left: str, right: str) -> None:
        config = {"left": LayerConfig(activation=left), "right": LayerConfig(activation=right)}
        inductor_x86q.quantize(Fork().eval(), (x,), calibration=[x], config=config)

    forked("minmax", "minmax")
    with pytest.raises(QuantizationError, match=r"'left' the activation .* 'right' .* both read the same values"):
        forked("minmax", "mse")


# --- torchao's configuration ------------------------------------------------------------------------------------------


def test_torchao_configuration_converts() -> None:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as theirs

    quantizer = theirs.X86InductorQuantizer()
    quantizer.set_global(theirs.get_default_x86_inductor_quantization_config())
    quantizer.set_function_type_qconfig(nn.functional.linear, None)
    quantizer.set_module_name_qconfig("down", theirs.get_default_x86_inductor_quantization_config())
    ours = inductor_x86q.from_x86_inductor(quantizer)
    prepared = torchao.prepare_pt2e(torch.export.export(net(), (X,)).module(), ours)
    prepared(X)
    graph = inductor_x86q.convert(prepared)
    assert how(graph) == {"first": "static", "second": "static", "up": "float", "down": "static", "head": "float"}
    with pytest.raises(QuantizationError, match="expected torchao's X86InductorQuantizer"):
        inductor_x86q.from_x86_inductor(3)
    with pytest.raises(QuantizationError, match="is a SimpleNamespace"):
        inductor_x86q.from_x86_inductor(SimpleNamespace(global_config=None))


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_loader_of_images_and_labels() -> None:
    loader = DataLoader(TensorDataset(X, torch.arange(4)), batch_size=2)
    with pytest.warns(UserWarning, match="takes 1: the rest is left out") as caught:
        graph = quantize(None, calibration=loader)
    assert len([one for one in caught if one.category is UserWarning]) == 1
    assert scale(graph) == scale(quantize(None, calibration=[X[:2], X[2:]]))


def test_transform_and_max_batches() -> None:
    batches = [{"image": X}, {"image": 5 * X}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # torch 2.13's own
        short = quantize("minmax", calibration=batches, transform=lambda batch: batch["image"], max_batches=1)
        long = quantize("minmax", calibration=batches, transform=lambda batch: batch["image"])
    assert 4 < scale(long) / scale(short) < 6
    assert "max_batches is 0" in refusal(None, max_batches=0)
    assert "expected a function" in refusal(None, transform=3)
