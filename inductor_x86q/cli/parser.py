"""The commands, and how one of them is run."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from inductor_x86q.cli import code, doctor, explain, tune, why
from inductor_x86q.cli.output import DONE, UNUSABLE, Unusable
from inductor_x86q.tools import bench, coverage

_COMMANDS = (doctor, explain, code, why, tune, bench, coverage)

_NEXT = """\
What to do next:

  x86q doctor                                     what int8 will use on this machine
  x86q explain torchvision:resnet18               which kernel each layer becomes, and why not where it does not
  x86q explain package.module:factory --input 1x3x224x224 --html report.html
                                                  the same for a model of yours, as a page
  x86q code package.module:factory --layer NAME   the C++ of one layer

In Python: quantized = inductor_x86q.quantize(model, inputs, calibration=batches), then
torch.compile(quantized, backend="inductor_x86q"). `x86q --help` lists all commands.
"""


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("x86q", description="int8 for TorchInductor on x86 CPUs", formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        print(_NEXT, end="", file=sys.stderr)
        return UNUSABLE
    parsed = make_parser().parse_args(given)
    try:
        with _quiet():
            return parsed.run(parsed)
    except Unusable as error:
        print(f"x86q {parsed.command}: {error}", file=sys.stderr)
        return UNUSABLE
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the user's screen what torch and torchao say on import and on compile, and what our report says too."""
    loggers = [logging.getLogger(name) for name in ("torch", "torchao", "inductor_x86q")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
