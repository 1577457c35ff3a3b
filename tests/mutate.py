"""Breaks the files that shape numbers, one place at a time, and counts how many of the breakages some test notices.

`python -m tests.mutate --seed 1 --count 40` draws places from the syntax trees of all these files and changes each in a copy
of the package. Of the tests that run the place, as `tests.covering` saw them, the quickest come first, up to the first that
fails. What survives is listed: each is a test that is missing, or a place that does not matter, as a limit of what is fast.
Places that `tests.covering` saw no test run are named, and not counted: it may not have been given their tests.
`--write` puts all into RESULTS, where each survivor gets an answer.
"""

from __future__ import annotations

import argparse
import ast
import copy
import ctypes
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import covering

ROOT = covering.ROOT
PACKAGE = "inductor_x86q"
RESULTS = ROOT / "tests" / "mutation_results.json"

# Files below PACKAGE. Not kernels/cost.py: which kernel is taken changes no number.
FILES = (
    "graph/*.py", "passes/*.py", "passes/*/*.py", "quantization/*.py", "quantization/corrections/*.py",
    "inductor/decompositions.py", "inductor/lowering/*.py",
    *(f"kernels/{name}.py" for name in ("arguments", "attention", "convolution", "epilogue", "family", "isa", "recurrence", "specification")),
)  # fmt: skip

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A place in a file of the package, the lines of its statement, and what the whole file is with it changed."""

    file: str
    line: int
    before: str
    after: str
    statement: tuple[int, int]
    source: str = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def changed(node: ast.AST) -> ast.AST | None:
    """The node with its meaning changed in one way; None where no operator applies to it."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in _COMPARISONS:
        new.ops[0] = _COMPARISONS[type(new.ops[0])]()
    elif isinstance(new, ast.BinOp) and type(new.op) in _ARITHMETIC:
        new.op = _ARITHMETIC[type(new.op)]()
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.Not, ast.USub)):
        return new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        new.value = not new.value
    elif isinstance(new, ast.Constant) and isinstance(new.value, (int, float)):
        new.value += 1
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Name) and new.func.id in _NAMES:
        new.func.id = _NAMES[new.func.id]
    elif isinstance(new, ast.Subscript) and isinstance(new.slice, ast.Slice) and new.slice.lower:
        new.slice.lower = None
    else:
        return None
    return new


def mutations(file: str, source: str) -> Iterator[Mutation]:
    """All mutations of a file, inside of functions only: tables of names are for the tests of those."""
    text = source.encode()
    lines = text.splitlines(keepends=True)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    seen = set()
    for statement in (statement for function in functions for statement in function.body):
        for node, lines_of_it in _parts(statement, (0, 0)):
            new = changed(node)
            if new is None or (place := (node.lineno, node.col_offset, type(node))) in seen:  # type: ignore[attr-defined]
                continue
            seen.add(place)
            first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
            last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            code = ast.unparse(new)
            broken = (text[:first] + f"({code})".encode() + text[last:]).decode()
            yield Mutation(file, node.lineno, ast.unparse(node), code, lines_of_it, broken)  # type: ignore[attr-defined]


def _parts(node: ast.AST, statement: tuple[int, int]) -> Iterator[tuple[ast.AST, tuple[int, int]]]:
    """All nodes in it, except for strings put together (where nodes do not know their places) and patterns.

    With the first and last line of the statement that each is in; of those that hold others, only of what heads them.
    """
    if isinstance(node, (ast.JoinedStr, ast.pattern)):
        return
    if isinstance(node, ast.stmt):
        inner = getattr(node, "body", None)
        statement = (node.lineno, max(node.lineno, inner[0].lineno - 1) if inner else node.end_lineno or node.lineno)
    yield node, statement
    for child in ast.iter_child_nodes(node):
        yield from _parts(child, statement)


def drawn(seed: int, count: int, skip: int = 0) -> list[Mutation]:
    """`count` of all mutations, the same for the same seed and sources; each file as likely as it is long."""
    package = ROOT / PACKAGE
    files = sorted({file for pattern in FILES for file in package.glob(pattern)})
    found = [m for file in files for m in mutations(str(file.relative_to(package)), file.read_text())]
    random.Random(seed).shuffle(found)
    return found[skip : skip + count]


def shown_to(mutation: Mutation, seconds: float) -> list[str]:
    """The quickest tests that run it, as many as take `seconds` together."""
    tests: list[str] = []
    for taken, test in covering.tests_of(mutation.file, *mutation.statement):
        if (seconds := seconds - taken) < 0 and tests:
            break
        tests.append(test)
    return tests


def failing(tests: list[str], minutes: float, mutation: Mutation | None = None) -> str | None:
    """The first of these tests that fails in a copy of the package; None where all pass."""
    with tempfile.TemporaryDirectory() as directory:
        for folder in (PACKAGE, "tests", "examples"):
            shutil.copytree(ROOT / folder, Path(directory) / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", directory)
        if mutation:
            (Path(directory) / PACKAGE / mutation.file).write_text(mutation.source)
        status = _tested(directory, tests, 60 * minutes)
        failed = Path(directory) / FAILED
        if status is None:
            return f"not done after {minutes:g} minutes"
        if status == 0:
            return None
        if status < 0:
            return f"signal {-status}"
        if failed.exists():
            return failed.read_text()
        if status in (2, 4):  # a test file cannot even be imported, and so its tests are not found
            return "the import of the tests"
        raise RuntimeError(f"pytest itself failed ({status}) on {mutation}")


FAILED = "failed"  # a file that names the test


class _Failed:
    """A plugin of pytest that leaves the name of a test that fails."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.file.write_text(report.nodeid)


def _tested(directory: str, tests: list[str], seconds: float) -> int | None:
    """pytest's exit status in a copy of the package, up to the first failure; None where it does not end in time.

    A process that has imported torch is copied, since that import takes longer than many a test.
    """
    child = os.fork()
    if not child:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this process, however that ends
        os._exit(_run_pytest(directory, tests))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_pytest(directory: str, tests: list[str]) -> int:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(directory)
    os.environ["PYTHONPATH"] = directory  # for processes that tests start
    sys.path[:] = [directory, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", PACKAGE)]:
        del sys.modules[name]
    plugins = [_Failed(Path(directory) / FAILED)]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests], plugins=plugins))


def write(seed: int, mutation: Mutation, noticed: str | None) -> None:
    """Into RESULTS, where a survivor keeps the answer that it was given."""
    rows = results()
    row: dict[str, Any] = {"seed": seed, "mutation": str(mutation), "noticed by": noticed}
    known = next((old for old in rows if old["mutation"] == row["mutation"]), None)
    if known is not None and noticed and not known["noticed by"]:
        known["answer"] = noticed  # a test that was missing
    elif known is None:
        rows.append(row if noticed else row | {"answer": ""})
    RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def results() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many before those, as of an earlier run")
    parser.add_argument("--seconds", type=float, default=60, help="of tests, as they took unbroken, for each breakage")
    parser.add_argument("--minutes", type=float, default=10, help="after so many a breakage counts as noticed")
    parser.add_argument(
        "--list", action="store_true", help="only list what would be broken, and by how many tests it is run"
    )
    parser.add_argument(
        "--write", action="store_true", help=f"go on with {RESULTS.relative_to(ROOT)}, and write into it"
    )
    arguments = parser.parse_args()
    import torch._inductor.compile_fx  # noqa: F401 - before the process is copied
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401

    done = [row["mutation"] for row in results() if row["noticed by"]] if arguments.write else []
    chosen, found = drawn(arguments.seed, arguments.count, arguments.skip), {}
    for number, mutation in enumerate(chosen, arguments.skip + 1):
        tests = shown_to(mutation, arguments.seconds)
        if arguments.list or not tests:
            print(f"{number:4} {f'{len(tests):4} tests' if tests else 'not run'} {mutation}", flush=True)
            continue
        if str(mutation) in done:
            continue
        found[mutation] = failing(tests, arguments.minutes, mutation)
        print(f"{number:4} {'noticed ' if found[mutation] else 'SURVIVES'} {mutation}  [{found[mutation]}]", flush=True)
        if arguments.write:
            write(arguments.seed, mutation, found[mutation])
    if not found:
        return
    noticed = [test for test in found.values() if test]
    print(f"{len(noticed)} of {len(found)} noticed ({len(noticed) / len(found):.0%}), seed {arguments.seed}")
    if failed := failing(sorted({test for test in noticed if "::" in test}), arguments.minutes):
        raise SystemExit(f"fails without any of them: {failed}")


if __name__ == "__main__":
    main()
