"""What takes its time: shown on a terminal or in a notebook while it runs, nothing where output is read by a program."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

_PREFORMATTED = '<pre style="line-height: normal; font-family: monospace; margin: 0">{code}</pre>'

_lock = threading.Lock()
_shown: Progress | None = None  # one display for tasks within tasks, and for those of other threads
_tasks = 0


@contextlib.contextmanager
def task(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows `what`, and how long it takes, until the end of this context; with a bar where there is a total.

    Yields a function to call when one more of the total is done.
    """
    display = _start()
    if display is None:
        yield lambda: None
        return
    identifier = display.add_task(what, total=total, counted=total is not None)
    try:
        yield lambda: display.advance(identifier)
    finally:
        if total is None:
            display.update(identifier, total=next(task.completed for task in display.tasks if task.id == identifier))
        display.stop_task(identifier)
        _stop()


def is_visible() -> bool:
    return sys.stderr.isatty() or _in_notebook()


def _start() -> Progress | None:
    global _shown, _tasks
    if not is_visible():
        return None
    with _lock:
        if _shown is None:
            _shown = _display()
            _shown.start()
        _tasks += 1
        return _shown


def _stop() -> None:
    global _shown, _tasks
    with _lock:
        _tasks -= 1
        if not _tasks and _shown is not None:
            _shown.stop()
            _shown = None


def _display() -> Progress:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Bar(BarColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.fields["counted"] else Text()

    class Count(TextColumn):
        def render(self, task: Any) -> Any:
            total = f"/{int(task.total)}" if task.fields["counted"] else ""
            return Text(f"{int(task.completed)}{total}" if total or task.completed else "")

    class InNotebook(Live):
        """One output that is written anew. rich's own needs ipywidgets, and prints a warning each time without."""

        shown: Any = None

        def refresh(self) -> None:
            with self._lock:
                contents = _for_notebook(self.get_renderable())
                if self.shown is None:
                    self.shown = display(contents, raw=True, display_id=True)
                else:
                    self.shown.update(contents, raw=True)

    columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}", markup=False), Bar(), Count(""))
    if not _in_notebook():
        return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
    from IPython.display import display

    silent = Console(file=io.StringIO(), force_jupyter=False)
    found = Progress(*columns, TimeElapsedColumn(), console=silent)
    found.live = InNotebook(console=silent, get_renderable=found.get_renderable, refresh_per_second=2)
    return found


def _for_notebook(what: RenderableType) -> dict[str, str]:
    """By the types that a notebook shows; it takes the best that it can."""
    from rich.console import Console

    recorder = Console(
        file=io.StringIO(), record=True, width=100, force_terminal=True, force_jupyter=False, color_system="truecolor"
    )
    recorder.print(what)
    coloured = recorder.export_html(inline_styles=True, clear=False, code_format=_PREFORMATTED)
    return {"text/plain": recorder.export_text().rstrip(), "text/html": coloured}


@functools.cache
def _in_notebook() -> bool:
    from rich.console import Console

    return Console(stderr=True).is_jupyter
