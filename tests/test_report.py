"""The report: what it says of each layer, a miss for each reason, its files; timing, why and the debug dump."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inductor_x86q import No, Report, Rule, StrictError, cpu, explain, register_pass, testing, why
from inductor_x86q.graph.reasons import Obstacle, Reason
from inductor_x86q.report import Fusion, Miss
from inductor_x86q.testing import QConv2d, QLinear, qdq_graph, quantize_dequantize

F = nn.functional


class Net(nn.Module):
    """A convolution with a residual sum, a pool, a linear: int8 but for the head, which is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = QConv2d(16, 16, 3, padding=1)
        self.conv2 = QConv2d(16, 16, 3, padding=1)
        self.fc = QLinear(16 * 16, 32)
        self.head = nn.Linear(32, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = quantize_dequantize(torch.relu(self.conv1(quantize_dequantize(x))), 0.02, 0)
        x = quantize_dequantize(torch.add(self.conv2(x), x, alpha=0.5))
        x = quantize_dequantize(F.avg_pool2d(x, 2))
        return self.head(self.fc(torch.flatten(x, 1)))


INPUTS = (torch.randn(1, 16, 8, 8),)


@pytest.fixture(scope="module")
def net() -> torch.fx.GraphModule:
    return qdq_graph(Net(), INPUTS)


@pytest.fixture(scope="module")
def report(net: torch.fx.GraphModule) -> Report:
    return explain(net, INPUTS)


def test_fused_layers(report: Report) -> None:
    assert [f.layer for f in report.fused] == ["conv1", "conv2", "fc"]
    conv1 = report.fused[0]
    assert conv1.kernel == "onednn.qconv_pointwise.default"
    assert conv1.absorbed[0] == "relu"
    assert (conv1.input_dtype, conv1.weight_dtype, conv1.output_dtype) == ("uint8", "int8", "uint8")
    assert (conv1.input_scale, conv1.input_zero_point) == (0.02, 60)
    assert (conv1.output_scale, conv1.output_zero_point) == (0.02, 0)
    assert conv1.output_shape == (1, 16, 8, 8)
    assert conv1.macs == 16 * 64 * 16 * 9
    assert conv1.source.rsplit(":", 1)[0].endswith("testing/graphs.py")


def test_totals(report: Report) -> None:
    totals = report.totals()
    assert (totals["layers"], totals["int8_layers"], totals["missed"], totals["kept_float"]) == (4, 3, 0, 1)
    assert totals["macs"] == 2 * 16 * 64 * 16 * 9 + 256 * 32 + 32 * 20
    assert totals["int8_macs"] == totals["macs"] - 32 * 20
    assert report.int8_share_of_layers == 0.75
    assert report.float_subgraphs == 2  # the scaled sum, and the pool
    assert totals["microseconds"] is None
    assert report.kept_float[0].layer == "head"
    assert report.kept_float[0].reason is Reason.NOT_QUANTIZED


def test_generated_operations(report: Report) -> None:
    operators = [operation.operator for operation in report.generated]
    assert "avg_pool2d" in operators
    assert "add" in operators
    assert len(report.quantizes_left) == operators.count("quantize") >= 1


def test_text_fits_the_terminal(report: Report) -> None:
    table, _, rest = report.table(60).partition("\n\n")
    assert max(len(line) for line in table.splitlines()) <= 60
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["conv1", "conv2", "fc"]
    assert "head (linear)" in rest
    assert "3 of 4 layers in int8" in rest


def test_long_paths_keep_their_end() -> None:
    fusion = Fusion(
        "a.very.long.path." * 8 + "conv", "onednn.qconv_pointwise", "conv", (), "uint8", "int8", "uint8", (1, 2), 10
    )
    line = Report([fusion], [], []).table(80).splitlines()[2]
    assert line.startswith("…")
    assert ".conv " in line
    assert len(line) <= 80


def test_json_round_trip(report: Report) -> None:
    content = json.loads(report.to_json())
    assert (content["schema"], content["version"]) == ("inductor_x86q.report", 1)
    assert content["totals"] == report.totals()
    assert content["kept_float"][0]["obstacle"]["reason"] == "NOT_QUANTIZED"
    assert Report.from_json(report.to_json()) == report


def test_json_of_another_kind_or_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match="not a report"):
        Report.from_json("[]")
    with pytest.raises(ValueError, match="version 99"):
        Report.from_json('{"schema": "inductor_x86q.report", "version": 99}')


def test_two_graphs_keep_their_nodes_apart(report: Report) -> None:
    both = Report([], [], [])
    both.extend(report)
    both.extend(report)
    names = [node.name for node in both.nodes]
    assert len(names) == len(set(names)) == 2 * len(report.nodes)
    assert {f.node for f in both.fused} <= set(names)
    assert {source for node in both.nodes for source in node.inputs} <= set(names)
    assert both.float_subgraphs == 2 * report.float_subgraphs


# --- a miss for each reason -------------------------------------------------------------------------------------------


class One(nn.Module):
    """A layer called `fc`, and how its input and weight are made."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor], fc: nn.Module) -> None:
        super().__init__()
        self.fc = Wrapped(function, fc)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(*inputs)


class Wrapped(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, *inputs)


def linear(**changes: Any) -> QLinear:
    """A QLinear whose weight's scale or zero point is not what the kernels take."""
    layer = QLinear(32, 48)
    for name, change in changes.items():
        setattr(layer, name, change(getattr(layer, name)))
    return layer


def run_time_weight(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(quantize_dequantize(x), quantize_dequantize(weight, dtype=torch.int8, zero_point=0, quant_min=-127))


def quantized_input(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(quantize_dequantize(x))


def int16_input(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(quantize_dequantize(x, dtype=torch.int16, quant_max=1000))


X, WEIGHT = (4, 32), (48, 32)
REASONS: dict[Reason, tuple[Any, nn.Module, tuple[tuple[int, ...], ...], str]] = {
    Reason.NOT_QUANTIZED: (lambda layer, x: layer(x), nn.Linear(32, 48), (X,), "take it out of `exclude`"),
    Reason.NO_KERNEL: (
        lambda layer, x: torch.bmm(x, x.transpose(1, 2)), nn.Identity(), ((2, 4, 32),), "stays float"),
    Reason.ACTIVATION_NOT_QUANTIZED: (
        lambda layer, x: layer(x), QLinear(32, 48), (X,), "put quantize and dequantize in front of it"),
    Reason.WEIGHT_NOT_QUANTIZED: (quantized_input, nn.Linear(32, 48), (X,), "quantize the weight to int8"),
    Reason.WEIGHT_NOT_CONSTANT: (run_time_weight, nn.Identity(), (X, WEIGHT), "pass it as a parameter or buffer"),
    Reason.WEIGHT_TYPE: (quantized_input, linear(zero_point=lambda z: z + 3), (X,), "zero point other than 0"),
    Reason.ACTIVATION_TYPE: (int16_input, QLinear(32, 48), (X,), "int16"),
    Reason.BAD_PARAMETERS: (quantized_input, linear(scale=lambda s: -s), (X,), "calibrate again"),
    Reason.SATURATES: (
        lambda layer, x: layer(quantize_dequantize(x, quant_max=255)), QLinear(32, 48), (X,), "reduce_range=True"),
}  # fmt: skip


def test_every_reason_is_shown() -> None:
    assert {*REASONS, Reason.IN_A_REGION} == {*Reason}  # the last one in test_control_flow.py


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.name)
def test_each_reason(reason: Reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_vnni", lambda: False)
    function, layer, shapes, text = REASONS[reason]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    report = explain(qdq_graph(One(function, layer), inputs), inputs)
    misses = [miss for miss in (*report.missed, *report.kept_float) if miss.reason is reason]
    assert misses, f"{report}"
    assert misses[0].layer.startswith("fc")
    assert text in str(misses[0])
    assert (misses[0] in report.missed) is (reason not in (Reason.NOT_QUANTIZED, Reason.NO_KERNEL))


def test_vnni_lifts_the_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_vnni", lambda: True)
    function, layer, shapes, _ = REASONS[Reason.SATURATES]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    assert len(explain(qdq_graph(One(function, layer), inputs), inputs).fused) == 1


def test_a_product_too_small_for_a_kernel_is_named() -> None:
    inputs = (torch.randn(1, 16),)
    report = explain(qdq_graph(One(quantized_input, QLinear(16, 16)), inputs), inputs)
    assert report.fused or "too small" in str(report.kept_float[0])


def test_strict_raises_with_the_layer_and_what_to_change() -> None:
    function, layer, shapes, text = REASONS[Reason.WEIGHT_NOT_QUANTIZED]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    with pytest.raises(StrictError, match=f"fc.*{text}") as caught:
        explain(qdq_graph(One(function, layer), inputs), inputs, options={"strict": True})
    assert isinstance(caught.value.report, Report) and len(caught.value.report.missed) == 1


def test_misses_of_one_reason_share_a_line() -> None:
    misses = [Miss(name, "linear", Obstacle(Reason.NO_KERNEL), (1,), 1) for name in ("a", "b")]
    assert Report([], [], misses).table().count(Reason.NO_KERNEL.value) == 1


def test_code_of_each_call(net: torch.fx.GraphModule) -> None:
    report = explain(net, INPUTS, code=True, options={"kernels": "onednn"})
    calls = {node: call for call in report.code for node in call.nodes}
    conv1, pool = report.fused[0], next(o for o in report.generated if o.operator == "avg_pool2d")
    assert (calls[conv1.node].name, calls[conv1.node].kernel) == ("qconv", "")
    assert "aoti_torch_cpu__qconv_pointwise_tensor(" in calls[conv1.node].call
    assert calls[pool.node].call.startswith(calls[pool.node].name + "(")
    assert re.match(rf'extern "C"\s+void\s+{calls[pool.node].name}\(', calls[pool.node].kernel)
    assert Report.from_json(report.to_json()).code == report.code
    assert dataclasses.replace(report, code=[]).totals() == explain(net, INPUTS).totals()


# --- why, debug dump, passes of others --------------------------------------------------------------------------------


def test_why_names_the_check_that_failed(net: torch.fx.GraphModule) -> None:
    answers = [answer for answer in why(net, INPUTS, "head") if answer.stage == "normalize"]
    assert [(a.layer, a.rule, a.why) for a in answers] == [
        ("head", "matrix product", "its second operand is not a dequantized constant")
    ]


def test_why_asks_what_reads_the_node_too(net: torch.fx.GraphModule) -> None:
    answers = why(net, INPUTS, "conv2")
    (answer,) = [a for a in answers if a.stage == "fuse: post-ops" and a.rule == "addition"]
    assert answer.operator == "aten.add.Tensor"
    assert answer.why == "it scales its second operand by alpha=0.5"


def test_why_names_what_stood_in_the_way(net: torch.fx.GraphModule) -> None:
    (answer,) = [answer for answer in why(net, INPUTS, "head") if answer.stage == "normalize"]
    (place,) = answer.nodes
    assert place.layer == "head"
    assert str(answer).endswith(f"its second operand is not a dequantized constant [{place.node} of head]")

    inputs = (torch.randn(4, 32),)
    q = qdq_graph(One(lambda layer, x: (y := layer(quantize_dequantize(x))).relu() + y.sin(), QLinear(32, 48)), inputs)
    (answer,) = [answer for answer in why(q, inputs, "relu") if answer.rule == "activation"]
    assert answer.why == "the call's result has 2 users"
    assert [place.node for place in answer.nodes] == ["relu", "sin"]


def test_why_of_an_unknown_node_names_others(net: torch.fx.GraphModule) -> None:
    with pytest.raises(Exception, match=r"no stage's graph has a node or layer named 'covn9'"):
        why(net, INPUTS, "covn9")


def test_debug_dump(net: torch.fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_X86Q_DEBUG", str(tmp_path))
    explain(net, INPUTS)
    explain(net, INPUTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph0", "graph1"]
    names = sorted(path.name for path in (tmp_path / "graph0").iterdir())
    assert [name for name in names if name[0].isdigit()] == [
        "00 before.txt",
        "01 after normalize.txt",
        "02 after propagate.txt",
        "03 after channels.txt",
        "04 after fuse compute.txt",
        "05 after fuse per token.txt",
        "06 after fuse post-ops.txt",
        "07 after fuse output types.txt",
        "08 after finish.txt",
        "09 after images.txt",
        "10 after generate.txt",
    ]
    assert "onednn.qconv_pointwise.default" in (tmp_path / "graph0" / "06 after fuse post-ops.txt").read_text()
    assert "onednn" not in (tmp_path / "graph0" / "02 after propagate.txt").read_text()
    assert "2 × convolution" in (tmp_path / "graph0" / "passes.txt").read_text()
    assert "rule 'addition': " in (tmp_path / "graph0" / "why.txt").read_text()
    assert Report.from_json((tmp_path / "graph0" / "report.json").read_text()).fused


def halve(node: torch.fx.Node, found: float) -> None:
    source: Any = node.args[0]
    integers, scale, *others = source.args
    with node.graph.inserting_before(node):
        new = node.graph.call_function(source.target, (integers, scale * found, *others))
    new.meta.update(source.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def find_halved(node: torch.fx.Node) -> Any:
    source: Any = node.args[0]
    return (
        node.args[1]
        if source.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default
        else No("no dequantize")
    )


def test_a_registered_pass_is_applied_reported_and_taken_out_again() -> None:
    inputs = (torch.randn(4, 32),)
    q = qdq_graph(One(lambda layer, x: layer(quantize_dequantize(x) * 0.5), QLinear(32, 48)), inputs)
    rule = Rule("halve", (torch.ops.aten.mul.Tensor,), find_halved, halve)
    assert explain(q, inputs).missed
    remove = register_pass("propagate", rule)
    try:
        with pytest.raises(ValueError, match="already has a rule named 'halve'"):
            register_pass("propagate", rule)
        compiled = testing.assert_close_to_reference(q, inputs, options={"strict": True, "kernels": "onednn"})
        assert testing.int8_calls(compiled.code) == {"qlinear": 1}
        counts = [(count.stage, count.matches) for count in compiled.report.passes if count.rule == "halve"]
        assert counts == [("propagate", 1)]
    finally:
        remove()
    assert explain(q, inputs).missed


def test_a_find_that_says_nothing_is_an_error() -> None:
    inputs = (torch.randn(4, 32),)
    q = qdq_graph(One(lambda layer, x: layer(quantize_dequantize(x) * 0.5), QLinear(32, 48)), inputs)
    remove = register_pass("propagate", Rule("mute", (torch.ops.aten.mul.Tensor,), lambda node: None, halve))
    try:
        with pytest.raises(Exception, match=r"find of rule 'mute' gave None for mul.*: expected its findings, or No"):
            explain(q, inputs)
    finally:
        remove()


def test_no_pass_in_a_stage_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="'fuse: post-ops'"):
        register_pass("fusion", Rule("x", (), find_halved, halve))


def test_attention_that_is_not_quantized_is_float_by_design_and_its_arithmetic_counts() -> None:
    inputs = (torch.randn(1, 2, 64, 16),)
    q = qdq_graph(
        One(lambda layer, x: layer(quantize_dequantize(F.scaled_dot_product_attention(x, x, x))), QLinear(16, 32)),
        inputs,
    )
    report = explain(q, inputs)
    assert len(report.fused) == 1
    assert {miss.reason for miss in report.kept_float} == {Reason.NOT_QUANTIZED}
    assert sum(miss.macs or 0 for miss in report.kept_float) == 2 * 2 * 64 * 64 * 16
