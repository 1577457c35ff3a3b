"""What is released: wheel and source distribution hold all files, and the wheel works where the repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import inductor_x86q

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")

PROGRAM = """
import sys, torch, inductor_x86q
from inductor_x86q import testing
from inductor_x86q.tools import results

assert inductor_x86q.__file__.startswith(sys.argv[1]), inductor_x86q.__file__
inputs = (torch.randn(16, 64),)

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = testing.QLinear(64, 32)

    def forward(self, x):
        return self.linear(testing.quantize_dequantize(x))

report = inductor_x86q.explain(testing.qdq_graph(Layer(), inputs), inputs)
assert len(report.fused) == 1 and "<html" in report.to_html()
assert results.latency(results.load("zen4-batch-1"))
"""


def _build(source: Path, target: Path, what: str) -> Path:
    """A wheel or an sdist of the project in `source`, made with the setuptools that is installed."""
    target.mkdir(exist_ok=True)
    program = f"import sys, setuptools.build_meta as b; b.build_{what}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, target], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of the source distribution, which is built of a copy without what earlier builds left."""
    directory = tmp_path_factory.mktemp("release")
    copy = directory / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "inductor_x86q", copy / "inductor_x86q", ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    with tarfile.open(_build(copy, directory / "sdist", "sdist")) as archive:
        archive.extractall(directory / "unpacked", filter="data")
    (source,) = (directory / "unpacked").iterdir()
    return _build(source, directory / "wheel", "wheel")


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    pages = {".md", ".svg"}  # read beside the code, as is what the cost model was fitted to
    files = [path for path in (ROOT / "inductor_x86q").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.suffix not in pages and path.name != "measurements.json"
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {
        "inductor_x86q/py.typed",
        "inductor_x86q/kernels/weights.json",
        "inductor_x86q/report/page/style.css",
    } <= found


def test_the_version_is_said_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == inductor_x86q.__version__
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]
    assert f"## {inductor_x86q.__version__}" in (ROOT / "inductor_x86q" / "CHANGELOG.md").read_text()


def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
