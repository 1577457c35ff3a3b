"""Generated code is linked with the objects of ours that it calls, and what is built is there once it is whole."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inductor_x86q.inductor import objects
from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs

_MARK = "// linked with "

_asked_for: dict[str, list[Path]] = {}  # by what an object of Inductor's is compiled from


def mark(kernel: objects.Kernel) -> str:
    """The line of generated C++ by which the kernel's object is linked with it; another object, another line."""
    return f"{_MARK}{objects.file(kernel).name}"


def _marked(source: str) -> list[Path]:
    """The objects that a C++ file asks for."""
    path = Path(source)
    if path.suffix != ".cpp" or not path.is_file():
        return []
    return [objects.file_of(name) for name in re.findall(rf"^{_MARK}(\S+)", path.read_text(), re.MULTILINE)]


def _init(
    stock: Callable[..., None], builder: Any, name: str, sources: Any, BuildOption: Any, output_dir: str = ""
) -> None:
    given = [sources] if isinstance(sources, str) else list(sources)
    asked = list(dict.fromkeys(path for source in given for path in _asked_for.get(source) or _marked(source)))
    if BuildOption.get_compile_only() or BuildOption.get_precompiling() or BuildOption.get_preprocessing():
        stock(builder, name, sources, BuildOption, output_dir)
        if asked:
            _asked_for[builder.get_target_file_path()] = asked
        builder.build = functools.partial(objects.build_whole, builder)
        return
    stock(builder, name, [*given, *map(str, asked)], BuildOption, output_dir)
    builder.build = functools.partial(_link, builder, asked)


def _link(builder: Any, asked: list[Path]) -> None:
    """In whatever thread."""
    objects.build(asked)
    objects.build_whole(builder)


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.cpp_builder",
        attribute="CppBuilder.__init__",
        replacement=_init,
        why="Kernels of ours are compiled once for all graphs; what is compiled for one graph, with the C++ wrapper, with the "
        "Python wrapper or for a package, is linked with them. Inductor has the compiler write each file in its place, where "
        "another process, or the next one after a compiler was killed, takes half a file for a whole one: its lock is that of a "
        "graph, not of a file.",
        since="2.13",
        until="Inductor takes names of objects to link, as it does for other devices' kernels. None filed.",
        instead="`aot_inductor.custom_ops_to_c_shims` and `extra_flags` reach some of these builds only.",
        relies_on="A shared object being made from C++ files, or from objects whose own builders are made before it.",
        needs=(
            Needs(
                "torch._inductor.cpp_builder",
                "CppBuilder.__init__",
                parameters=("name", "sources", "BuildOption", "output_dir"),
            ),
            Needs("torch._inductor.cpp_builder", "CppBuilder.build"),
            Needs("torch._inductor.cpp_builder", "CppBuilder.get_target_file_path"),
            Needs("torch._inductor.cpp_builder", "BuildOptionsBase.get_precompiling"),
            Needs("torch._inductor.cpp_builder", "BuildOptionsBase.get_preprocessing"),
        ),
    ),
)
