"""Progress: on a terminal alone, tasks within tasks, from more than one thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from inductor_x86q import progress


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "is_visible", lambda: True)


def test_nothing_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("counting", total=2) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_a_task_within_a_task(visible: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("outer"):
        with progress.task("inner [red]", total=3) as advance:
            for _ in range(3):
                advance()
        assert progress._shown is not None
    assert progress._shown is None
    out, err = capsys.readouterr()
    assert out == "" and "outer" in err and "inner [red]" in err and "3/3" in err


def test_an_error_ends_it(visible: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress.task("failing"):
        raise KeyError
    assert progress._shown is None and "failing" in capsys.readouterr().err


def test_threads_share_the_display(visible: None, capsys: pytest.CaptureFixture[str]) -> None:
    together = threading.Barrier(4)

    def work(number: int) -> None:
        for _ in range(5):
            with progress.task(f"thread {number}", total=1) as advance:
                together.wait()
                advance()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress._shown is None and progress._tasks == 0
    err = capsys.readouterr().err
    assert all(f"thread {number}" in err for number in range(4))


def test_a_notebook_gets_one_output_that_is_written_anew(
    visible: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ipywidgets, which rich's own display needs."""
    outputs: list[dict[str, str]] = []

    def update(contents: dict[str, str], raw: bool) -> None:
        outputs[-1] = contents

    def display(contents: dict[str, str], raw: bool, display_id: bool) -> Any:
        outputs.append(contents)
        return SimpleNamespace(update=update)

    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    with progress.task("counting <b>", total=2) as advance:
        advance()
        advance()
    (last,) = outputs
    assert "counting <b>" in last["text/plain"] and "2/2" in last["text/plain"]
    assert last["text/html"].startswith("<pre") and "counting &lt;b&gt;" in last["text/html"]
    assert capsys.readouterr() == ("", "")


def test_the_library_is_imported_when_something_is_shown() -> None:
    """Whoever compiles and prints nothing pays nothing for it."""
    program = "import sys, inductor_x86q.backend, inductor_x86q.aot; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
