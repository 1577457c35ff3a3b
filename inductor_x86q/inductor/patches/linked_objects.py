"""Generated code is linked with the objects of ours that it calls.

Replaces `codecache.CppBuilder`, which builds shared objects for the C++ wrapper, for the Python wrapper and for packages.
Inductor knows of no objects but its own; a way to name others would make this unnecessary. Relies on a shared object being
made from C++ files, or from objects whose own builders are made before, and on `codecache` looking the class up in its own
module.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from inductor_x86q.inductor import objects
from inductor_x86q.inductor.scoping import replaced

_MARK = "// linked with "


def mark(kernel: objects.Kernel) -> str:
    """The line of generated C++ by which the kernel's object is linked with it; another object, another line."""
    _known[kernel.name] = kernel
    return f"{_MARK}{kernel.name} {Path(objects.path(kernel)).name}"


_known: dict[str, objects.Kernel] = {}


def _marked(source: str) -> list[str]:
    """The names of the kernels that a C++ file asks for."""
    path = Path(source)
    return re.findall(rf"^{_MARK}(\w+)", path.read_text(), re.MULTILINE) if path.suffix == ".cpp" and path.is_file() else []


@contextlib.contextmanager
def linked_objects() -> Iterator[None]:
    """Within this context Inductor's shared objects hold those of ours that they call."""
    from torch._inductor import codecache

    asked_for: dict[str, list[str]] = {}  # by an object of Inductor's

    class Linking(codecache.CppBuilder):
        def __init__(self, name: str, sources: Any, BuildOption: Any, output_dir: str = "") -> None:
            given = [sources] if isinstance(sources, str) else list(sources)
            names = [name for source in given for name in asked_for.get(source) or _marked(source)]
            is_part = BuildOption.get_compile_only() or BuildOption.get_precompiling() or BuildOption.get_preprocessing()
            self.kernels = [] if is_part else [_known[name] for name in dict.fromkeys(names)]
            super().__init__(name, [*given, *map(objects.path, self.kernels)], BuildOption, output_dir)
            if is_part:
                asked_for[self.get_target_file_path()] = names

        def build(self) -> None:
            objects.build(self.kernels)
            super().build()

    with replaced(codecache, "CppBuilder", Linking):
        yield
