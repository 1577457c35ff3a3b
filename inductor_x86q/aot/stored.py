"""What a package stores beside its code: the report, and the CPU that it was built for; loading one that fits this CPU."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inductor_x86q import cpu
from inductor_x86q.errors import CompileError
from inductor_x86q.inductor import compiling
from inductor_x86q.report import Report
from inductor_x86q.version import __version__

log = logging.getLogger(__name__)

REPORT_FILE = "inductor_x86q_report.json"
# Names in AOTInductor's own metadata, which Python and C++ read without loading the code.
INSTRUCTION_SETS, THREADS = "inductor_x86q_instruction_sets", "inductor_x86q_threads"


# --- the CPU ----------------------------------------------------------------------------------------------------------


def requirements(level: str | None) -> dict[str, str]:
    """What a package that is built now will ask for: instruction sets by torch's names, and its number of threads."""
    names = cpu.instruction_sets() if level is None else cpu.LEVELS[level].instruction_sets
    return {INSTRUCTION_SETS: ",".join(names), THREADS: str(torch.get_num_threads())}


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Loads a package that `package` made, after checking that this CPU can run it.

    A package holds machine code, which runs with all rights of this process: load only what you trust.

    Returns:
        A function of the model's inputs.

    Raises:
        CompileError: the file is no package, was not made by `package`, or needs what this CPU does not have.

    Example:
        >>> inductor_x86q.load("photo.jpg")
        Traceback (most recent call last):
            ...
        inductor_x86q.errors.CompileError: there is no file 'photo.jpg'
    """
    name = os.fspath(path)
    _require_fit(name)
    return compiling.load_package(name)


def _require_fit(name: str) -> None:
    """Raises CompileError where this CPU lacks an instruction set that the package may use."""
    if not is_package(name):
        read_report(name)  # says what the file is instead
    stored = compiling.read_metadata(name)
    if INSTRUCTION_SETS not in stored:
        raise CompileError(
            f"the package {name!r} does not say which CPU it was built for: make it again with package()"
        )
    if lacking := cpu.missing(filter(None, stored[INSTRUCTION_SETS].split(","))):
        level = cpu.best_level()
        advice = f'make it again with package(..., cpu="{level}"), or on this machine' if level else "it needs AVX2"
        raise CompileError(
            f"{name!r} was built for a CPU with {', '.join(lacking)}, which this one does not have: {advice}"
        )
    if int(stored[THREADS]) > torch.get_num_threads():
        log.warning(
            "%r was built for %s threads, and torch has %d here: its kernels may start more than that; make it again with "
            "as many, or with options={'cpp.dynamic_threads': True}",
            *(name, stored[THREADS], torch.get_num_threads()),
        )


# --- the report -------------------------------------------------------------------------------------------------------


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


def to_json(report: Report) -> str:
    """The report in its own schema, and beside it what made the package."""
    made_by = {"inductor_x86q": __version__, "torch": torch.__version__}
    return json.dumps({**made_by, "report": json.loads(report.to_json())}, indent=1)


def _from_json(text: str, name: str) -> Report:
    stored = json.loads(text)
    try:
        return Report.from_json(json.dumps(stored["report"]))
    except ValueError as error:
        raise CompileError(f"{name!r}, made by inductor_x86q {stored['inductor_x86q']}: {error}") from error
