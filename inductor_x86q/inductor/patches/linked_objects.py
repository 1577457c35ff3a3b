"""Generated code is linked with the objects of ours that it calls.

Replaces `codecache.CppBuilder`, which builds shared objects for the C++ wrapper, for the Python wrapper and for packages.
Inductor knows of no objects but its own; a way to name others would make this unnecessary. Relies on a shared object being
made from C++ files, or from objects whose own builders are made before, and on `codecache` looking the class up in its own
module.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inductor_x86q.inductor import objects
from inductor_x86q.inductor.scoping import replaced

_MARK = "// linked with "


def mark(kernel: objects.Kernel) -> str:
    """The line of generated C++ by which a kernel's object is linked with it; another object, another line."""
    return f"{_MARK}{objects.file(kernel).name}"


def _marked(source: str) -> list[Path]:
    """The objects that a C++ file asks for."""
    path = Path(source)
    if path.suffix != ".cpp" or not path.is_file():
        return []
    return [objects.file_of(name) for name in re.findall(rf"^{_MARK}(\S+)", path.read_text(), re.MULTILINE)]


@contextlib.contextmanager
def linked_objects() -> Iterator[None]:
    """Within this context Inductor's shared objects hold those of ours that they call."""
    from torch._inductor import codecache

    asked_for: dict[str, list[Path]] = {}  # by an object of Inductor's

    class Linking(codecache.CppBuilder):
        def __init__(self, name: str, sources: Any, BuildOption: Any, output_dir: str = "") -> None:
            given = [sources] if isinstance(sources, str) else list(sources)
            asked = [path for source in given for path in asked_for.get(source) or _marked(source)]
            is_part = (
                BuildOption.get_compile_only() or BuildOption.get_precompiling() or BuildOption.get_preprocessing()
            )
            self.linked = [] if is_part else list(dict.fromkeys(asked))
            super().__init__(name, [*given, *map(str, self.linked)], BuildOption, output_dir)
            if is_part:
                asked_for[self.get_target_file_path()] = asked

        def build(self) -> None:
            objects.build(self.linked)
            super().build()

    with replaced(codecache, "CppBuilder", Linking):
        yield
