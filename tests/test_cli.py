"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from inductor_x86q import cli, testing
from inductor_x86q.graph.reasons import Obstacle, Reason
from inductor_x86q.report import Miss, Report

FACTORY = """
import torch
from inductor_x86q import testing

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3)
        self.fc = torch.nn.Linear(16, 32)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

def net():
    return Net()

class HalfQuantized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(32, 48)

    def forward(self, x):
        return self.fc(testing.quantize_dequantize(x))

def half():
    return testing.qdq_graph(HalfQuantized(), (torch.randn(4, 32),))

number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cli_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return tmp_path


CALLS = ("--option", "kernels=onednn")
NET = ["cli_models:net", "--input", "2x3x16x16"]
HALF = ["cli_models:half", "--input", "4x32"]


def test_explain_writes_text_json_and_html(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *NET, "--strict", "--json", "r.json", "--html", "r.html"]) == cli.DONE
    out, err = capsys.readouterr()
    assert "2 of 2 layers in int8" in out
    assert "quantized here with random calibration data" in err
    assert [f.layer for f in Report.from_json((models / "r.json").read_text()).fused] == ["conv", "fc"]
    assert (models / "r.html").read_text().startswith("<!doctype html>")


def test_html_with_code_and_what_has_changed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *NET, "--json", "before.json", "--code", *CALLS]) == cli.DONE
    before = Report.from_json((models / "before.json").read_text())
    assert [call.name for call in before.code if call.nodes == (before.fused[0].node,)] == ["qconv"]
    before.missed = [Miss("conv", "conv", Obstacle(Reason.SATURATES), (2, 16), 100)]
    (models / "before.json").write_text(dataclasses.replace(before, fused=before.fused[1:]).to_json())
    assert cli.main(["explain", *NET, "--html", "r.html", "--compare", "before.json"]) == cli.DONE
    page = (models / "r.html").read_text()
    assert "was 1 / 2" in page
    assert "gained: conv in float" in page
    (models / "other.json").write_text("{}")
    for file, message in (("none.json", "cannot read none.json"), ("other.json", "other.json cannot be compared with")):
        capsys.readouterr()
        assert cli.main(["explain", *NET, "--html", "r.html", "--compare", file]) == cli.UNUSABLE
        assert message in capsys.readouterr().err


def test_json_on_standard_output_is_all_of_it(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *HALF, "--json", "-"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["totals"]["missed"] == 1


def test_strict_fails_on_a_miss(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *HALF]) == cli.DONE
    assert cli.main(["explain", *HALF, "--strict"]) == cli.FAILED
    out, err = capsys.readouterr()
    assert "quantize the weight to int8 per channel" in out
    assert "random calibration" not in err  # it was quantized already


def test_code_of_one_layer(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["code", *NET, "--layer", "fc", *CALLS]) == cli.DONE
    out = capsys.readouterr().out
    assert out.startswith("// layer: fc\n")
    assert "qlinear" in out
    assert "qconv" not in out
    assert cli.main(["code", *NET, "--layer", "nothing"]) == cli.UNUSABLE
    assert "no kernel call serves layer 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=str(cli.UNUSABLE)):
        cli.main(["code", *NET, "--layer", "fc", "--stable"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_stable_code(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["code", *NET, "--stable", "--option", "cpp.simdlen=256", *CALLS]) == cli.DONE
    out = capsys.readouterr().out
    assert "aoti_torch_cpu__qconv_pointwise_tensor(" in out
    assert "#include" not in out


def test_why(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["why", *HALF, "--node", "fc"]) == cli.DONE
    out = capsys.readouterr().out
    assert "rule 'matrix product': its second operand is not a dequantized constant" in out
    assert "no rule of this stage" not in out  # what no stage looks at is named once, at the end
    assert cli.main(["why", *HALF, "--node", "nowhere"]) == cli.UNUSABLE
    assert "no stage's graph has a node or layer named 'nowhere'" in capsys.readouterr().err


def test_saved_program_brings_its_inputs(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = (torch.randn(2, 32),)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = testing.QLinear(32, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(testing.quantize_dequantize(x))

    torch.export.save(torch.export.export(Net().eval(), inputs), "net.pt2")
    assert cli.main(["explain", "net.pt2", "--strict"]) == cli.DONE
    assert "1 of 1 layers in int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "expected torchvision:NAME, package.module:factory or a file"),
        (["missing.pt2"], "there is no file 'missing.pt2'"),
        (["cli_models.py.pt2"], "not a program saved by torch.export.save"),
        (["no_such_package:net"], "module 'no_such_package' cannot be imported"),
        (["cli_models:gone"], "module 'cli_models' has no 'gone'"),
        (["cli_models:number"], "gave a int: expected a torch.nn.Module"),
        (["cli_models:net", "--input", "2xx3"], "expected a shape as 1x3x224x224"),
        (["cli_models:net", "--input", "2x3:float99"], "with a type behind a colon"),
        (["cli_models:net", "--input", "2x5x16x16"], "cannot be quantized with inputs of shape (2, 5, 16, 16)"),
        ([*HALF, "--option", "cpp.simdlen"], "expected NAME=VALUE"),
        ([*HALF, "--option", "no_such=1"], "unknown option 'no_such'"),
        ([*HALF, "--mode", "fastest"], "fastest"),
        ([*HALF, "--html", "no/such/dir/r.html"], "cannot write no/such/dir/r.html"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(
    arguments: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "cli_models.py.pt2").write_text("not a program")
    assert cli.main(["explain", *arguments]) == cli.UNUSABLE
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from inductor_x86q import cpu
    from inductor_x86q.inductor import configuration

    monkeypatch.setattr(cpu, "has_vnni", lambda: False)
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    assert cli.main(["doctor"]) == cli.DONE
    out = capsys.readouterr().out
    assert "input or weight to 7 bits here" in out
    assert torch.__version__ in out

    def no_compiler() -> str:
        raise RuntimeError("no C++ compiler found (looked for g++)")

    monkeypatch.setattr(configuration, "cxx_compiler", no_compiler)
    monkeypatch.setattr(cpu, "has_vnni", lambda: True)
    assert cli.main(["doctor"]) == cli.FAILED
    out = capsys.readouterr().out
    assert "- no C++ compiler found" in out
    assert "full speed" in out


@pytest.mark.parametrize("command", ["doctor", "explain", "code", "why", "tune"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes: " in out
    assert command == "doctor" or "torchvision:resnet18" in out


def test_without_arguments_it_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.UNUSABLE
    out, err = capsys.readouterr()
    assert out == "" and "x86q explain torchvision:resnet18" in err


def test_the_report_is_in_colour_on_a_terminal_and_plain_in_a_pipe(models: Path) -> None:
    """One run in a terminal of its own, with progress on it; in a pipe neither colours nor progress."""
    command = [sys.executable, "-m", "inductor_x86q", "explain", *NET]
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "100"}
    piped = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert piped.returncode == 0 and "\x1b" not in piped.stdout + piped.stderr
    assert "quantizing" not in piped.stderr and "2 of 2 layers in int8" in piped.stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal ends with its process
            while chunk := os.read(ours, 65536):
                shown += chunk
    text = shown.decode()
    assert process.returncode == 0
    assert "\x1b[1m" in text and "2 of 2 layers in int8" in text
    assert "calibrating" in text and "quantizing" in text and "running the passes" in text


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "inductor_x86q", "explain", "nothing"], capture_output=True, text=True)
    assert done.returncode == cli.UNUSABLE
    assert done.stderr.strip().splitlines()[-1].startswith("x86q explain: MODEL is 'nothing'")
