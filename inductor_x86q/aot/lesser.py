"""Building for a lesser CPU than this one, in a process that oneDNN, ATen, Inductor and we all take for one that runs there.

oneDNN reads its limit once, before it first computes anything, and packs weights for it: this process is too late for that.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inductor_x86q.aot import local
from inductor_x86q.cpu import LEVELS
from inductor_x86q.errors import CompileError, StrictError
from inductor_x86q.inductor import target as targets
from inductor_x86q.report import Report

_PROGRAM, _REQUEST, _FAILURE = "program.pt2", "request.pickle", "failure.json"


def build(exported: torch.export.ExportedProgram, target: str, options: Mapping[str, Any], level: str) -> None:
    """Writes the package to `target`; raises what building there raised."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch.export.save(exported, directory / _PROGRAM)
        request = (os.path.abspath(target), dict(options), level, torch.get_num_threads())
        (directory / _REQUEST).write_bytes(pickle.dumps(request))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "ONEDNN_MAX_CPU_ISA": LEVELS[level].onednn,
            "ATEN_CPU_CAPABILITY": LEVELS[level].aten,
        }
        command = [sys.executable, "-c", "from inductor_x86q.aot import lesser; lesser.main()", name]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=2
        )  # what it prints is no output of ours
        if (directory / _FAILURE).exists():
            raise _failure(json.loads((directory / _FAILURE).read_text()))
        if done.returncode:
            raise CompileError(f"building for {level} failed: the process ended with exit code {done.returncode}")


def _failure(stored: Mapping[str, Any]) -> CompileError:
    if stored["report"] is not None:
        return StrictError(stored["message"], Report.from_json(stored["report"]))
    return CompileError(stored["message"])


def main() -> None:
    """What that process does."""
    directory = Path(sys.argv[1])
    target, options, level, threads = pickle.loads((directory / _REQUEST).read_bytes())
    torch.set_num_threads(threads)
    exported = torch.export.load(directory / _PROGRAM)
    try:
        targets.limit_to(LEVELS[level])
        local.build(exported, target, {**options, "cpp.march": LEVELS[level].march}, level)
    except CompileError as error:
        report: Any = error.report if isinstance(error, StrictError) else None
        (directory / _FAILURE).write_text(json.dumps({"message": str(error), "report": report and report.to_json()}))
