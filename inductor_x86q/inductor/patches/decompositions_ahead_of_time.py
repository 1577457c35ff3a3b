"""Ahead-of-time compiles decompose what ours do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inductor_x86q.inductor.decompositions import decompositions
from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _compile_fx(stock: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if keywords.get("decompositions") is None:
        keywords["decompositions"] = decompositions()
    return stock(*arguments, **keywords)


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.compile_fx",
        attribute="compile_fx",
        replacement=_compile_fx,
        why="`compile_fx_aot` has no argument for the decomposition table, and decomposes activations that the passes want "
        "to see as one node.",
        since="2.13",
        until="`torch._inductor.aot_compile` takes `decompositions`. None filed.",
        instead="`compile_fx(decompositions=…)` is what torch.compile's way takes. Decomposing the exported program before, "
        "with `run_decompositions`, does not keep Inductor from decomposing the rest.",
        relies_on="`compile_fx_aot` calling `compile_fx` by that name and with keywords; that one calling itself with the "
        "table that it was given.",
        needs=(
            Needs("torch._inductor.compile_fx", "compile_fx", parameters=("decompositions", "config_patches")),
            Needs("torch._inductor.compile_fx", "compile_fx_aot", looks_up=("compile_fx",)),
        ),
    ),
)
