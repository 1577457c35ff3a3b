"""The cookbook: its scripts run, its pages' Python code does, and every page has a script; README's code too."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from inductor_x86q.passes import STAGES

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGES = sorted(EXAMPLES.glob("*.md"))
TASKS = [page.stem for page in PAGES if page.stem != "README"]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+://)([^)#]+)(?:#[^)]*)?\)")
WRITTEN = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "fuzz" / "README.md",
           EXAMPLES / "serving" / "README.md", *(ROOT / "inductor_x86q").rglob("*.md")]  # fmt: skip


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _slow(*names: str) -> list[Any]:
    return [pytest.param(task, marks=[pytest.mark.slow] if task in names else []) for task in TASKS]


@pytest.mark.parametrize("task", _slow("fast"))
def test_a_script_runs(task: str, tmp_path: Path) -> None:
    """Each asserts what it shows; under 80 lines."""
    script = EXAMPLES / f"{task}.py"
    assert len(script.read_text().splitlines()) < 80
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if task == "regression_test" else []
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command, script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "passed" in done.stdout or task != "regression_test"


def test_types_are_complete_for_users() -> None:
    """mypy's strict mode on the cookbook: what it calls of ours has types."""
    pytest.importorskip("mypy")
    scripts = [EXAMPLES / f"{task}.py" for task in (*TASKS, "shapes")]
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", *scripts]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "page", [page for page in (ROOT / "README.md", *PAGES) if _BLOCK.search(page.read_text())], ids=_name
)
def test_code_in_a_page_runs(page: Path, names: dict[str, Any]) -> None:
    training = page.stem == "qat"
    with contextlib.nullcontext() if training else torch.no_grad():
        for block in _BLOCK.finditer(text := page.read_text()):
            lines = "\n" * text[: block.start(1)].count("\n")  # so that an error names the page's line
            exec(compile(lines + block[1], str(page), "exec"), names)


def test_the_index_lists_every_page_and_script() -> None:
    index = (EXAMPLES / "README.md").read_text()
    assert TASKS
    for task in TASKS:
        assert f"({task}.md) | [{task}.py]({task}.py)" in index
    for script in EXAMPLES.glob("*.py"):
        assert f"({script.name})" in index or script.name == "shapes.py"


@pytest.mark.parametrize("page", WRITTEN, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not broken


def test_the_page_of_the_stages_has_them_all() -> None:
    page = (ROOT / "inductor_x86q" / "passes" / "README.md").read_text()
    table = page[page.index("| stage |") :].split("\n\n")[0].splitlines()[2:]
    assert table == [f"| {stage.name} | {stage.after} |" for stage in STAGES]
