"""x86q explain: the report of a model, or the one inside a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from inductor_x86q.cli import models
from inductor_x86q.cli.output import DONE, FAILED, Unusable, step, write

if TYPE_CHECKING:
    from inductor_x86q.report import Report


def add_command(commands: Any) -> None:
    parser = models.add_parser(
        commands, "explain", _command, "which kernel each layer becomes, and why not where it does not"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a layer that should be int8 is not")
    parser.add_argument("--timing", action="store_true", help="compile, and measure each kernel")
    parser.add_argument("--drift", action="store_true", help="measure how far each layer is from float32")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON ('-': to standard output)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report as one self-contained page")


def _command(parsed: Any) -> int:
    from inductor_x86q.report import tables

    report = _stored(parsed) or _computed(parsed)
    if parsed.json != Path("-"):
        tables.show(report)
    for path, content in ((parsed.json, report.to_json), (parsed.html, lambda: report.to_html(parsed.model))):
        if path is not None:
            write(path, content() + "\n")
    return FAILED if parsed.strict and report.missed else DONE


def _stored(parsed: Any) -> Report | None:
    """The report inside MODEL where that is a package, whose code is not loaded; None for any other MODEL."""
    from inductor_x86q import aot

    if not parsed.model.endswith(".pt2") or not aot.is_package(parsed.model):
        return None
    given = [name for name in ("input", "mode", "option", "timing") if getattr(parsed, name)]
    if given:
        raise Unusable(f"{parsed.model!r} is a package, compiled already: --{given[0]} needs the model it was made of")
    with step("reading the package"):
        return aot.read_report(parsed.model)


def _computed(parsed: Any) -> Report:
    from inductor_x86q import inspection

    model, inputs, original = models.load_quantized(parsed)
    drift = parsed.drift and (original or True)
    with step("compiling and measuring" if parsed.timing else "running the passes"):
        return inspection.explain(model, inputs, timing=parsed.timing, drift=drift, **models.compile_arguments(parsed))
