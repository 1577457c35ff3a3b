"""Machine code of ours, compiled apart from what Inductor generates: one object for each source, in Inductor's cache directory.

Objects are named by what they are made of: source, command line, compiler, CPU. So whoever needs the same one, another
layer, network or process, finds it. Relies on `codecache.write` naming a file by its contents, on `CppBuilder` reading
Inductor's configuration when it is made and not when it builds, and on `get_lock_dir` and `FileLock` keeping processes apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Protocol

from inductor_x86q import cpu


class Kernel(Protocol):
    """What decides an object: `name` is its function's and tells everything else."""

    @property
    def name(self) -> str: ...

    @property
    def flags(self) -> tuple[str, ...]: ...

    def source(self) -> str: ...


_pool = ThreadPoolExecutor(os.cpu_count())
_started: dict[str, Future[None]] = {}
_lock = threading.Lock()
_ahead: ContextVar[bool] = ContextVar("objects are compiled ahead", default=False)


def _builder(flags: tuple[str, ...], name: str, sources: list[str], directory: str, *, link: bool) -> Any:
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions

    # Line tables name directories, and an object should not depend on whether it is for a package, which has none.
    has_line_tables = hasattr(config.aot_inductor, "enable_line_tables")
    with config.patch({"aot_inductor.enable_line_tables": False} if has_line_tables else {}):
        options = CppTorchDeviceOptions(
            device_type="cpu", include_pytorch=False, compile_only=not link, extra_flags=flags
        )
        return CppBuilder(name, sources, options, directory)


@functools.cache
def _version(compiler: str) -> str:
    from torch._inductor.cpp_builder import get_compiler_version_info

    return get_compiler_version_info(compiler)


def path(kernel: Kernel) -> str:
    """Where a kernel's object is, once it is built; its source is there."""
    from torch._inductor import codecache
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = _builder(kernel.flags, "o", ["i"], "", link=False).get_command_line()
    extra = f"{command} {_version(get_cpp_compiler())} {sorted(cpu.flags())}"
    _, source = codecache.write(kernel.source(), "x86q.cpp", extra=extra)
    return source.removesuffix("cpp") + "o"


def _build(builder: Any, target: str) -> None:
    """Builds what is not there yet, by one of several processes, and puts it there once it is whole."""
    from torch._inductor.codecache import LOCK_TIMEOUT, get_lock_dir
    from torch.utils._filelock import FileLock

    with FileLock(os.path.join(get_lock_dir(), os.path.basename(target) + ".lock"), timeout=LOCK_TIMEOUT):
        if not os.path.exists(target):
            builder.build()
            os.replace(builder.get_target_file_path(), target)


def _start(kernel: Kernel) -> Future[None] | None:
    """Has a kernel's object built in another thread; None where it is there."""
    target = path(kernel)
    if os.path.exists(target):
        return None
    directory, name = os.path.split(target.removesuffix(".o"))
    builder = _builder(kernel.flags, f"{name}.part", [f"{target.removesuffix('o')}cpp"], directory, link=False)
    with _lock:
        started = _started.get(target)
        if started is None or started.done():
            started = _started[target] = _pool.submit(_build, builder, target)
        return started


def build(kernels: Iterable[Kernel]) -> None:
    """Builds the objects that are not there, side by side; raises what the compiler says."""
    for started in [_start(kernel) for kernel in kernels]:
        if started is not None:
            started.result()


@contextlib.contextmanager
def compiled_ahead() -> Iterator[None]:
    """Within this context `start` does as it says; outside of it nobody needs machine code."""
    token = _ahead.set(True)
    try:
        yield
    finally:
        _ahead.reset(token)


def start(kernels: Iterable[Kernel]) -> None:
    """Begins to build objects that will be needed, and goes on. Who needs one reports what is wrong with it."""
    if _ahead.get():
        for kernel in kernels:
            _start(kernel)


def load(kernel: Kernel) -> Any:
    """The function of a kernel, from its object alone: for timing it."""
    build([kernel])
    built = path(kernel)
    directory, name = os.path.split(built.removesuffix(".o"))
    target = f"{built.removesuffix('o')}so"
    if not os.path.exists(target):
        _build(_builder(kernel.flags, f"{name}.part", [built], directory, link=True), target)
    return getattr(ctypes.CDLL(target), kernel.name)
