"""The function that calls the kernels is compiled at the same time as they are."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _build(stock: Callable[..., None], lock_path: str, cpp_builders: Sequence[Any]) -> None:
    parts, locks = cpp_builders[:-1], Path(lock_path).parent
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(contextvars.copy_context().run, stock, str(locks / f"{_name(part)}.lock"), (part,))
            for part in parts
        ]
        for part in started:
            part.result()
    stock(lock_path, cpp_builders)


def _name(builder: Any) -> str:
    return Path(builder.get_target_file_path()).name


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.codecache",
        attribute="_worker_compile_cpp",
        replacement=_build,
        why="With the option `cpp_wrapper_build_separate` there are two files, which Inductor compiles one after the other, "
        "under a lock that is of the two together: another graph with the same kernels has another.",
        since="2.13",
        until="Inductor compiles them at once. None filed; the option is pytorch/pytorch#156050.",
        instead="There is none.",
        relies_on="This function building one file after the other, the last of which needs the others, and passing over what is "
        "there; it being called in the thread that compiles.",
        needs=(
            Needs("torch._inductor.codecache", "_worker_compile_cpp", parameters=("lock_path", "cpp_builders")),
            Needs("torch._inductor.codecache", "CppCodeCache.load_async", looks_up=("_worker_compile_cpp",)),
        ),
    ),
)
