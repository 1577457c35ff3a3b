"""Drift: the layer that was made bad on purpose comes out first, and excluding it gives what is promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cli, testing
from inductor_x86q.accuracy.drift import WORTH, Drift
from inductor_x86q.errors import CompileError
from inductor_x86q.report import Report


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3)
        self.fc = nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


def outliers() -> nn.Module:
    """`second` reads one value that is 200 times the others: their 7 or 8 bits are spent on it."""
    torch.manual_seed(1)
    net = Net().eval()
    with torch.no_grad():
        net.first.weight[0] *= 400
        net.second.weight[:, 0] *= 1e-3
    return net


INPUTS = (torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(2)),)


@pytest.fixture(scope="module")
def bad() -> tuple[nn.Module, torch.fx.GraphModule, Drift]:
    net = outliers()
    quantized = inductor_x86q.quantize(net, INPUTS, calibration=[INPUTS])
    drift = inductor_x86q.explain(quantized, INPUTS, drift=net).drift
    assert drift is not None
    return net, quantized, drift


def test_the_bad_layer_comes_first(bad: tuple[nn.Module, torch.fx.GraphModule, Drift]) -> None:
    _, _, drift = bad
    assert drift.layers[0].layer == "second" and drift.layers[0].share > 0.5
    assert [x.layer for x in drift.layers[1:]] in (["first", "fc"], ["fc", "first"])
    assert sum(x.share for x in drift.layers) == pytest.approx(1)
    ratios = [x.alone for x in drift.layers]
    assert None not in ratios and ratios == sorted(ratios)


def test_the_output_is_what_the_models_say(bad: tuple[nn.Module, torch.fx.GraphModule, Drift]) -> None:
    net, quantized, drift = bad
    with torch.no_grad():
        expected = testing.snr(quantized(*INPUTS), net(*INPUTS))
    assert drift.output == pytest.approx(expected, abs=0.1)


def test_excluding_gives_what_is_promised(bad: tuple[nn.Module, torch.fx.GraphModule, Drift]) -> None:
    net, _, drift = bad
    assert drift.exclude == ("second",) and drift.output is not None and drift.excluded is not None
    assert drift.excluded > drift.output + WORTH
    better = inductor_x86q.quantize(net, INPUTS, calibration=[INPUTS], exclude=drift.exclude)
    with torch.no_grad():
        assert testing.snr(better(*INPUTS), net(*INPUTS)) == pytest.approx(drift.excluded, abs=3)
    assert "exclude=['second'] pays" in str(drift)


def test_without_the_float_model_it_says_what_is_missing(bad: tuple[nn.Module, torch.fx.GraphModule, Drift]) -> None:
    _net, quantized, with_weights = bad
    report = inductor_x86q.explain(quantized, INPUTS, drift=True)
    assert report.drift is not None and report.drift.layers[0].layer == "second" and not report.drift.weights
    assert "rounding of weights costs is not in it" in str(report) and with_weights.weights
    again = Report.from_json(report.to_json())
    assert again == report
    assert inductor_x86q.explain(quantized, INPUTS).drift is None


def test_a_coarse_weight_shows_against_the_float_model_only() -> None:
    """One weight 1000 times as large as the others of its channel: these are rounded away."""
    torch.manual_seed(1)
    net = Net().eval()
    with torch.no_grad():
        net.second.weight[:, 0, 0, 0] *= 1000
        net.first.weight[0] = 0  # the large ones read zeros
        net.norm.bias[0] = net.first.bias[0] = 0
    quantized = inductor_x86q.quantize(net, INPUTS, calibration=[INPUTS])
    found = {drift: inductor_x86q.explain(quantized, INPUTS, drift=drift).drift for drift in (True, net)}
    alone = {drift: {x.layer: x.alone for x in found[drift].layers}["second"] for drift in found}  # type: ignore[union-attr]
    assert found[net].layers[0].layer == "second" and alone[net] < alone[True] - 20  # type: ignore[union-attr, operator]


def test_a_graph_that_was_saved_is_measured_too(
    bad: tuple[nn.Module, torch.fx.GraphModule, Drift], tmp_path: Path
) -> None:
    net, quantized, drift = bad
    torch.export.save(torch.export.export(quantized, INPUTS), tmp_path / "saved.pt2")
    loaded = torch.export.load(tmp_path / "saved.pt2").module()
    found = inductor_x86q.explain(loaded, INPUTS, drift=net).drift
    assert found is not None and [x.layer for x in found.layers] == [x.layer for x in drift.layers]
    assert found.output == pytest.approx(drift.output)


def test_a_name_with_underscores() -> None:
    """Two stand for a dot where tensors lie side by side."""
    net = nn.Sequential()
    net.add_module("a__b", nn.Conv2d(3, 8, 3))
    quantized = inductor_x86q.quantize(net.eval(), INPUTS, calibration=[INPUTS])
    found = inductor_x86q.explain(quantized, INPUTS, drift=net).drift
    assert found is not None and [x.layer for x in found.layers] == ["a__b"]


def test_another_float_model(bad: tuple[nn.Module, torch.fx.GraphModule, Drift]) -> None:
    _, quantized, _ = bad
    other = nn.Sequential(nn.Conv2d(3, 16, 3)).eval()
    with pytest.raises(CompileError, match=r"the float model has no weight 'first\.weight'"):
        inductor_x86q.explain(quantized, INPUTS, drift=other)
    with pytest.raises(CompileError, match="expected True or the float model"):
        inductor_x86q.explain(quantized, INPUTS, drift="second")  # type: ignore[arg-type]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).read_text().replace('"""Drift', '"""A copy', 1)
    (tmp_path / "drifting_net.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "drifting_net:outliers", "--input", "4x3x10x10", "--drift"]) == cli.DONE
    out = capsys.readouterr().out
    table = out[out.index("drift from float32") :].splitlines()
    assert table[3].startswith("second") and "rounding of weights" not in out
