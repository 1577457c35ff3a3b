"""Files of others on the command line: what could run their code is refused until it is trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_x86q import aot, cli, testing
from inductor_x86q.inductor import saved_programs

WEIGHTS, GRAPH, INPUTS = "model_weights_config.json", "models/model.json", "sample_inputs/model.pt"


class Payload:
    """Pickled, it leaves a trace where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = testing.QLinear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(testing.quantize_dequantize(x))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 32),), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def apply(contents: bytes) -> bytes:
        value = json.loads(contents)
        change(value)
        return json.dumps(value).encode()

    return apply


def everywhere(key: str, new: object) -> Callable[[bytes], bytes]:
    """Another value for each field of this name."""

    def change(value: Any) -> None:
        for name, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
            if name == key:
                value[name] = new
            elif isinstance(item, (dict, list)):
                change(item)

    return in_json(change)


def test_a_program_of_tensors_needs_no_trust(program: Path) -> None:
    assert saved_programs.obstacle(str(program)) == ""


def test_what_would_be_unpickled_is_refused_and_runs_when_trusted(
    program: Path, directory: Path, rewritten: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(program, directory / "evil.pt2", {INPUTS: lambda _: saved((Payload(),))})
    for command in (["explain"], ["code"], ["why", "--node", "fc"]):
        assert cli.main([command[0], path, *command[1:]]) == cli.UNUSABLE
        assert "could run code when it is loaded: its example inputs have to be unpickled" in capsys.readouterr().err
        assert not Path("it-ran").exists()
    cli.main(["explain", path, "--trust"])
    assert Path("it-ran").exists()


TARGETS = ("torch.ops.load_library", "torch.hub.load", "torch.ops.aten.from_file.default", "_operator.methodcaller",
           "torch.ops.aten.__class__.default", "#extension")  # fmt: skip
EDITS = {
    "a weight": ({WEIGHTS: everywhere("use_pickle", True)}, "'fc.* has to be unpickled"),
    "a weight's file": ({WEIGHTS: everywhere("path_name", "opaque_obj_0")}, "'fc.* has to be unpickled"),
    "a formula": ({GRAPH: everywhere("expr_str", "__import__('os').mkdir('it-ran')")}, "which would be evaluated"),
    "a guard": ({GRAPH: everywhere("guards_code", ["__import__('os')"])}, "conditions on its inputs"),
    "a range": ({GRAPH: everywhere("range_constraints", {"__import__('os')": {}})}, "ranges of more than sizes"),
    "a container": (
        {GRAPH: everywhere("in_spec", '[1, {"type": "collections.defaultdict", "context": "", "children_spec": []}]')},
        "containers other than tuple",
    ),
    **{target: ({GRAPH: everywhere("target", target)}, f"calls '{target}'") for target in TARGETS},
}


@pytest.mark.parametrize("edit", EDITS)
def test_whatever_else_would_run_is_refused(
    edit: str, program: Path, directory: Path, rewritten: Callable[..., str]
) -> None:
    changes, message = EDITS[edit]
    found = saved_programs.obstacle(rewritten(program, directory / "evil.pt2", changes))
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "name", ["data/aotinductor/model/x.so", "data/constants/opaque_obj_0", "data/weights/model.pt", "serialized.json"]
)
def test_other_files_are_refused(name: str, program: Path, directory: Path, rewritten: Callable[..., str]) -> None:
    path = rewritten(program, directory / "evil.pt2", {}, more={name: pickle.dumps(Payload())})
    assert "which is no part of a program of tensors" in saved_programs.obstacle(path)


def test_a_package_is_read_and_never_loaded(
    program: Path,
    directory: Path,
    rewritten: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A report among files that are no package at all: nothing else is looked at."""
    from inductor_x86q.aot import stored
    from inductor_x86q.report import Report

    report = {f"extra/{aot.REPORT_FILE}": stored.to_json(Report([], [], [])).encode()}
    path = rewritten(program, directory / "m.pt2", {INPUTS: lambda _: saved((Payload(),))}, more=report)
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("it was loaded"))
    assert cli.main(["explain", path]) == cli.DONE
    assert "0 of 0 layers" in capsys.readouterr().out
    for command in (["code", path], ["why", path, "--node", "fc"]):
        assert cli.main([*command, "--trust"]) == cli.UNUSABLE
        assert "is a package, compiled already" in capsys.readouterr().err
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("command", ["explain", "code", "why"])
def test_the_help_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert "A file can run code of whoever made it" in out and "--trust" in out
