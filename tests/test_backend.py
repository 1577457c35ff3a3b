"""The torch.compile backend: what it takes, options, errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import inductor_x86q
from inductor_x86q import testing
from inductor_x86q.testing import assert_close_to_reference, assert_fused, assert_same
from tests.models import Net, quantized_net

NET_CALLS = {"qconv": 1, "qconv.binary": 1, "qlinear": 1}


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    return quantized_net()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16)


def compiled(model: nn.Module, **keywords: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="inductor_x86q", **keywords)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert_same(got, expected, min_snr=30)


# --- it just works ----------------------------------------------------------------------------------------------------


def test_calls_the_kernels_and_gives_the_reference(net: fx.GraphModule, image: torch.Tensor) -> None:
    assert_close_to_reference(net, (image,), min_snr=30)
    assert_fused(net, (image,), NET_CALLS)


def test_needs_no_no_grad_where_nothing_requires_grad(net: fx.GraphModule, image: torch.Tensor) -> None:
    assert torch.is_grad_enabled()
    result = compiled(net)(image)
    assert not result.requires_grad
    assert_close(result, net(image))


def test_works_under_inference_mode(net: fx.GraphModule, image: torch.Tensor) -> None:
    with torch.inference_mode():
        assert_close(compiled(net)(image), net(image))


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=["weights", "weights-last"])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last], ids=["input", "input-last"])
def test_memory_formats(weights: torch.memory_format, inputs: torch.memory_format, image: torch.Tensor) -> None:
    model = Net().eval().to(memory_format=weights)
    x = image.to(memory_format=inputs)
    quantized = inductor_x86q.quantize(model, (x,), calibration=[x], reduce_range=True)
    assert_fused(quantized, (x,), NET_CALLS)
    assert_close(compiled(quantized)(x), quantized(x))


def test_batch_size_may_change(net: fx.GraphModule) -> None:
    run = compiled(net)
    for batch in (4, 1, 7, 2):
        x = torch.randn(batch, 3, 16, 16)
        assert_close(run(x), net(x))


def test_inputs_are_left_alone_and_calls_do_not_leak(net: fx.GraphModule, image: torch.Tensor) -> None:
    run, other = compiled(net), torch.randn_like(image)
    kept, first = image.clone(), run(image)
    before = first.clone()
    run(other)
    assert torch.equal(run(image), before)
    assert torch.equal(first, before)
    assert torch.equal(image, kept)


def test_weights_are_constants_once_compiled(image: torch.Tensor) -> None:
    quantized = quantized_net()
    run = compiled(quantized)
    before = run(image)
    with torch.no_grad():
        quantized.state_dict()["head.weight_int8"].zero_()
    torch.testing.assert_close(run(image), before, rtol=0, atol=0)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = testing.QLinear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(testing.quantize_dequantize(x, 0.02, 60))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_another_tensor_in_the_place_of_a_weight_is_compiled_again(name: str) -> None:
    x, model = torch.randn(4, 16), OneLayer()
    run = compiled(model)
    assert_close(run(x), model(x))
    setattr(model.layer, name, -getattr(model.layer, name))
    assert_close(run(x), model(x))


def test_guards_may_be_left_out() -> None:
    x, model = torch.randn(4, 16), OneLayer()
    unguarded = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    run = compiled(model, options=unguarded)
    before = run(x)
    assert_close(before, model(x))
    model.layer.bias = -model.layer.bias
    torch.testing.assert_close(run(x), before, rtol=0, atol=0)


def test_tied_weights_may_come_apart() -> None:
    x, model = torch.randn(4, 16), nn.Sequential(OneLayer(), nn.ReLU(), OneLayer())
    model[2].layer.weight = model[0].layer.weight
    run = compiled(model)
    assert_close(run(x), model(x))
    model[2].layer.weight = -model[2].layer.weight
    assert_close(run(x), model(x))


def test_state_that_the_model_replaces_is_read_at_each_call() -> None:
    class Counting(OneLayer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return super().forward(x) * self.calls

    x, model, reference = torch.randn(4, 16), Counting(), Counting()
    run = compiled(model)
    for _ in range(3):
        assert_close(run(x), reference(x))


def test_two_models_of_one_class_keep_their_weights() -> None:
    x, first, second = torch.randn(4, 16), OneLayer(), OneLayer()
    second.layer.weight.neg_()
    runs = compiled(first), compiled(second)
    for _ in range(2):
        for run, model in zip(runs, (first, second), strict=True):
            assert_close(run(x), model(x))


def test_parameters_may_be_inputs_of_the_graph(net: fx.GraphModule, image: torch.Tensor) -> None:
    """Dynamo lifts a module's parameters to inputs; a function around the module makes no difference."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return net(x * 2) + 1

    with torch.no_grad():
        assert_close(torch.compile(call, backend="inductor_x86q")(image), call(image))


class LateInputs(nn.Module):
    """Reads its parameters before its inputs, of which there are two: Dynamo lifts them in that order."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.shift = nn.Parameter(torch.randn(1, 3, 16, 16), requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift = self.shift * 2
        return self.net(shift + y) - x


def test_inputs_may_come_after_parameters(net: fx.GraphModule, image: torch.Tensor) -> None:
    model, x = LateInputs(net), torch.randn(4, 10)
    with torch.no_grad():
        assert_close(compiled(model)(x, image), model(x, image))


def test_freezing_cannot_be_switched_off(net: fx.GraphModule, image: torch.Tensor) -> None:
    compiled = torch.compile(net, backend="inductor_x86q", options={"freezing": False})
    with pytest.raises(Exception, match="option `freezing` is False: the int8 passes run on frozen weights only"):
        compiled(image)


@pytest.mark.parametrize("freezing", [True, False])
def test_global_freezing_makes_no_difference(net: fx.GraphModule, image: torch.Tensor, freezing: bool) -> None:
    with torch._inductor.config.patch(freezing=freezing), torch.no_grad():
        assert_fused(net, (image,), NET_CALLS)
        assert_close(compiled(net)(image), net(image))


# --- options ----------------------------------------------------------------------------------------------------------


def test_inductor_options_reach_inductor(net: fx.GraphModule, image: torch.Tensor) -> None:
    default = inductor_x86q.cpp_code(net, (image,))
    python = inductor_x86q.cpp_code(net, (image,), options={"cpp_wrapper": False, "kernels": "onednn"})
    assert "inductor_entry_impl" in default
    assert "inductor_entry_impl" not in python
    assert "torch.ops.onednn.qconv_pointwise" in python


def test_modes(net: fx.GraphModule, image: torch.Tensor) -> None:
    assert_close(compiled(net, mode="default")(image), net(image))
    with pytest.raises(RuntimeError, match=r"(?i)unrecognized mode"):
        compiled(net, mode="fastest")(image)


def test_unknown_option_is_named(net: fx.GraphModule, image: torch.Tensor) -> None:
    expected = "unknown option 'freezer': expected `strict`, `kernels` or an Inductor option"
    with pytest.raises(Exception, match=expected):
        compiled(net, options={"freezer": True})(image)
    with pytest.raises(inductor_x86q.CompileError, match=expected):
        inductor_x86q.explain(net, (image,), options={"freezer": True})
    with pytest.raises(inductor_x86q.CompileError, match="option `strict` is 1: expected True or False"):
        inductor_x86q.explain(net, (image,), options={"strict": 1})


def half_quantized() -> fx.GraphModule:
    """Net with the dequantize in front of the second convolution's weight taken out."""
    quantized = quantized_net()
    weight = next(
        n.args[1] for n in quantized.graph.nodes if str(n.target).startswith("aten.conv2d") and "second" in str(n.args[1].args[0])
    )  # fmt: skip
    with torch.no_grad():
        constants = [quantized.get_buffer(str(a.target)) for a in weight.args[:3]]
        quantized.register_buffer("restored", constants[0] * constants[1].view(-1, 1, 1, 1))
    with quantized.graph.inserting_before(weight):
        weight.replace_all_uses_with(quantized.graph.get_attr("restored"))
    quantized.graph.eliminate_dead_code()
    quantized.recompile()
    return quantized


def test_strict_names_the_layer_and_what_to_do(image: torch.Tensor) -> None:
    quantized = half_quantized()
    with pytest.raises(Exception, match=r"second.*quantize the weight to int8") as raised:
        compiled(quantized, options={"strict": True})(image)
    assert "1 layers that should run in int8 do not" in str(raised.value)


def test_without_strict_a_miss_is_logged_and_computed_in_float(
    image: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    quantized = half_quantized()
    with caplog.at_level(logging.WARNING, logger="inductor_x86q"):
        assert_close(compiled(quantized)(image), quantized(image))
    assert [r.levelname for r in caplog.records if "second" in r.getMessage()] == ["WARNING"]


def test_strict_lets_a_whole_network_through(net: fx.GraphModule, image: torch.Tensor) -> None:
    assert_close(compiled(net, options={"strict": True})(image), net(image))


def test_strict_does_not_count_what_was_excluded(image: torch.Tensor) -> None:
    quantized = inductor_x86q.quantize(
        Net().eval(), (image,), calibration=[image], exclude=["first"], reduce_range=True
    )
    report = inductor_x86q.explain(quantized, (image,), options={"strict": True})
    assert [miss.layer for miss in report.kept_float] == ["first"]
    assert report.missed == []
    assert_close(compiled(quantized, options={"strict": True})(image), quantized(image))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_input_that_requires_grad(net: fx.GraphModule, image: torch.Tensor) -> None:
    x = image.requires_grad_()
    with pytest.raises(Exception, match=r"an input of shape \(4, 3, 16, 16\) requires grad") as raised:
        compiled(net)(x)
    assert "torch.no_grad()" in str(raised.value)
    assert "torch.inference_mode()" in str(raised.value)
    with torch.no_grad():
        assert_close(compiled(net)(x), net(x))


def test_a_parameter_that_requires_grad(image: torch.Tensor) -> None:
    quantized = quantized_net()
    for parameter in quantized.parameters():
        parameter.requires_grad_()
    with pytest.raises(Exception, match=r"a parameter of shape .* requires grad"):
        compiled(quantized)(image)
    with torch.no_grad():
        assert_close(compiled(quantized)(image), quantized(image))


def test_no_cxx_compiler(net: fx.GraphModule, image: torch.Tensor) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(Exception, match=r"no C\+\+ compiler found \(looked for no-such-compiler\)") as raised,
    ):
        compiled(net)(image)
    assert "apt-get install g++" in str(raised.value)


def test_models_and_inputs_of_the_wrong_type(net: fx.GraphModule, image: torch.Tensor) -> None:
    with pytest.raises(inductor_x86q.CompileError, match="model is a function"):
        inductor_x86q.explain(lambda x: x, (image,))  # type: ignore[arg-type]
    with pytest.raises(inductor_x86q.CompileError, match="example_inputs is a Tensor: expected a tuple"):
        inductor_x86q.cpp_code(net, image)  # type: ignore[arg-type]
