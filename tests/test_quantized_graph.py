"""What `quantize` returns, as a module: names, saving and loading, copies, train and eval."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q.graph.quantized_graph import QuantizedGraph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.stem__0 = nn.Conv2d(8, 8, 1)  # its tensors would get the names that the stem's have at the root
        self.head = nn.Linear(8, 4)
        self.register_buffer("offset", torch.randn(4))
        self.inner = nn.Module()
        self.inner.register_buffer("scratch", torch.randn(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem__0(self.stem(x)).mean((2, 3))
        return self.head(x) * self.offset + self.inner.scratch


X = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def graph(seed: int = 0) -> QuantizedGraph:
    torch.manual_seed(seed)
    return inductor_x86q.quantize(Net().eval(), (X,), calibration=[X])


@pytest.fixture
def quantized() -> QuantizedGraph:
    return graph()


SCRATCH = {"inner.scratch"}  # not persistent, which copies of graphs forget in older torch
LAYERS = ("stem.0", "stem__0", "head")
NAMES = {"offset", *(f"{layer}.{name}" for layer in LAYERS for name in ("bias", "weight_int8", "weight_scale", "weight_zero_point"))}  # fmt: skip


def test_tensors_lie_at_the_root_and_have_the_names_of_the_model(quantized: QuantizedGraph) -> None:
    """Dynamo guards each module on the way to a tensor."""
    assert set(quantized.state_dict()) - SCRATCH == NAMES
    assert all("." not in name for name, _ in [*quantized.named_parameters(), *quantized.named_buffers()])
    assert [name for name, module in quantized.named_children() if any(True for _ in module.buffers())] == []


def test_saving_and_loading(quantized: QuantizedGraph) -> None:
    other = graph(seed=1)
    before = other(X)
    state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    assert not other.load_state_dict(state).missing_keys
    # What differs still is the ranges of activations, which are arguments in the graph, and what is not persistent.
    assert not torch.equal(other(X), before)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_what_is_missing_or_unexpected_is_named_as_in_the_model(quantized: QuantizedGraph) -> None:
    state = quantized.state_dict()
    state["stem.0.weights"] = state.pop("stem.0.weight_int8")
    result = quantized.load_state_dict(state, strict=False)
    assert result.missing_keys == ["stem.0.weight_int8"]
    assert result.unexpected_keys == ["stem.0.weights"]


def test_within_another_module(quantized: QuantizedGraph) -> None:
    outer = nn.Sequential(nn.Identity(), quantized)
    assert set(outer.state_dict()) >= {f"1.{name}" for name in NAMES}
    assert not outer.load_state_dict(outer.state_dict()).missing_keys


def test_copies_keep_names(quantized: QuantizedGraph) -> None:
    twin = copy.deepcopy(quantized)
    assert list(twin.state_dict()) == list(quantized.state_dict())
    assert torch.equal(twin(X), quantized(X))


def test_eval_and_train_change_nothing(quantized: QuantizedGraph) -> None:
    assert not quantized.training
    before = quantized(X)
    assert torch.equal(quantized.train()(X), before)
    assert torch.equal(quantized.eval()(X), before)


def test_another_tensor_is_compiled_again(quantized: QuantizedGraph) -> None:
    run = torch.compile(quantized, backend="inductor_x86q")
    with torch.no_grad():
        before = run(X)
        state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
        state["head.bias"] += 1
        quantized.load_state_dict(state, assign=True)
        torch.testing.assert_close(run(X), quantized(X), rtol=0, atol=0.02)
        assert (run(X) - before).abs().min() > 0.01
