"""prepare_qat(): what training sees, how batch norms are folded, and what the trained graph compiles to."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import inductor_x86q
from inductor_x86q import QuantizationError, testing
from inductor_x86q.graph import qdq
from inductor_x86q.quantization import torchao

IMAGE = (4, 8, 6, 6)


class Form(nn.Module):
    """A layer, the batch norm behind it, and a function of the module and its input."""

    def __init__(self, function: Callable[[Form, torch.Tensor], torch.Tensor], layer: nn.Module, norm: nn.Module,
                 **others: nn.Module) -> None:  # fmt: skip
        super().__init__()
        self.function, self.layer, self.norm = function, layer, norm
        for name, module in others.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def conv(**arguments: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, **{"padding": 1, "bias": False, **arguments})


def norm(**arguments: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(8, **arguments)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], Form]
    absorbed: tuple[str, ...] = ()  # by the layer's kernel
    kernel: str = "onednn.qconv_pointwise.default"


def then(activation: Callable[[torch.Tensor], torch.Tensor] = lambda y: y) -> Callable[[Form, torch.Tensor], Any]:
    return lambda m, x: activation(m.norm(m.layer(x)))


def plain(name: str, layer: Callable[[], nn.Module], make_norm: Callable[[], nn.Module] = norm, **fields: Any) -> Row:
    return Row(name, lambda: Form(then(), layer(), make_norm()), **fields)


def activated(activation: Callable[[torch.Tensor], torch.Tensor], absorbed: str) -> Row:
    return Row(f"conv, bn, {absorbed}", lambda: Form(then(activation), conv(), norm()), (absorbed,))


def added(name: str, function: Callable[[Form, torch.Tensor], Any], *absorbed: str) -> Row:
    return Row(name, lambda: Form(function, conv(), norm(), other=conv()), absorbed, "onednn.qconv2d_pointwise.binary")


def dirty_norm() -> nn.BatchNorm2d:
    made = norm()
    nn.init.zeros_(made.weight)
    return made


def frozen_norm() -> nn.BatchNorm2d:
    made = norm()
    made.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
    return made.eval()


LINEAR = {"kernel": "onednn.qlinear_pointwise.default"}
FORMS = (
    plain("conv, bn", conv),
    plain("conv with bias, bn", lambda: conv(bias=True)),
    plain("conv, bn with other ε and momentum", conv, lambda: norm(eps=0.1, momentum=0.5)),
    plain("conv, bn without γ and β", conv, lambda: norm(affine=False)),
    plain("conv, bn whose γ is 0", conv, dirty_norm),
    plain("conv, bn in eval mode", conv, frozen_norm),
    plain("conv, depthwise, bn", lambda: conv(groups=8)),
    plain("conv, padding same, bn", lambda: conv(padding="same")),
    plain("conv1d, bn", lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3)), lambda: nn.BatchNorm1d(8)),
    activated(F.relu, "relu"),
    activated(F.relu6, "hardtanh"),
    activated(F.hardswish, "hardswish"),
    activated(F.silu, "silu"),
    added("conv, bn, add", lambda m, x: m.other(x) + m.norm(m.layer(x)), "add"),
    added("conv, bn, add, relu", lambda m, x: F.relu(m.other(x) + m.norm(m.layer(x))), "add", "relu"),
    Row("linear", lambda: Form(lambda m, x: m.layer(x), nn.Linear(6, 5), nn.Identity()), **LINEAR),
    Row("linear, relu", lambda: Form(lambda m, x: F.relu(m.layer(x)), nn.Linear(6, 5), nn.Identity()), ("relu",), **LINEAR),
    plain("linear, bn", lambda: nn.Sequential(nn.Flatten(1), nn.Linear(288, 8)), lambda: nn.BatchNorm1d(8), **LINEAR),
)  # fmt: skip


class Together(nn.Module):
    """All forms on one input; their results one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.forms = nn.ModuleList(row.make() for row in FORMS)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [form(x) for form in self.forms]


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        loss = sum(y.square().mean() + y.mean() for y in model(torch.randn(IMAGE, generator=random)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()


def fake_quantizers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, torchao.FakeQuantize)]


@dataclasses.dataclass
class Trained:
    model: Together
    before: dict[str, torch.Tensor]
    prepared: fx.GraphModule
    converted: fx.GraphModule
    compiled: testing.Compiled
    x: torch.Tensor

    def results(self, module: Callable[..., Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return module(self.x)


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    model = Together().train()
    for module in model.forms:
        if isinstance(module.norm, nn.BatchNorm2d) and not module.norm.training:
            module.norm.eval()
    model.forms[5].norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = inductor_x86q.prepare_qat(model, (torch.randn(IMAGE),))
    train(prepared)
    converted = inductor_x86q.convert(prepared)
    x = torch.randn(3, *IMAGE[1:])
    return Trained(
        model, before, prepared, converted, testing.compile_once(converted, (x,), options={"kernels": "onednn"}), x
    )


@pytest.mark.parametrize("number", range(len(FORMS)), ids=lambda n: FORMS[n].name)
def test_kernel(trained: Trained, number: int) -> None:
    of_form = [f for f in trained.compiled.report.fused if f.layer.startswith(f"forms.{number}.layer")]
    (fusion,) = of_form
    assert (fusion.kernel, fusion.absorbed) == (FORMS[number].kernel, FORMS[number].absorbed)


@pytest.mark.parametrize("number", range(len(FORMS)), ids=lambda n: FORMS[n].name)
def test_numbers(trained: Trained, number: int) -> None:
    """Compiled equals the q/dq graph; that computes what training saw in eval mode."""
    reference = trained.results(trained.converted)[number]
    assert reference.abs().max() > 0.01
    testing.assert_same(trained.compiled.outputs[number], reference)
    seen = trained.results(copy.deepcopy(trained.prepared).eval())[number]
    testing.assert_same(reference, seen, min_snr=40)  # an input on the edge between two steps may fall either way


def test_calls_and_rest(trained: Trained) -> None:
    linears = sum(row.kernel.startswith("onednn.qlinear") for row in FORMS)
    sums = sum("binary" in row.kernel for row in FORMS)
    calls = testing.int8_calls(trained.compiled.code)
    assert calls == {"qconv": len(FORMS) - linears, "qconv.binary": sums, "qlinear": linears}
    assert not testing.float_calls(trained.compiled.code)
    left = [str(node.target) for node in trained.converted.graph.nodes]
    assert not any(name in target for target in left for name in ("batch_norm", "add_", "sqrt", "reciprocal"))


def test_weights_keep_their_names_and_the_model_its_values(trained: Trained) -> None:
    state = trained.converted.state_dict()
    assert state["forms.0.layer.weight_int8"].dtype == torch.int8
    assert state["forms.0.layer.bias"].shape == (8,)
    assert "forms.0.norm.running_var" not in state
    assert not any(parameter.requires_grad for parameter in trained.converted.parameters())
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, trained.before[name]), name


def test_training_goes_on_after_converting(trained: Trained) -> None:
    prepared = copy.deepcopy(trained.prepared)
    before = [parameter.clone() for parameter in prepared.parameters()]
    inductor_x86q.convert(prepared)
    train(prepared, steps=1)
    assert prepared.training
    assert any(not torch.equal(old, new) for old, new in zip(before, prepared.parameters(), strict=True))


# --- what training sees -----------------------------------------------------------------------------------------------


def test_is_the_float_model_where_nothing_is_rounded() -> None:
    """With rounding off a training graph trains as the model does: same results, statistics and gradients."""
    model = Together().train()
    model.forms[5].norm.eval()
    prepared = inductor_x86q.prepare_qat(model, (torch.randn(IMAGE),))
    for module in fake_quantizers(prepared):
        module.disable_fake_quant()
    train(prepared)
    train(model)
    expected = model.state_dict()
    found = prepared.state_dict()
    for name, tensor in expected.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_weights_are_rounded_as_they_will_be_folded() -> None:
    """The weight that training sees holds at most 256 values a channel, those of the converted graph."""
    prepared = inductor_x86q.prepare_qat(Form(then(), conv(), norm()).train(), (torch.randn(IMAGE),))
    with torch.no_grad():
        for _ in range(3):
            prepared(torch.randn(IMAGE) * 3)
    seen: list[torch.Tensor] = []
    (weight,) = [module for module in fake_quantizers(prepared) if module.is_per_channel]
    weight.register_forward_hook(lambda module, inputs, output: seen.append(output))
    prepared.eval()(torch.randn(IMAGE))
    converted = inductor_x86q.convert(prepared)
    integers, scale = (converted.state_dict()[f"layer.weight_{name}"] for name in ("int8", "scale"))
    torch.testing.assert_close(integers * scale.reshape(-1, 1, 1, 1), seen[0].detach())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = conv(), norm(), nn.Dropout(0.5)
        self.second, self.last = conv(), norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.drop(F.relu(self.norm(self.first(x))))))


@pytest.fixture
def small() -> fx.GraphModule:
    return inductor_x86q.prepare_qat(Small().train(), (torch.randn(IMAGE),))


def arguments_by_mode(model: fx.GraphModule) -> list[Any]:
    found = []
    for node in model.graph.nodes:
        if node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default):
            arguments = qdq.schema_arguments(node)
            found.append(arguments.get("training", arguments.get("train")))
    return found


def test_train_and_eval(small: fx.GraphModule) -> None:
    assert arguments_by_mode(small) == [True, True, True]
    small(torch.randn(IMAGE))
    x = torch.randn(IMAGE) * 10
    evaluating = copy.deepcopy(small).eval()
    assert arguments_by_mode(evaluating) == [False, False, False]
    before = {name: tensor.clone() for name, tensor in evaluating.state_dict().items()}
    assert torch.equal(evaluating(x), evaluating(x))
    weights = [name for name, module in evaluating.named_modules() if getattr(module, "is_per_channel", False)]
    for name, tensor in evaluating.state_dict().items():
        if not name.endswith("observer_enabled") and not name.startswith(tuple(weights)):
            assert torch.equal(tensor, before[name]), f"{name} changed while evaluating"
    assert arguments_by_mode(evaluating.train()) == [True, True, True]
    activation = next(module for module in fake_quantizers(evaluating) if not module.is_per_channel)
    high = activation.activation_post_process.max_val.clone()
    evaluating(x)
    assert activation.activation_post_process.max_val > high


def test_observers_that_were_switched_off_stay_off(small: fx.GraphModule) -> None:
    small(torch.randn(IMAGE))
    first, *others = (module for module in fake_quantizers(small) if not module.is_per_channel)
    first.disable_observer()
    small.eval()
    small.train()
    assert [int(module.observer_enabled) for module in (first, *others)] == [0, *[1] * len(others)]


def test_checkpoint(small: fx.GraphModule) -> None:
    """The state of one training graph, loaded into another of the same model, converts to the same net."""
    small(torch.randn(IMAGE))
    other = inductor_x86q.prepare_qat(Small().train(), (torch.randn(IMAGE),))
    other.load_state_dict(small.state_dict())
    x = torch.randn(2, *IMAGE[1:])
    assert torch.equal(inductor_x86q.convert(other)(x), inductor_x86q.convert(small)(x))


def test_dropout_of_attention_is_off_when_evaluating() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 5, 8)
    prepared = inductor_x86q.prepare_qat(Attention().train(), (x,))
    assert not torch.equal(prepared(x), prepared(x))
    converted = inductor_x86q.convert(prepared)
    assert torch.equal(converted(x), converted(x))


# --- what is left out, and what is refused ----------------------------------------------------------------------------


def test_excluded_layers_are_left_as_they_are() -> None:
    model = Small().train()
    prepared = inductor_x86q.prepare_qat(model, (torch.randn(IMAGE),), exclude=["first"])
    with torch.no_grad():
        prepared(torch.randn(IMAGE))
    converted = inductor_x86q.convert(prepared)
    targets = [str(node.target) for node in converted.graph.nodes]
    assert targets.count("aten.batch_norm.default") == 1
    assert set(converted.state_dict()) >= {"first.weight", "norm.weight"}
    report = inductor_x86q.explain(converted, (torch.randn(IMAGE),))
    assert [f.layer for f in report.fused] == ["second"]
    assert [m.layer for m in report.kept_float] == ["first"]


def test_torchaos_own_steps() -> None:
    """X86Quantizer(is_qat=True) under torchao's prepare_qat_pt2e; its own rewriting of batch norms finds none left."""
    x = torch.randn(IMAGE)
    exported = torch.export.export(Form(then(F.relu), conv(), norm(eps=0.1)).train(), (x,)).module()
    prepared = torchao.prepare_qat_pt2e(exported, inductor_x86q.X86Quantizer(is_qat=True))
    prepared(x)
    converted = inductor_x86q.convert(prepared)
    report = inductor_x86q.explain(converted, (x,))
    assert [f.absorbed for f in report.fused] == [("relu",)]
    assert not any("batch_norm" in str(node.target) for node in converted.graph.nodes)


@pytest.mark.parametrize(("model", "inputs", "message"), [
    (lambda: Small().eval(), (torch.randn(IMAGE),), "call model.train"),
    (lambda: Small().train(), torch.randn(IMAGE), "expected a tuple"),
    (lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()).train(), (torch.randn(IMAGE),), "nothing to quantize"),
    (lambda: "model", (torch.randn(IMAGE),), "expected a torch.nn.Module"),
], ids=["in eval mode", "no tuple", "no layer", "no module"])  # fmt: skip
def test_refused(model: Any, inputs: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        inductor_x86q.prepare_qat(model(), inputs)
