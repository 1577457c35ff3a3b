"""x86q tune: what it prints and writes, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from inductor_x86q import cli
from inductor_x86q.accuracy import costs
from inductor_x86q.report import Report

MODELS = """
import torch
from tests.test_budget import DATA, Hard, closeness

def hard():
    return Hard()

def batches():
    return DATA

metric = closeness(Hard().eval())

def never(module):
    return float(isinstance(module, Hard))

def broken(module):
    raise KeyError("labels")
"""
TUNE = ["tune", "tune_models:hard", "--input", "8x3x12x12", "--data", "tune_models:batches"]
BUDGET = ["--validate", "tune_models:metric", "--max-drop", "0.32"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tune_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "microseconds", lambda *arguments: ({}, 0.0))
    return tmp_path


def test_a_model_within_a_budget(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", "r.json", "--html", "r.html", "--output", "q.pt2"]
    assert cli.main([*TUNE, *BUDGET, *files]) == cli.DONE
    out, err = capsys.readouterr()
    assert "the same without a search: quantize(..., accuracy=['" in out
    assert "random" not in err and "wrote q.pt2" in err
    tuning = Report.from_json((models / "r.json").read_text()).tuning
    assert tuning is not None and tuning.moved and tuning.metric >= 0.68
    page = (models / "r.html").read_text()
    assert all(moved.layer in out and f"<td>{moved.layer}</td>" in page for moved in tuning.moved)
    assert cli.main(["explain", "q.pt2", "--strict"]) == cli.DONE


def test_the_picture(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(costs, "microseconds", lambda *arguments: ({"depthwise": 10.0}, 50.0))
    assert cli.main([*TUNE, *BUDGET, "--plot", "ladder.svg"]) == cli.DONE
    picture = (models / "ladder.svg").read_text()
    assert picture.startswith("<?xml") and "int8, corrected" in picture  # matplotlib leaves texts as comments
    assert cli.main([*TUNE, "--max-drop", "1", "--plot", "ladder.xyz"]) == cli.UNUSABLE
    assert "cannot write ladder.xyz" in capsys.readouterr().err


def test_without_matplotlib_it_says_so_at_once(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert cli.main([*TUNE, *BUDGET, "--plot", "ladder.svg"]) == cli.UNUSABLE
    assert "--plot: matplotlib is not installed" in capsys.readouterr().err


def test_a_budget_out_of_reach(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TUNE, "--validate", "tune_models:never", "--max-drop", "0.1"]) == cli.FAILED
    assert "no choice of layers is within max_drop=0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-drop", "-1"], "expected a number, at least 0"),
        (["--max-drop", "1", "--validate", "tune_models:broken"], "validate failed for the float model: KeyError"),
        (["--max-drop", "1", "--validate", "tune_models"], "--validate is 'tune_models': expected package.module:name"),
        (["--max-drop", "1", "--validate", "tune_models:gone"], "module 'tune_models' has no 'gone'"),
    ],
)
def test_what_cannot_be_used(
    arguments: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TUNE, *arguments]) == cli.UNUSABLE
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_random_data_is_said(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TUNE[:4], "--max-drop", "1"]) == cli.DONE
    out, err = capsys.readouterr()
    assert "no --data: calibrated with random data" in err and "every layer is in int8" in out
