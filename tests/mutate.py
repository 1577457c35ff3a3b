"""Breaks the files that shape numbers, one place at a time, and counts how many of the breakages some test notices.

`python -m tests.mutate --seed 1 --count 40` draws places from the syntax trees of all these files, runs the tests that are
for the file with each place changed in a copy of the package, and lists what survived: each is a test that is missing, or
a place that does not matter, as a limit of what is fast.
"""

from __future__ import annotations

import argparse
import ast
import copy
import ctypes
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "inductor_x86q"

# Files below PACKAGE, and the tests that are to notice, quickest first.
_QUANTIZATION = ("test_quantize.py", "test_config.py", "test_dynamic.py")
_PASSES = ("test_mutations.py", "test_fusions.py", "test_random_graphs.py")
KILLERS: dict[str, tuple[str, ...]] = {
    "graph/qdq.py": _PASSES,
    "graph/weights.py": _PASSES,
    "graph/aliasing.py": _PASSES,
    "passes/channels.py": ("test_channels.py", *_PASSES),
    "passes/finish.py": ("test_dynamic.py", *_PASSES),
    "passes/propagate.py": _PASSES,
    "passes/generate.py": ("test_templates.py", "test_kernel_choice.py"),
    "passes/transposed_convolution.py": ("test_transposed_convolutions.py", *_PASSES),
    "passes/fuse/*.py": ("test_bf16.py", *_PASSES),
    "passes/images/*.py": ("test_images.py", *_PASSES),
    "passes/normalize/*.py": ("test_dynamic.py", *_PASSES),
    "inductor/decompositions.py": ("test_dynamic.py", "test_bf16.py"),
    "inductor/lowering/cat.py": ("test_images.py",),
    "inductor/lowering/pool.py": ("test_images.py",),
    "inductor/lowering/rows.py": ("test_dynamic.py", "test_templates.py"),
    # Not kernels/cost.py: which kernel is taken changes no number.
    **dict.fromkeys(
        (f"kernels/{name}.py" for name in ("arguments", "convolution", "epilogue", "family", "isa", "specification")),
        ("test_templates.py",),
    ),
    "quantization/calibration.py": _QUANTIZATION,
    "quantization/convert.py": _QUANTIZATION,
    "quantization/observers.py": _QUANTIZATION,
    "quantization/specs.py": _QUANTIZATION,
    "quantization/corrections/*.py": ("test_corrections.py", *_QUANTIZATION),
}

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A place in a file of the package, and what the whole file is with it changed."""

    file: str
    line: int
    before: str
    after: str
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
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    seen = set()
    for function in functions:
        for node in (part for statement in function.body for part in _parts(statement)):
            new = changed(node)
            if new is None or (place := (node.lineno, node.col_offset, type(node))) in seen:  # type: ignore[attr-defined]
                continue
            seen.add(place)
            first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
            last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            text, code = source.encode(), f"({ast.unparse(new)})"
            broken = (text[:first] + code.encode() + text[last:]).decode()
            yield Mutation(file, node.lineno, ast.unparse(node), code[1:-1], broken)  # type: ignore[attr-defined]


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes in it, except for strings put together (where nodes do not know their places) and patterns."""
    if not isinstance(node, (ast.JoinedStr, ast.pattern)):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _parts(child)


def drawn(seed: int, count: int) -> list[Mutation]:
    """`count` of all mutations, the same for the same seed and sources; each file as likely as it is long."""
    package = ROOT / PACKAGE
    files = sorted({file for pattern in KILLERS for file in package.glob(pattern)})
    found = [m for file in files for m in mutations(str(file.relative_to(package)), file.read_text())]
    return random.Random(seed).sample(found, min(count, len(found)))


def killers(file: str) -> tuple[str, ...]:
    return next(tests for pattern, tests in KILLERS.items() if Path(file).match(pattern))


def survives(mutation: Mutation, minutes: float) -> bool:
    """Whether no test fails with it; one that does not end fails."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(ROOT / PACKAGE, Path(directory) / PACKAGE)
        shutil.copytree(ROOT / "tests", Path(directory) / "tests")
        shutil.copy(ROOT / "pyproject.toml", directory)
        (Path(directory) / PACKAGE / mutation.file).write_text(mutation.source)
        status = _tested(directory, [f"tests/{name}" for name in killers(mutation.file)], 60 * minutes)
        if status is not None and status > 2:  # 2 is a file that cannot even be imported
            raise RuntimeError(f"pytest itself failed ({status}) on {mutation}")
        return status == 0


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
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1  # a crash is noticed
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
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not torchvision", *tests]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of those, as of an earlier run")
    parser.add_argument("--minutes", type=float, default=15, help="after so many a breakage counts as noticed")
    parser.add_argument("--list", action="store_true", help="only list what would be broken")
    arguments = parser.parse_args()
    import torch._dynamo  # noqa: F401 - before the process is copied

    chosen, survivors = drawn(arguments.seed, arguments.count)[arguments.skip :], []
    for number, mutation in enumerate(chosen, arguments.skip + 1):
        if arguments.list:
            print(mutation)
            continue
        alive = survives(mutation, arguments.minutes)
        survivors += [mutation] if alive else []
        print(f"{number:4} {'SURVIVES' if alive else 'noticed '} {mutation}", flush=True)
    if not arguments.list:
        noticed = len(chosen) - len(survivors)
        print(f"{noticed} of {len(chosen)} noticed ({noticed / max(len(chosen), 1):.0%}), seed {arguments.seed}")


if __name__ == "__main__":
    main()
