"""x86q tune: a model in int8 as far as a budget of accuracy allows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inductor_x86q.cli import models
from inductor_x86q.cli.output import DONE, FAILED, Unusable, save, step, write

if TYPE_CHECKING:
    from inductor_x86q.report import Report, Tuning


def add_command(commands: Any) -> None:
    parser = models.add_parser(
        commands, "tune", _command, "which layers have to leave int8 for a budget of accuracy, and what that costs"
    )
    parser.add_argument(
        "--max-drop", metavar="NUMBER", type=float, required=True, help="how much of the metric may be lost"
    )
    parser.add_argument(
        "--validate",
        metavar="MODULE:FUNCTION",
        help="the metric: a function of a module, higher is better. Default: 1 less the share of noise in the outputs",
    )
    parser.add_argument(
        "--data",
        metavar="MODULE:FACTORY",
        help="the calibration data: what factory() returns, as `calibration` of quantize() takes it. Default: random",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="save the quantized program, to be given as MODEL")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON ('-': to standard output)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report as one self-contained page")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw accuracy against time for what was tried (needs matplotlib)"
    )


def _command(parsed: Any) -> int:
    from inductor_x86q import inspection
    from inductor_x86q.errors import BudgetError
    from inductor_x86q.report import plot, tables

    if parsed.plot is not None and (reason := plot.obstacle()):
        raise Unusable(f"--plot: {reason}")
    try:
        quantized, inputs = models.load_tuned(parsed)
    except BudgetError as error:
        print(f"x86q tune: {error}", file=sys.stderr)
        return FAILED
    with step("running the passes"):
        report = inspection.explain(quantized, inputs, **models.compile_arguments(parsed))
    if parsed.json != Path("-"):
        tables.show(report)
    _write(parsed, report, quantized.tuning, quantized, inputs)
    return DONE


def _write(parsed: Any, report: Report, tuning: Tuning, quantized: Any, inputs: tuple[Any, ...]) -> None:
    import torch

    from inductor_x86q.report import plot

    if parsed.json is not None:
        write(parsed.json, report.to_json() + "\n")
    if parsed.html is not None:
        write(parsed.html, report.to_html(parsed.model) + "\n")
    if parsed.plot is not None:
        save(parsed.plot, lambda: plot.draw(tuning, parsed.plot, parsed.model))
    if parsed.output is not None:
        save(parsed.output, lambda: torch.export.save(torch.export.export(quantized, inputs), parsed.output))
