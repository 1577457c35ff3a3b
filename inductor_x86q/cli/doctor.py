"""x86q doctor: this machine, and what follows from it for int8."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from typing import Any

from inductor_x86q.cli.output import DONE, FAILED, step


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what int8 will use on this machine, and at what risk",
        description="Reports CPU, compiler and versions, and what int8 will use here.\n\n"
        "exit codes: 0 all is well or slower than it could be, 1 int8 cannot be compiled here",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_command)


def _command(parsed: Any) -> int:
    from inductor_x86q.report import tables

    with step("looking"):
        facts, advice, usable = diagnose()
    table = tables.Table(tables.Column("this machine", style="cyan"), "")
    for fact in facts:
        table.add(*fact)
    tables.show(tables.group(table, "", *(f"- {line}" for line in advice)))
    return DONE if usable else FAILED


def diagnose() -> tuple[list[tuple[str, str]], list[str], bool]:
    """Facts about this machine as (name, text), what follows from them for int8, and whether int8 can be compiled."""
    import torch

    from inductor_x86q import __version__, cpu
    from inductor_x86q.inductor import configuration

    yes = {True: "yes", False: "no"}
    facts = [
        ("CPU", cpu.capabilities().get("cpu_name") or platform.machine()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("AVX2", yes[cpu.has("avx2")]),
        ("AVX-512", yes[cpu.has("avx512_f")]),
        ("VNNI", yes[cpu.has_vnni()]),
        ("AMX int8", yes[cpu.has_amx()]),
        ("bf16", yes[cpu.has_bf16()]),
        (
            "packages for",
            ", ".join(level for level, it in cpu.LEVELS.items() if cpu.has(*it.instruction_sets)) or "none",
        ),
        ("inductor_x86q", __version__),
        ("torch", torch.__version__),
        ("torchao", _version("torchao")),
    ]
    for name, who in (("ONEDNN_MAX_CPU_ISA", "oneDNN"), ("ATEN_CPU_CAPABILITY", "Inductor")):
        if limit := os.environ.get(name):
            facts.append((name, f"{limit} (limits what {who} uses)"))
    advice, usable = _advice(cpu), True
    try:
        facts.append(("C++ compiler", configuration.cxx_compiler()))
    except RuntimeError as error:
        facts.append(("C++ compiler", "none"))
        advice.insert(0, str(error))
        usable = False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        advice.insert(0, f"this machine is {platform.machine()}, not x86-64: the int8 kernels are not available")
        usable = False
    return facts, advice, usable


def _advice(cpu: Any) -> list[str]:
    if cpu.has_amx():
        kernels = "AMX tiles: int8 runs at its fastest"
    elif cpu.has_vnni():
        kernels = "VNNI dot products: int8 runs at full speed, with 8-bit activations"
    else:
        kernels = (
            "int8 without VNNI: pairs of products are added in 16 bits, which can overflow. quantize() keeps each "
            "layer's input or weight to 7 bits here (reduce_range); layers of 8-bit inputs and 8-bit weights stay float"
        )
    return [kernels] + ([] if cpu.has_bf16() else ["no bf16 kernels: int8 layers produce int8 or fp32 here"])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed: pip install torchao"
