"""Inductor's entry points."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from inductor_x86q.errors import CompileError
from inductor_x86q.inductor.autotuning import choices_followed
from inductor_x86q.inductor.decompositions import decompositions
from inductor_x86q.inductor.requirements import Interface, Needs
from inductor_x86q.inductor.uncompiled import run_uncompiled
from inductor_x86q.inductor.wrapper_source import until_source

INTERFACE = Interface(
    "compiling.py",
    "Inductor's entry points, for torch.compile and ahead of time.",
    (
        Needs(
            "torch._inductor.compile_fx", "compile_fx", parameters=("inner_compile", "config_patches", "decompositions")
        ),
        Needs("torch._inductor.compile_fx", "compile_fx_inner"),
        Needs("torch._inductor", "aot_compile", parameters=("gm", "args", "kwargs", "options")),
        Needs("torch._inductor", "aoti_load_package"),
        Needs("torch._inductor.config", "aot_inductor.package"),
        Needs("torch.export.pt2_archive._package", "package_pt2", parameters=("aoti_files", "extra_files")),
        Needs("torch.export.pt2_archive._package", "PT2ArchiveReader.get_file_names"),
        Needs("torch.export.pt2_archive._package", "PT2ArchiveReader.read_string"),
        Needs("torch.export.pt2_archive.constants", "EXTRA_DIR"),
        Needs("torch.export", "ExportedProgram.module", parameters=("check_guards",)),
    ),
    "Grad mode being off having Inductor freeze; `aot_compile` returning the list of files under `aot_inductor.package`, and "
    "taking no guards; `package_pt2` storing extra files where all loaders leave them alone.",
)


def compile_fx(
    graph_module: fx.GraphModule, example_inputs: list[Any], options: Mapping[str, Any], **keywords: Any
) -> Any:
    """Inductor's entry point."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    with torch.no_grad(), choices_followed(options):
        return inductor_compile_fx(graph_module, example_inputs, config_patches=dict(options),
                                    decompositions=decompositions(), **keywords)  # fmt: skip


def aot_package(exported: torch.export.ExportedProgram, path: str, options: Mapping[str, Any],
                extra_files: Callable[[], dict[str, str]]) -> None:  # fmt: skip
    """Compiles an exported program with AOTInductor into a .pt2; `extra_files` is asked for once it is compiled.

    Does what `torch._inductor.aoti_compile_and_package` does, which takes no extra files.
    """
    from torch.export.pt2_archive._package import package_pt2

    arguments, keywords = exported.example_inputs
    with torch.no_grad(), choices_followed(options):
        files = torch._inductor.aot_compile(
            exported.module(check_guards=False), arguments, keywords, options={**options, "aot_inductor.package": True}
        )
    package_pt2(path, aoti_files=files, extra_files=extra_files())  # type: ignore[arg-type]


def read_extra_file(path: str, name: str) -> str | None:
    """An extra file of a .pt2, None where there is no such file. Loads no code; raises RuntimeError for no archive."""
    from torch.export.pt2_archive._package import PT2ArchiveReader
    from torch.export.pt2_archive.constants import EXTRA_DIR

    with PT2ArchiveReader(path) as archive:
        return archive.read_string(EXTRA_DIR + name) if EXTRA_DIR + name in archive.get_file_names() else None


def read_metadata(path: str) -> dict[str, str]:
    """AOTInductor's metadata of a package; loads no code.

    Relies on `AOTIModelPackageLoader.load_metadata_from_package`, as C++ has it, and on packages naming their one model
    "model".
    """
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    return dict(loader.load_metadata_from_package(path, "model"))


def load_package(path: str) -> Callable[..., Any]:
    """Loads the code of a package, for which it has to fit this CPU.

    torch warns where the CPU has more than what the package was built for, which is what packages for lesser CPUs are for.
    Relies on the name of its logger and on "AOTI_CPU_ISA" being in that warning; on `loader.get_call_spec` giving its
    arguments' and results' trees, which torch reads at the first call, and on their form.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "AOTI_CPU_ISA" not in record.getMessage()

    logger = logging.getLogger("torch.export.pt2_archive._package")
    logger.addFilter(keep)
    try:
        loaded = torch._inductor.aoti_load_package(path)
    finally:
        logger.removeFilter(keep)
    for spec in loaded.loader.get_call_spec():
        try:
            pytree.treespec_loads(spec)
        except NotImplementedError as error:
            raise CompileError(
                f"{path!r} takes or gives a type that is not known here: import the library that it is of, e.g. "
                f"transformers, before loading; {_types(spec)}"
            ) from error
    return loaded


def _types(spec: str) -> str:
    """The types that a serialized tree is made of, as torch registered them."""
    return ", ".join(sorted(set(re.findall(r'"type": "([\w.]+\.[\w.]+)"', spec)))) or spec


def generate_only(graph_module: fx.GraphModule, example_inputs: list[Any], **keywords: Any) -> Callable[..., Any]:
    """An `inner_compile` that generates the source, within `generated_code`, and does not call the C++ compiler."""
    from torch._inductor.compile_fx import compile_fx_inner

    uncompiled = run_uncompiled(graph_module, example_inputs)
    with until_source():
        compile_fx_inner(graph_module, example_inputs, **keywords)
    return uncompiled
