"""Generated code, and the constants it computes with, go with the compiled model that they are of."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _load(stock: Callable[..., ModuleType], cache: Any, key: str, path: str, linemap: Any = None, attrs: Any = None,
          **others: Any) -> ModuleType:  # fmt: skip
    module = stock(cache, key, path, linemap, attrs, **others)
    if attrs is not None:
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]
        with contextlib.suppress(ValueError):
            cache.modules.remove(module)
    return module


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.codecache",
        attribute="PyCodeCache.load_by_key_path",
        replacement=_load,
        kind=classmethod,
        why="Inductor enters the module of each graph's code in two lists, `PyCodeCache.modules` and `sys.modules`, for the life of "
        "the process. The graph's constants are attributes of that module: with frozen weights, all of them.",
        since="2.13",
        until="Inductor holds such a module by a weak reference. None filed.",
        instead="`PyCodeCache.cache_clear()` empties the first list, for everybody; the second is not emptied.",
        relies_on="Nobody looking for a module that has constants: two models' modules may have one name. The function that is "
        "called keeping the module's names alive; tracebacks reading its file.",
        needs=(
            Needs(
                "torch._inductor.codecache",
                "PyCodeCache.load_by_key_path",
                parameters=("key", "path", "linemap", "attrs"),
                looks_up=("modules",),
            ),
            Needs("torch._inductor.graph", "GraphLowering._compile_to_module_lines", looks_up=("load_by_key_path",)),
            Needs(
                "torch._inductor.output_code", "CompiledFxGraph.after_deserialization", looks_up=("load_by_key_path",)
            ),
        ),
    ),
)
