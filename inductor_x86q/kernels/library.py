"""The C++ templates that kernels are made from, for an instruction set, and the compiler's flags for it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from importlib import resources

from inductor_x86q.kernels.isa import ISAS


def flags(isa: str) -> tuple[str, ...]:
    """The compiler's flags that a kernel needs besides those for optimization."""
    return (*ISAS[isa].compiler_flags, "-std=c++17", "-fopenmp", "-ffp-contract=off")


def namespace(isa: str, kind: str) -> str:
    """That of the templates of kernels of a kind."""
    return f"x86q_{isa}_{kind}"


def templates(isa: str, kind: str, files: Sequence[str]) -> str:
    """What stands in front of a kernel's definition: these files for an instruction set, in a namespace of their own.

    A C++ file may hold it more than once.
    """
    return _once("prelude", _text("prelude.h")) + _once(f"{isa}_{kind}", _library(isa, kind, tuple(files)))


def struct(name: str, fields: Mapping[str, str], floats: Collection[str] = ()) -> str:
    """The C++ of what a kernel is told at a call: `fields` in order, with what each is; int64 but for `floats`."""
    members = "".join(
        f"    {'float' if field in floats else 'int64_t'} {field};{f'  // {meaning}' if meaning else ''}\n"
        for field, meaning in fields.items()
    )
    return _once(name.removeprefix("X86q"), f"#include <cstdint>\nstruct {name} {{\n{members}}};\n")


def initialized(fields: Collection[str], floats: Collection[str], values: Mapping[str, float | str]) -> str:
    """The C++ of such a struct's members; a value that is text is C++ already."""
    return ", ".join(f"{float(values[field])!r}f" if field in floats else str(values[field]) for field in fields)


def _once(name: str, text: str) -> str:
    guard = f"X86Q_HAS_{name}".upper()
    return f"#ifndef {guard}\n#define {guard}\n{text}#endif\n"


@functools.cache
def _library(isa: str, kind: str, files: tuple[str, ...]) -> str:
    row = ISAS[isa]
    dot = f"#ifdef {row.dot[1]}\n#define X86Q_DOT {row.dot[0]}\n#endif\n" if row.dot else ""
    return f"""\
namespace {namespace(isa, kind)} {{
#define X86Q_HAS_MASKS {int(row.has_masks)}
{dot}{"".join(_text(file) for file in (f"vector_{32 * row.lanes}.h", "vector.h", *files))}\
#undef X86Q_HAS_MASKS
#undef X86Q_DOT
#undef X86Q_MM
#undef X86Q_PARTWISE
}}  // namespace {namespace(isa, kind)}
"""


@functools.cache
def _text(file: str) -> str:
    return resources.files(__package__).joinpath(file).read_text()
