"""Building a package for the CPU of this process, or for what it takes for its CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q import progress
from inductor_x86q.aot.stored import REPORT_FILE, requirements, to_json
from inductor_x86q.backend import run_passes, settings
from inductor_x86q.inductor import compiling, objects, patches
from inductor_x86q.report import Report


def build(
    exported: torch.export.ExportedProgram, target: str, options: Mapping[str, Any], level: str | None = None
) -> None:
    """Compiles for the CPU of this process, or for what `level` says of it behind `target.limit_to`."""
    report = Report([], [], [])
    metadata = {**options.get("aot_inductor.metadata", {}), **requirements(level)}
    chosen = settings(None, {**options, "aot_inductor.metadata": metadata})

    def pipeline(graph: fx.Graph) -> None:
        report.extend(run_passes(graph, chosen))

    def extra_files() -> dict[str, str]:
        return {REPORT_FILE: to_json(report)}

    with progress.task("compiling the package"), patches.applied(pipeline), objects.built_ahead():
        compiling.aot_package(exported, target, chosen.inductor, extra_files)
