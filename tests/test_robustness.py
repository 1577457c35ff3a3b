"""Broken caches, interruptions, threads, processes, memory: a clear error or the right numbers, and nothing is left behind."""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import codecache, cpp_builder
from torch._inductor.utils import clear_caches

from inductor_x86q import inspection, testing
from inductor_x86q.testing import QConv2d, QLinear
from inductor_x86q.testing import quantize_dequantize as QD
from tests.models import Made, X

# --- caches and interruption ------------------------------------------------------------------------------------------

COMPILED = """
import torch
from inductor_x86q import testing
from inductor_x86q.testing import QLinear
from inductor_x86q.testing import quantize_dequantize

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = QLinear(32, 48)

    def forward(self, x):
        return torch.relu(self.fc(quantize_dequantize(x)))

x = torch.randn(4, 32)
model = testing.qdq_graph(Model(), (x,))
with torch.no_grad():
    result = torch.compile(model, backend="inductor_x86q")(x)
    torch.testing.assert_close(result, model(x))
print("right")
"""


# A precompiled header takes ten seconds, and is no file of the cache directory.
FILES_OF_A_KILOBYTE = """
import resource
import torch._inductor.config
torch._inductor.config.cpp_cache_precompile_headers = False
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
"""


def test_cache_directory_cannot_be_made(run_python: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_python(COMPILED, check=False, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1 and "file/cache" in done.stderr and "NotADirectoryError" in done.stderr


def test_cache_directory_is_full(run_python: Callable[..., Any], tmp_path: Path) -> None:
    """No file may be longer than a kilobyte: an error of the operating system, no crash and no wrong answer."""
    done = run_python(FILES_OF_A_KILOBYTE + COMPILED, check=False, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1 and "right" not in done.stdout
    assert "File too large" in done.stderr or "file size limit" in done.stderr.lower()


class Killed(BaseException):
    """As of a process that ends at once."""


def kill(written: Path, by_the_compiler: bool) -> None:
    if by_the_compiler:  # Inductor writes what it writes itself elsewhere, and renames it
        written.write_bytes(b"\x7fELF" + b"\0" * 100)
    raise Killed


def fill(written: Path, by_the_compiler: bool) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(written))


@pytest.mark.parametrize("fail", [kill, fill])
def test_each_kind_of_file_fails_once(
    fail: Callable[[Path, bool], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler is killed when half of a file is there, or the disk is full.

    Nobody takes the half for the whole, an error says what is wrong, and the next attempt, on the same files, goes on.
    """
    failed: set[str] = set()

    def step(stock: Callable[..., None], first: Any, *others: Any, **keywords: Any) -> None:
        command = str(first).split()
        written = Path(command[command.index("-o") + 1] if "-o" in command else command[0])
        kind = re.sub(r"^[^.]*|\.\d+\.\d+$", "", written.name)
        # Not what torch asks the compiler for the CPU's vectors by, a .so of one suffix, nor headers.
        if kind not in failed and kind not in (".cpp", ".so", ".i", ".h", ".h.gch"):
            failed.add(kind)
            fail(written, "-o" in command)
        stock(first, *others, **keywords)

    for module, name in ((codecache, "write_atomic"), (cpp_builder, "run_compile_cmd")):
        monkeypatch.setattr(module, name, functools.partial(step, getattr(module, name)))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = testing.qdq_graph(Made(lambda m, x: torch.relu(m.fc(QD(x)))), (X,))
    result = None
    while result is None and len(failed) < 20:
        torch._dynamo.reset()
        clear_caches()
        before = len(failed)
        try:
            with torch.no_grad():
                result = torch.compile(model, backend="inductor_x86q")(X)
        except Killed:
            pass
        except Exception as error:
            assert os.strerror(errno.ENOSPC) in str(error), error
        assert result is not None or len(failed) > before, "it fails again, with nothing wrong"
    with torch.no_grad():
        testing.assert_same(result, model(X))
    assert {".main.o", ".optimized.o", ".main.so"} <= failed
    assert any(kind.endswith("x86q.o") for kind in failed), failed
    clear_caches()


def test_interrupted_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a pass leaves nothing replaced behind, and the next compile is right."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    from inductor_x86q import passes

    before = PatternMatcherPass.apply

    def interrupt(graph: Any, between: Any = None, **_: Any) -> Any:
        assert PatternMatcherPass.apply is not before
        raise KeyboardInterrupt

    module = Made(lambda m, x: torch.relu(m.fc(QD(x))))
    with monkeypatch.context() as patch:
        patch.setattr(passes, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            inspection.run_fused(module, (X,))
    assert PatternMatcherPass.apply is before
    torch._dynamo.reset()
    result, report = inspection.run_fused(module, (X,))
    with torch.no_grad():
        torch.testing.assert_close(result, module(X))
    assert len(report.fused) == 1


# --- threads, processes, memory ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions whose sum runs in place, so that calls that share memory would show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = QConv2d(16, 16, 3, padding=1), QConv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = QD(self.first(QD(x)), 0.03, 50)
        return QD(torch.relu(self.second(shortcut) + QD(torch.relu(x), 0.02, 0)), 0.02, 0)


def test_many_threads_call_one_model() -> None:
    inputs = [torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    model = testing.qdq_graph(Residual(), (inputs[0],))
    compiled = testing.compile_once(model, (inputs[0],))
    alone = [compiled.run(x).clone() for x in inputs]
    with torch.no_grad():
        for x, result in zip(inputs, alone, strict=True):
            testing.assert_same(result, model(x), min_snr=35)
    wrong: list[int] = []
    start = threading.Barrier(len(inputs))

    def work(number: int) -> None:
        start.wait()
        if not all(torch.equal(compiled.run(inputs[number]), alone[number]) for _ in range(40)):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


IN_A_FORK = """
import multiprocessing

def work(seed, answers):
    torch.manual_seed(seed)
    with torch.no_grad():
        x = torch.randn(4, 32)
        answers.put((seed, (torch.compile(model, backend="inductor_x86q")(x) - model(x)).abs().max().item()))

context, processes = multiprocessing.get_context("fork"), []
answers = context.Queue()
for seed in (1, 2):
    processes.append(context.Process(target=work, args=(seed, answers)))
    processes[-1].start()
errors = dict(answers.get(timeout=240) for _ in processes)
assert set(errors) == {1, 2} and max(errors.values()) < 1e-4, errors
for process in processes:
    process.join(60)
    assert process.exitcode == 0
"""


@pytest.mark.slow
def test_compiled_in_two_forked_processes_at_once(run_python: Callable[..., Any], tmp_path: Path) -> None:
    """From one cold cache directory, after the parent has imported everything."""
    start = COMPILED[: COMPILED.index("with torch.no_grad")]
    done = run_python("import torch\ntorch.set_num_threads(1)\n" + start + IN_A_FORK, check=False,
                      TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_share_a_cold_cache(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(COMPILED)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    running = [
        subprocess.Popen([sys.executable, str(script)], env=environment, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    for process in running:
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0 and "right" in out, err[-3000:]


def _resident_megabytes() -> float:
    """Of this process, without what the C library keeps of memory that was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_of_a_freed_model_returns() -> None:
    """Two models alive, one freed: the other still answers, and making the first again does not grow the process.

    Of the model's weights, 8 MB in int8 and 32 MB in float32, nothing stays.
    """
    x = torch.randn(2, 2048)
    model = testing.qdq_graph(Wide(), (x,))
    kept = testing.compile_once(model, (x,))
    expected = kept.run(x).clone()
    levels = []
    for _ in range(4):
        freed = testing.compile_once(testing.qdq_graph(Wide(), (x,)), (x,))
        assert torch.equal(freed.run(x), expected)
        del freed
        torch._dynamo.reset()
        levels.append(_resident_megabytes())
    assert torch.equal(kept.run(x), expected)
    assert levels[-1] - levels[0] < 4, levels


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = QLinear(2048, 2048), QLinear(2048, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(QD(torch.relu(self.first(QD(x)))))
