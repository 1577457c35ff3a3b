"""What quantize() takes as model, example inputs and calibration data, and what bad ones get to hear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import inductor_x86q
from inductor_x86q.graph import qdq
from inductor_x86q.quantization import arguments, calibration
from tests.models import Residual, image, quantized, residual

# --- calibration ------------------------------------------------------------------------------------------------------


def activation_scales(graph_module: fx.GraphModule) -> list[float]:
    return [qdq.qparams(node).scale for node in graph_module.graph.nodes if qdq.is_quantize(node)]


def test_calibration_takes_tuples_tensors_lists_and_generators_alike() -> None:
    x = image()
    forms: list[Any] = [[(x,)], [x], [[x]], ((y,) for y in [x])]
    scales = [activation_scales(inductor_x86q.quantize(residual(), (x,), calibration=form)) for form in forms]
    assert scales[1:] == scales[:1] * 3


@pytest.mark.parametrize("example", [1, 4])
def test_last_batch_may_be_smaller(example: int) -> None:
    batches = [image(4), image(4), image(1) * 3]
    graph_module = inductor_x86q.quantize(residual(), (image(example),), calibration=batches)
    alone = inductor_x86q.quantize(residual(), (image(example),), calibration=batches[:2])
    assert activation_scales(graph_module)[0] > 1.2 * activation_scales(alone)[0]  # it was seen
    assert graph_module(image(3)).shape == (3, 5)


class FixedBatch(nn.Module):
    """A model that is written for batches of four."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.view(4, 2, 8)).sum(1)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_other_batch_sizes_fit_a_model_of_one_batch_size(size: int) -> None:
    model = FixedBatch().eval()
    x = torch.randn(4, 16)
    small = torch.randn(size, 16)
    small[0, 0] = 50.0
    graph_module = inductor_x86q.quantize(model, (x,), calibration=[x, small], reduce_range=True)
    assert activation_scales(graph_module)[0] * 127 > 30
    assert graph_module(x).shape == (4, 8)


def test_no_progress_bar_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    quantized(residual(), (image(),))
    assert capfd.readouterr() == ("", "")


# --- errors -----------------------------------------------------------------------------------------------------------


def message(model: Any, inputs: Any = None, **keywords: Any) -> str:
    inputs = (image(),) if inputs is None else inputs
    with pytest.raises(inductor_x86q.QuantizationError) as raised:
        inductor_x86q.quantize(model, inputs, **{"calibration": [inputs], **keywords})
    return str(raised.value)


def test_train_mode_is_named_with_the_module() -> None:
    assert "model.eval()" in message(Residual())
    model = residual()
    model.norm.train()
    assert "'norm' is in train mode" in message(model)


def test_example_inputs_must_be_a_tuple() -> None:
    assert "Tensor: expected a tuple" in message(residual(), image())
    assert "list: expected a tuple" in message(residual(), [image()])


def test_calibration_data_must_be_there() -> None:
    assert "no calibration data: pass calibration=" in message(residual(), calibration=None)
    assert "no calibration data: the iterable was empty" in message(residual(), calibration=[])


def test_model_must_be_a_module() -> None:
    assert "function: expected a torch.nn.Module" in message(lambda x: x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_with_the_layer(value: float) -> None:
    x = image()
    x[0, 0, 0, 0] = value
    assert "NaN or infinity in input 'x'" in message(residual(), (image(),), calibration=[x])
    model = residual()
    with torch.no_grad():
        assert model.second.bias is not None
        model.second.bias[0] = value if value > 0 else float("nan")  # relu makes 0 of -infinity
    text = message(model, (image(),))
    assert "NaN or infinity" in text
    assert "second" in text or "relu" in text


def test_nothing_to_quantize() -> None:
    assert "no convolution or linear" in message(nn.ReLU().eval())


def test_everything_excluded() -> None:
    text = message(residual(), exclude=[nn.Conv2d, nn.Linear])
    assert "nothing to quantize" in text
    assert all(name in text for name in ("first", "second", "head"))


def test_names_that_the_model_collects() -> None:
    def forward(x: Any, **more: Any) -> None: ...

    assert arguments.bind(forward, (1,), {"mask": 2}) == {"x": 1, "more": {"mask": 2}}


def test_first_calls_make_up_both_rows_and_values() -> None:
    graph_module, x = fx.symbolic_trace(nn.ReLU()), torch.ones(2, 3)
    count = [len(calibration.first_calls(graph_module, [x] * 9, None, *least)) for least in ((2, 13), (5, 6), (2, 6))]
    assert count == [3, 3, 1]
