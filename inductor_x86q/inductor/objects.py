"""Machine code of ours, compiled apart from what Inductor generates: one object for each source, in Inductor's cache directory.

Objects are named by what they are made of: source, command line, compiler, CPU. So whoever needs the same one, another
layer, network or process, finds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from inductor_x86q import cpu
from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "objects.py",
    "To compile kernels of ours as Inductor does its own, in its cache directory.",
    (
        Needs("torch._inductor.codecache", "write", parameters=("content", "extension", "extra")),
        Needs("torch._inductor.codecache", "get_path", parameters=("basename", "extension")),
        Needs("torch._inductor.codecache", "get_lock_dir"),
        Needs("torch._inductor.codecache", "LOCK_TIMEOUT"),
        Needs("torch._inductor.cpp_builder", "CppBuilder.build", looks_up=("get_command_line",)),
        Needs("torch._inductor.cpp_builder", "CppBuilder.get_target_file_path"),
        Needs("torch._inductor.cpp_builder", "get_cpp_compiler"),
        Needs("torch._inductor.cpp_builder", "get_compiler_version_info", parameters=("compiler",)),
        Needs(
            "torch._inductor.cpp_builder",
            "CppTorchDeviceOptions",
            parameters=("device_type", "include_pytorch", "compile_only", "extra_flags"),
        ),
        Needs("torch.utils._filelock", "FileLock"),
    ),
    "`write` naming a file by its contents; a `CppBuilder` reading the configuration when it is made, not when it builds, "
    "and writing to the file that its command line names.",
)

_SUFFIX = "x86q"  # of files: <hash>.x86q.cpp, and the same with .o and .so
_FLAGS = "// flags: "


class Kernel(Protocol):
    """What an object is made of."""

    @property
    def name(self) -> str:
        """Of its function."""
        ...

    @property
    def flags(self) -> tuple[str, ...]: ...

    def source(self) -> str: ...


_ahead: ContextVar[bool] = ContextVar("objects are built ahead", default=False)
_pool: ThreadPoolExecutor
_started: dict[Path, Future[None]]
_lock: threading.Lock


def _begin() -> None:
    """For a process, be it a copy of another: that has none of its threads, and what they had begun never ends in it."""
    global _pool, _started, _lock
    _pool, _started, _lock = ThreadPoolExecutor(os.cpu_count()), {}, threading.Lock()


_begin()
os.register_at_fork(after_in_child=_begin)


def _builder(flags: str, name: str, sources: list[str], directory: str, *, link: bool = False) -> Any:
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions

    # Line tables name directories, and an object should not depend on whether it is for a package, which has none.
    has_line_tables = hasattr(config.aot_inductor, "enable_line_tables")
    with config.patch({"aot_inductor.enable_line_tables": False} if has_line_tables else {}):
        options = CppTorchDeviceOptions(
            device_type="cpu", include_pytorch=False, compile_only=not link, extra_flags=[flags]
        )
        return CppBuilder(name, sources, options, directory)


@functools.cache
def _compiler(compiler: str) -> str:
    from torch._inductor.cpp_builder import get_compiler_version_info

    return get_compiler_version_info(compiler)


def file(kernel: Kernel) -> Path:
    """Where a kernel's object is once it is built; its source is there."""
    from torch._inductor import codecache
    from torch._inductor.cpp_builder import get_cpp_compiler

    flags = " ".join(kernel.flags)
    command = _builder(flags, "o", ["i"], "").get_command_line()
    extra = f"{command} {_compiler(get_cpp_compiler())} {cpu.instruction_sets()}"
    _, path = codecache.write(f"{_FLAGS}{flags}\n{kernel.source()}", f"{_SUFFIX}.cpp", extra=extra)
    return Path(path).with_suffix(".o")


def file_of(name: str) -> Path:
    """The object whose file has that name."""
    from torch._inductor.codecache import get_path

    key, _, extension = name.partition(".")
    return Path(get_path(key, extension)[2])


def _start(built: Path) -> Future[None] | None:
    """Has an object built in another thread; None where it is there."""
    if built.exists():
        return None
    source = built.with_suffix(".cpp")
    flags = source.read_text().split("\n", 1)[0].removeprefix(_FLAGS)
    builder = _builder(flags, built.stem, [str(source)], str(built.parent))
    with _lock:
        started = _started.get(built)
        if started is None or started.done():
            started = _started[built] = _pool.submit(_run, builder, built)
        return started


def _run(builder: Any, target: Path) -> None:
    """Builds what is not there yet, in one of several processes."""
    from torch._inductor.codecache import LOCK_TIMEOUT, get_lock_dir
    from torch.utils._filelock import FileLock

    with FileLock(os.path.join(get_lock_dir(), f"{target.name}.lock"), timeout=LOCK_TIMEOUT):
        if not target.exists():
            build_whole(builder)


def build_whole(builder: Any) -> None:
    """Builds a file, which is there under its name once all of it is written.

    Whoever finds a file takes it for whole: a compiler that was killed, or that another process runs at this moment, would
    have them link half of it, now and at each later start. Relies on `CppBuilder.build` running what `get_command_line` says,
    and on that naming the file once, behind "-o".
    """
    target, command = builder.get_target_file_path(), builder.get_command_line()
    part = f"{target}.{os.getpid()}.{threading.get_ident()}"
    assert command.count(f"-o {target}") == 1, command
    builder.get_command_line = lambda: command.replace(f"-o {target}", f"-o {part}")
    try:
        type(builder).build(builder)
        os.replace(part, target)
    finally:
        del builder.get_command_line
        Path(part).unlink(missing_ok=True)


def build(objects: Iterable[Path]) -> None:
    """Builds those that are not there, side by side; raises what the compiler says."""
    for started in [_start(built) for built in objects]:
        if started is not None:
            started.result()


@contextlib.contextmanager
def built_ahead() -> Iterator[None]:
    """Within this context `start` does as it says; outside of it nobody needs machine code."""
    token = _ahead.set(True)
    try:
        yield
    finally:
        _ahead.reset(token)


def start(kernels: Iterable[Kernel]) -> None:
    """Begins to build objects that may be needed, and goes on. Who needs one reports what is wrong with it."""
    if _ahead.get():
        for kernel in kernels:
            _start(file(kernel))


def wait() -> None:
    """Until no compiler that this process has begun is at work; what one of them says is for who needs its object."""
    with _lock:
        started = list(_started.values())
    futures.wait(started)


def load(kernel: Kernel) -> Any:
    """The function of a kernel, from its object alone: for timing it."""
    built = file(kernel)
    build([built])
    target = built.with_suffix(".so")
    if not target.exists():
        flags = " ".join(kernel.flags)
        _run(_builder(flags, target.stem, [str(built)], str(built.parent), link=True), target)
    return getattr(ctypes.CDLL(str(target)), kernel.name)
