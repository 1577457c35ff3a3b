"""Whether this torch has what is relied on, and the page that lists it."""

from __future__ import annotations

import functools

import torch

from inductor_x86q.errors import CompileError
from inductor_x86q.inductor import (
    autotuning,
    caches,
    compiling,
    configuration,
    decompositions,
    dynamo,
    fake_tensors,
    guards,
    matcher,
    objects,
    profiling,
    regions,
    uncompiled,
    wrapper_source,
)
from inductor_x86q.inductor.patches import PATCHES
from inductor_x86q.inductor.requirements import Interface, Needs
from inductor_x86q.version import __version__

# What the files of lowering/ rely on; here, since they are above this one.
_LOWERING = Interface(
    "lowering/",
    "Kernels of ours are templates that Inductor schedules, allocates for and compiles as its own.",
    (
        Needs("torch._inductor.lowering", "register_lowering", parameters=("type_promotion_kind",)),
        Needs("torch._inductor.lowering", "lowerings"),
        Needs("torch._inductor.select_algorithm", "autotune_select_algorithm"),
        Needs("torch._inductor.select_algorithm", "AlgorithmSelectorCache.__call__", parameters=("input_gen_fns",)),
        Needs("torch._inductor.codegen.cpp_template", "CppTemplate.generate"),
        Needs("torch._inductor.utils", "parallel_num_threads"),
        Needs("torch._inductor.ir", "ChoiceCaller"),
        Needs("torch._inductor.ir", "ConcatKernel"),
        Needs("torch._inductor.ir", "NonOwningLayout"),
        Needs("torch._inductor.ir", "ReinterpretView"),
        Needs("torch._inductor.ir", "ExternKernel.copy_input"),
        Needs("torch._inductor.ir", "ExternKernel.require_channels_last_3d"),
        Needs("torch._inductor.ir", "Buffer.decide_layout"),
    ),
    "What the files of that folder say.",
)

INTERFACES: tuple[Interface, ...] = (
    configuration.INTERFACE,
    dynamo.INTERFACE,
    compiling.INTERFACE,
    decompositions.INTERFACE,
    matcher.INTERFACE,
    regions.INTERFACE,
    fake_tensors.INTERFACE,
    guards.INTERFACE,
    _LOWERING,
    uncompiled.INTERFACE,
    wrapper_source.INTERFACE,
    caches.INTERFACE,
    autotuning.INTERFACE,
    profiling.INTERFACE,
    objects.INTERFACE,
)

# What the suite was last run on, for the error's sake.
TESTED = "2.13.0 to 2.15.0"


@functools.cache
def require() -> None:
    """Raises CompileError where this torch lacks something that is relied on, and names all of it."""
    missing = [
        *(
            f"{needs.missing()} (patches/{_file(patch)})"
            for patch in PATCHES
            for needs in patch.all_needs()
            if needs.missing()
        ),
        *(f"{needs.missing()} ({part.name})" for part in INTERFACES for needs in part.needs if needs.missing()),
    ]
    if missing:
        raise CompileError(
            f"torch {torch.__version__} is not supported by inductor_x86q {__version__}: {'; '.join(dict.fromkeys(missing))}. "
            f"Install a torch that it was tested on ({TESTED}), or a newer inductor_x86q."
        )


def page() -> str:
    """All patches and private interfaces, as Markdown."""
    lines = [f"# What inductor_x86q {__version__} replaces of torch and relies on", "", "## Replaced", ""]
    for patch in PATCHES:
        lines += [f"### `{patch.module}.{patch.attribute}` (patches/{_file(patch)})", "", patch.why, ""]
        lines += [f"- In force: within the scope `{patch.scope.name}`.", f"- Since: torch {patch.since}."]
        lines += [
            f"- Until: {patch.until}",
            f"- The sanctioned way: {patch.instead}",
            f"- Relies on: {patch.relies_on}",
        ]
        lines += [f"- Needs: {needs}" for needs in patch.all_needs()]
        lines.append("")
    lines += ["## Used as it is", ""]
    for part in INTERFACES:
        lines += [f"### {part.name}", "", part.why, ""]
        lines += [f"- Relies on: {part.relies_on}"] if part.relies_on else []
        lines += [f"- Needs: {needs}" for needs in part.needs]
        lines.append("")
    return "\n".join(lines)


def _file(patch: object) -> str:
    """Where a patch stands: the file that its replacement is written in."""
    return patch.replacement.__module__.rpartition(".")[2] + ".py"  # type: ignore[attr-defined]
