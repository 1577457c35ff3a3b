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
    parser.add_argument(
        "--model-explorer", metavar="FILE", type=Path, help="write the graph as JSON for model-explorer"
    )
    parser.add_argument("--code", action="store_true", help="put the generated C++ of each layer into both files")
    parser.add_argument(
        "--compare",
        metavar="FILE",
        type=Path,
        help="a report written by --json before: the page shows what has changed",
    )


def _command(parsed: Any) -> int:
    from inductor_x86q.report import tables

    before = _before(parsed.compare) if parsed.compare else None
    report = _stored(parsed) or _computed(parsed)
    if parsed.json != Path("-"):
        tables.show(report)
    if parsed.json is not None:
        write(parsed.json, report.to_json() + "\n")
    if parsed.model_explorer is not None:
        write(parsed.model_explorer, report.to_model_explorer(parsed.model) + "\n")
    if parsed.html is not None:
        write(parsed.html, report.to_html(parsed.model, compare=before) + "\n")
    return FAILED if parsed.strict and report.missed else DONE


def _before(path: Path) -> Report:
    """The report to compare with."""
    from inductor_x86q.report import Report

    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Unusable(f"{path} cannot be compared with: {error}") from error


def _stored(parsed: Any) -> Report | None:
    """The report inside MODEL where that is a package, whose code is not loaded; None for any other MODEL."""
    from inductor_x86q import aot

    if not parsed.model.endswith(".pt2") or not aot.is_package(parsed.model):
        return None
    given = [name for name in ("input", "mode", "option", "timing", "drift", "code") if getattr(parsed, name)]
    if given:
        raise Unusable(f"{parsed.model!r} is a package, compiled already: --{given[0]} needs the model it was made of")
    with step("reading the package"):
        return aot.read_report(parsed.model)


def _computed(parsed: Any) -> Report:
    from inductor_x86q import inspection

    model, inputs, original = models.load_quantized(parsed)
    drift = parsed.drift and (original or True)
    with step("compiling and measuring" if parsed.timing else "running the passes"):
        return inspection.explain(
            model, inputs, timing=parsed.timing, drift=drift, code=parsed.code, **models.compile_arguments(parsed)
        )
