"""The front door of packages: checks what is asked, exports, and has it built for this CPU or for a lesser one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from inductor_x86q import progress
from inductor_x86q.aot import lesser, local
from inductor_x86q.backend import require_compilable, settings
from inductor_x86q.cpu import LEVELS, missing
from inductor_x86q.errors import CompileError
from inductor_x86q.inductor import configuration, dynamo
from inductor_x86q.quantization.arguments import bind, checked

# What differs from Inductor's defaults, where this torch has the option: line tables make a tenth of a small package
# and name directories of the machine that built it.
_DEFAULTS = {"aot_inductor.enable_line_tables": False}


def package(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = True,
    cpu: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Compiles a quantized model ahead of time into a package that runs without Python.

    Load it with `inductor_x86q.load(path)`, or in C++ with `torch::inductor::AOTIModelPackageLoader` as
    examples/cpp_runner does. It holds machine code and weights packed for this CPU, so it runs on machines with the same
    instruction sets; it stores which, and both loaders refuse a CPU without them. It takes inputs of the example's shapes,
    types and strides; set AOTI_RUNTIME_CHECK_INPUTS=1 to have them checked at each call. Generated kernels keep the
    number of threads that torch has while packaging: call
    `torch.set_num_threads` first, or pass the option `cpp.dynamic_threads`, where that is not what will serve.

    Args:
        model: what `quantize`, `convert` or `convert_pt2e` returned, or such a model after `torch.export.load`.
        example_inputs: the positional arguments of one call, a tuple.
        kwargs: the call's arguments by name. The package takes by name what was given by name here.
        path: where to write, a name that ends in .pt2.
        dynamic_shapes: as of `torch.export.export`; None fixes all shapes. torch.export takes a size of 1 to be fixed:
            give an example of at least 2 along a dynamic dimension. The package runs with 1 there too, but refuses it
            under AOTI_RUNTIME_CHECK_INPUTS=1.
        strict: raise StrictError when a layer that should run in int8 does not; otherwise the layer runs in float, and
            a warning and the report name it.
        cpu: a lesser CPU to build for: "avx2", "avx2-vnni", "avx512", "avx512-vnni" or "avx512-bf16". The first and the
            third have no VNNI: give `quantize` reduce_range=True for them. It is built in a process of its own, which knows
            neither rules of `register_pass` nor operators that only this process has registered.
        options: any Inductor option, and `kernels` as of the backend.

    Returns:
        The path, as a string.

    Raises:
        CompileError: an argument cannot be used, a dimension that should be dynamic is not, or there is no C++
            compiler.
        StrictError: under `strict`, with the names of the layers and the reasons.

    Example:
        >>> inductor_x86q.package(q, (x,), "model.pt2")
        'model.pt2'
        >>> inductor_x86q.load("model.pt2")(x).shape
        torch.Size([4, 4])
    """
    target = _check_arguments(model, path)
    args, named = checked(example_inputs, kwargs, CompileError)
    try:
        bind(model.forward, args, named)
    except TypeError as error:
        raise CompileError(f"the example does not fit the model: {error}") from None
    given = {**_defaults(), "strict": strict, **(options or {})}
    settings(None, given)  # raises for what is not known, before anything takes its time
    _check_cpu(cpu, given)
    with torch.no_grad(), progress.task("exporting"):
        require_compilable(pytree.tree_leaves((args, named)))
        exported = dynamo.export(model, args, named, dynamic_shapes=dynamic_shapes)
    if cpu is None:
        local.build(exported, target, given)
    else:
        lesser.build(exported, target, given, cpu)
    return target


def _check_arguments(model: Any, path: str | os.PathLike[str]) -> str:
    if not isinstance(model, torch.nn.Module):
        raise CompileError(f"model is a {type(model).__name__}: expected what quantize() or convert_pt2e() returned")
    target = os.fspath(path)
    if not target.endswith(".pt2"):
        raise CompileError(f"path is {target!r}: expected a name that ends in .pt2")
    if not Path(target).absolute().parent.is_dir():
        raise CompileError(f"the directory of {target!r} does not exist: create it first")
    return target


def _check_cpu(level: str | None, options: Mapping[str, Any]) -> None:
    if "cpp.march" in options:
        raise CompileError(
            "option `cpp.march` is not for packages, which store what CPU they need: name a level with `cpu`"
        )
    if level is None:
        return
    if level not in LEVELS:
        raise CompileError(f"cpu is {level!r}: expected one of {', '.join(LEVELS)}")
    if lacking := missing(LEVELS[level].instruction_sets):
        raise CompileError(f"cpu is {level!r}: this CPU has no {', '.join(lacking)}, and builds for lesser ones only")


def _defaults() -> dict[str, Any]:
    known = configuration.config_keys()
    return {name: value for name, value in _DEFAULTS.items() if name in known}
