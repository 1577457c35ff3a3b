"""The headers that generated code includes are precompiled while the graph is still being worked on."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import HEADERS
from inductor_x86q.inductor.requirements import Needs


def _start(stock: Callable[..., str], *arguments: Any, **keywords: Any) -> str:
    pool = HEADERS.value
    assert pool is not None
    pool.submit(contextvars.copy_context().run, stock, *arguments, **keywords)
    return ""


PATCHES = (
    Patch(
        scope=HEADERS,
        module="torch._inductor.codecache",
        attribute="_precompile_header",
        replacement=_start,
        why="Precompiling headers, once per machine and set of flags, takes longer than all the rest of a small model, and "
        "Inductor begins with it when it has the code that includes them.",
        since="2.13",
        until="Inductor precompiles headers (pytorch/pytorch#144002, pytorch/pytorch#144293) before it needs them. None filed.",
        instead="There is none but to compile some other model before.",
        relies_on="`CppWrapperCodeCache.load_async` asking this function for the headers of its flags, and building nothing before "
        "what it returns is called; what is precompiled already being passed over.",
        needs=(
            Needs(
                "torch._inductor.codecache",
                "CppWrapperCodeCache.load_async",
                parameters=("main_code", "device_type", "optimized_code", "needs_vec_isa", "kernel_needs_vec_isa"),
            ),
            Needs("torch._inductor.codecache", "CppCodeCache.load_async", looks_up=("_precompile_header",)),
            Needs("torch._inductor.config", "cpp_wrapper_build_separate"),
        ),
    ),
)


@contextlib.contextmanager
def headers_ahead(options: Mapping[str, Any]) -> Iterator[None]:
    """Within this context the headers that code generated under `options` includes are precompiled, beside all else.

    Who needs a header reports what is wrong with it.
    """
    from torch._inductor import codecache, config

    with ThreadPoolExecutor() as pool:
        with config.patch(dict(options)), HEADERS.entered(pool, PATCHES):
            if config.cpp_wrapper and config.cpp_wrapper_build_separate:
                codecache.CppWrapperCodeCache.load_async(
                    "", "cpu", optimized_code="\n", needs_vec_isa=False, kernel_needs_vec_isa=True
                )
        yield
