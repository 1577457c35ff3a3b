"""x86q code: the generated C++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inductor_x86q.cli import models
from inductor_x86q.cli.output import DONE, step, write


def add_command(commands: Any) -> None:
    parser = models.add_parser(
        commands, "code", _command, "the generated C++, with a comment at each call that names its layers"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layer", metavar="PATH", help="only what serves this layer, e.g. layer1.0.conv1")
    which.add_argument(
        "--stable", action="store_true", help="without what differs between machines and versions of torch"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write it there")


def _command(parsed: Any) -> int:
    from inductor_x86q import inspection
    from inductor_x86q.inductor import cpp_text

    model, inputs, _ = models.load_quantized(parsed)
    with step("generating code"):
        code = inspection.cpp_code(model, inputs, layer=parsed.layer, **models.compile_arguments(parsed))
    write(parsed.output or Path("-"), cpp_text.stable(code) if parsed.stable else code)
    return DONE
