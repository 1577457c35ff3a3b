"""x86q why: what each rule had to say of a node."""

from __future__ import annotations

from typing import Any

from inductor_x86q.cli import models
from inductor_x86q.cli.output import DONE, step


def add_command(commands: Any) -> None:
    parser = models.add_parser(
        commands, "why", _command, "why each rule that could apply to a node did not, stage by stage"
    )
    parser.add_argument(
        "--node", metavar="NAME", required=True, help="a node's name in a stage's graph, or a layer's path"
    )


def _command(parsed: Any) -> int:
    from inductor_x86q import inspection

    model, inputs, _ = models.load_quantized(parsed)
    with step("running the passes"):
        answers = inspection.why(model, inputs, parsed.node, **models.compile_arguments(parsed))
    asked = [answer for answer in answers if answer.rule]
    for stage in dict.fromkeys(answer.stage for answer in asked):
        print(stage)
        for answer in asked:
            if answer.stage == stage:
                print(f"  {answer.node} ({answer.operator}): {answer.reason}")
    known = {answer.operator for answer in asked}
    for operator in dict.fromkeys(answer.operator for answer in answers if answer.operator not in known):
        print(f"{operator}: no rule of any stage looks at this operator")
    return DONE
