"""Ahead-of-time packages: a quantized model as a .pt2 that Python and C++ load, with its report inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from inductor_x86q.backend import require_compilable, run_passes, settings
from inductor_x86q.errors import CompileError
from inductor_x86q.inductor import compiling, configuration, objects, patches
from inductor_x86q.report import Report
from inductor_x86q.version import __version__

REPORT_FILE = "inductor_x86q_report.json"

# What differs from Inductor's defaults, where this torch has the option: line tables make a tenth of a small package
# and name directories of the machine that built it.
_DEFAULTS = {"aot_inductor.enable_line_tables": False}


def package(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    strict: bool = True,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Compiles a quantized model ahead of time into a package that runs without Python.

    Load it with `torch._inductor.aoti_load_package(path)`, or in C++ with `torch::inductor::AOTIModelPackageLoader`.
    It holds machine code and weights packed for this CPU, so it runs on machines with the same instruction sets. It
    takes inputs of the example's shapes, types and strides; set AOTI_RUNTIME_CHECK_INPUTS=1 to have them checked at
    each call. Generated kernels keep the number of threads that torch has while packaging: call
    `torch.set_num_threads` first, or pass the option `cpp.dynamic_threads`, where that is not what will serve.

    Args:
        model: what `quantize`, `convert` or `convert_pt2e` returned, or such a model after `torch.export.load`.
        example_inputs: the positional arguments of one call, a tuple.
        path: where to write, a name that ends in .pt2.
        dynamic_shapes: as of `torch.export.export`; None fixes all shapes. torch.export takes a size of 1 to be fixed:
            give an example of at least 2 along a dynamic dimension. The package runs with 1 there too, but refuses it
            under AOTI_RUNTIME_CHECK_INPUTS=1.
        strict: raise StrictError when a layer that should run in int8 does not; otherwise the layer runs in float, and
            a warning and the report name it.
        options: any Inductor option, and `kernels` as of the backend.

    Returns:
        The path, as a string.

    Raises:
        CompileError: an argument cannot be used, a dimension that should be dynamic is not, or there is no C++
            compiler.
        StrictError: under `strict`, with the names of the layers and the reasons.
    """
    target = _check_arguments(model, example_inputs, path)
    chosen = settings(None, {**_defaults(), "strict": strict, **(options or {})})
    report = Report([], [], [])
    with torch.no_grad():
        require_compilable(example_inputs)
        exported = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)

    def pipeline(graph: fx.Graph) -> None:
        report.extend(run_passes(graph, chosen))

    def extra_files() -> dict[str, str]:
        return {REPORT_FILE: _to_json(report)}

    with patches.applied(pipeline), objects.built_ahead():
        compiling.aot_package(exported, target, chosen.inductor, extra_files)
    return target


def read_report(path: str | os.PathLike[str]) -> Report:
    """The report inside a package; loads no code.

    Raises:
        CompileError: the file is no package, was not made by `package`, or by an incompatible version of it.
    """
    name = os.fspath(path)
    if not Path(name).is_file():
        raise CompileError(f"there is no file {name!r}")
    try:
        text = compiling.read_extra_file(name, REPORT_FILE)
    except RuntimeError as error:
        raise CompileError(f"{name!r} is not a .pt2 package: {str(error).splitlines()[0]}") from error
    if text is None:
        raise CompileError(f"the package {name!r} has no report: it was not made by inductor_x86q.package")
    return _from_json(text, name)


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether there is a package made by `package` at the path; False for any other file and for none."""
    try:
        return compiling.read_extra_file(os.fspath(path), REPORT_FILE) is not None
    except RuntimeError:
        return False


def _check_arguments(model: Any, example_inputs: Any, path: str | os.PathLike[str]) -> str:
    if not isinstance(model, torch.nn.Module):
        raise CompileError(f"model is a {type(model).__name__}: expected what quantize() or convert_pt2e() returned")
    if not isinstance(example_inputs, tuple):
        raise CompileError(f"example_inputs is a {type(example_inputs).__name__}: expected a tuple of arguments")
    target = os.fspath(path)
    if not target.endswith(".pt2"):
        raise CompileError(f"path is {target!r}: expected a name that ends in .pt2")
    if not Path(target).absolute().parent.is_dir():
        raise CompileError(f"the directory of {target!r} does not exist: create it first")
    return target


def _defaults() -> dict[str, Any]:
    known = configuration.config_keys()
    return {name: value for name, value in _DEFAULTS.items() if name in known}


# --- the report as text -----------------------------------------------------------------------------------------------


def _to_json(report: Report) -> str:
    """The report in its own schema, and beside it what made the package."""
    made_by = {"inductor_x86q": __version__, "torch": torch.__version__}
    return json.dumps({**made_by, "report": json.loads(report.to_json())}, indent=1)


def _from_json(text: str, name: str) -> Report:
    stored = json.loads(text)
    try:
        return Report.from_json(json.dumps(stored["report"]))
    except ValueError as error:
        raise CompileError(f"{name!r}, made by inductor_x86q {stored['inductor_x86q']}: {error}") from error
