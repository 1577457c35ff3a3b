"""What all commands share: exit codes, errors in a line, progress, and files to write."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from inductor_x86q import progress

DONE, FAILED, UNUSABLE = 0, 1, 2
EXITS = "exit codes: 0 done, 1 something was missed under --strict or a budget, 2 the model or its inputs cannot be used as given"


class Unusable(Exception):
    """What was given on the command line cannot be used; the message says why."""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Says on a terminal what takes its time, and how long; turns the package's own errors into Unusable."""
    from inductor_x86q.errors import of_ours

    try:
        with progress.task(what):
            yield
    except Exception as error:
        if cause := of_ours(error):
            raise Unusable(str(cause)) from error
        raise


def write(path: Path, content: str) -> None:
    if path == Path("-"):
        sys.stdout.write(content)
        return
    save(path, lambda: path.write_text(content, encoding="utf-8"))


def save(path: Path, make: Callable[[], object]) -> None:
    """Says what was written, or that it cannot be."""
    try:
        make()
    except OSError as error:
        raise Unusable(f"cannot write {path}: {error.strerror or first_line(error)}") from error
    except ValueError as error:  # a format that is not known
        raise Unusable(f"cannot write {path}: {first_line(error)}") from error
    print(f"wrote {path}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
