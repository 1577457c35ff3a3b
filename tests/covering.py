"""Which tests run which lines of the package, and how long each takes: a broken line need only be shown to those.

`python -m tests.covering tests/test_dynamic.py ...` runs these files and stores what it saw beside what is known of others.
A file of the package that changed since is of no use to look lines up in, so that these have to be run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "inductor_x86q"
STORED = ROOT / "build" / "covering.json"
# Breaks lines itself, and fails where one that it knows reads otherwise: it would notice any text.
LEFT_OUT = "tests/test_mutations.py::test_broken"


class Lines:
    """A plugin of pytest that notes, for each test that passes, the lines of the package that it runs."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self._seen: set[tuple[CodeType, int]] = set()
        self._failed: set[str] = set()
        self._package = str(PACKAGE)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._seen, began = set(), time.monotonic()
        threading.settrace(self._called)
        sys.settrace(self._called)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            if self._seen and item.nodeid not in self._failed:
                self.tests[item.nodeid] = {"seconds": round(time.monotonic() - began, 2), "lines": self._by_file()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self._failed.add(report.nodeid)

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self._package) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        self._seen.add((frame.f_code, frame.f_lineno))
        return self._line

    def _by_file(self) -> dict[str, list[int]]:
        found: dict[str, set[int]] = {}
        for code, line in list(self._seen):
            found.setdefault(str(Path(code.co_filename).relative_to(PACKAGE)), set()).add(line)
        return {file: sorted(lines) for file, lines in sorted(found.items())}


def digest(file: str) -> str:
    return hashlib.sha256((PACKAGE / file).read_bytes()).hexdigest()


@contextlib.contextmanager
def stored() -> Iterator[dict[str, Any]]:
    """What is known, to be changed by one process at a time."""
    STORED.parent.mkdir(exist_ok=True)
    with STORED.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(STORED.read_text()) if STORED.exists() else {"files": {}, "tests": {}}
        yield known
        STORED.write_text(json.dumps(known))


def tests_of(file: str, first: int, last: int) -> list[tuple[float, str]]:
    """Seconds and names of the tests that run some line from `first` to `last`, the quickest first."""
    with stored() as known:
        pass
    if known["files"].get(file) != digest(file):
        raise SystemExit(f"{file} is not as the tests last ran it: python -m tests.covering, then again")
    wanted = range(first, last + 1)
    found = [
        (test["seconds"], name)
        for name, test in known["tests"].items()
        if any(line in wanted for line in test["lines"].get(file, ()))
    ]
    return sorted(found)


def main() -> int:
    lines, files = Lines(), sys.argv[1:]
    digests = {str(path.relative_to(PACKAGE)): digest(str(path.relative_to(PACKAGE))) for path in PACKAGE.rglob("*.py")}
    status = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-m", "not slow and not torchvision", "--deselect", LEFT_OUT, *files],
        plugins=[lines],
    )
    with stored() as known:
        for file in {file for file, found in digests.items() if known["files"].get(file) != found}:
            for test in known["tests"].values():
                test["lines"].pop(file, None)  # other lines than now
        known["files"] = digests
        known["tests"].update(lines.tests)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
