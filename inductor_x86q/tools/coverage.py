"""x86q coverage: how much of each network of the zoo runs in int8, and what the stock path makes of the same network."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from inductor_x86q import progress
from inductor_x86q.report.tables import Column, Table, show
from inductor_x86q.tools.files import writable

LIMIT = 900  # seconds for one network on one path


@dataclasses.dataclass
class Row:
    """One network: convolutions and linears in all and in int8, the share of multiply-accumulates, what is left."""

    network: str
    layers: int = 0
    int8_layers: int = 0
    int8_share_of_macs: float = 0.0
    int8_calls: int = 0
    float_kernels: int = 0  # generated kernels and float calls of the library
    quantizes_left: int = 0
    quantized: str = ""  # what the quantizes that are left read: what gives float, and no call could write in int8
    why: str = ""  # the reasons of what is not int8
    stock: str = ""  # what the stock path gives, where it was asked for
    error: str = ""


def row(network: str, *, code: bool = False) -> Row:
    """Quantizes one network of the zoo and counts; with `code`, generates its C++ too and counts the kernels there."""
    from inductor_x86q import cpp_code, quantize
    from inductor_x86q.inductor.cpp_text import kernel_calls
    from inductor_x86q.inspection import explain
    from inductor_x86q.tools.zoo import ZOO, Entry, build

    entry = ZOO.get(network, Entry(network, 224))
    model, x = build(network), entry.example()
    quantized = quantize(model, (x,), calibration=[x])
    report = explain(quantized, (x,))
    unfused = [miss for miss in (*report.missed, *report.kept_float) if miss.operator in ("conv", "linear")]
    reasons = Counter(f"{miss.operator}: {miss.reason.name}" for miss in (*report.missed, *report.kept_float))
    operators = {node.name: node.operator for node in report.nodes}
    sources = Counter(
        operators.get(node.inputs[0], "") if node.inputs else "a constant"
        for node in report.nodes
        if node.name in report.quantizes_left
    )
    found = Row(
        network,
        layers=len(report.fused) + len(unfused),
        int8_layers=len(report.fused),
        int8_share_of_macs=report.int8_share_of_macs,
        quantizes_left=len(report.quantizes_left),
        quantized=_counted(sources),
        why=_counted(reasons),
    )
    if code:
        found.int8_calls, found.float_kernels = count_kernels(
            kernel_calls(cpp_code(quantized, (x,), options={"kernels": "onednn"}))
        )
    return found


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def count_kernels(calls: Counter[str]) -> tuple[int, int]:
    """Calls of int8 kernels of the library, and of everything else that computes but int8 max pools: stock's are not seen."""
    from inductor_x86q.testing.code import INT8_KERNELS

    int8 = sum(calls[name] for name in INT8_KERNELS)
    float_calls = ("convolution", "linear", "bmm", "mm", "addmm", "cat")
    counted = {name: n for name, n in calls.items() if not re.fullmatch(r"cpp_fused_max_pool2d_\d+", name)}
    others = sum(n for name, n in counted.items() if name.startswith(("cpp_", *float_calls)) or "mkl" in name)
    return int8, others


def stock_kernels(network: str) -> tuple[int, int]:
    """The same counts for torchao's quantizer and Inductor's stock passes, as PyTorch's tutorial uses them."""
    from inductor_x86q.inductor import wrapper_source
    from inductor_x86q.inductor.cpp_text import kernel_calls
    from inductor_x86q.tools.engines import ENGINES
    from inductor_x86q.tools.zoo import ZOO, Entry, build

    entry = ZOO.get(network, Entry(network, 224))
    model, x = build(network), entry.example()
    with torch.no_grad(), wrapper_source.generated_code() as generated, wrapper_source.until_source():
        ENGINES["stock-int8"](model, x)()
    counts = [count_kernels(kernel_calls(one.code)) for one in generated]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)


def rows(networks: Iterable[str], *, stock: bool = False) -> Iterable[Row]:
    """One row a network, each in a process of its own: memory is freed, and a crash is a row with an error."""
    for network in networks:
        found = _in_process(f"inductor_x86q.tools.coverage.row({network!r}, code={stock})")
        one = Row(**found) if "error" not in found or "network" in found else Row(network, error=found["error"])
        if stock:
            counts = _in_process(f"inductor_x86q.tools.coverage.stock_kernels({network!r})")
            one.stock = f"crashes: {counts['error']}" if isinstance(counts, dict) else f"{counts[0]} + {counts[1]}"
        yield one


def _in_process(expression: str) -> Any:
    program = (
        "import dataclasses, json, sys, logging, warnings; warnings.simplefilter('ignore'); logging.disable(40)\n"
        "import inductor_x86q.tools.coverage\n"
        "try:\n"
        f"    value = {expression}\n"
        "    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value\n"
        "except Exception as error:\n"
        "    value = {'error': f'{type(error).__name__}: {error}'.splitlines()[0][:160]}\n"
        "print('\\n' + json.dumps(value))\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"takes over {LIMIT // 60} minutes"}
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": f"exit code {done.returncode}"}


def table(rows: Iterable[Row]) -> Table:
    """A row a network."""
    numbers = ("layers", "int8", "MACs", "int8 + other calls", "stock", "q left")
    found = Table("network", *(Column(title, right=True) for title in numbers), "behind what; why not int8")
    for one in rows:
        if one.error:
            found.add(one.network, *[""] * len(numbers), f"failed: {one.error}", style="red")
            continue
        calls = f"{one.int8_calls} + {one.float_kernels}" if one.int8_calls else "-"
        found.add(
            *(one.network, str(one.layers), str(one.int8_layers), f"{one.int8_share_of_macs:.1%}", calls),
            *(one.stock or "-", str(one.quantizes_left), "; ".join(filter(None, (one.quantized, one.why)))),
        )
    return found


def to_json(rows: Iterable[Row]) -> str:
    """The counts with the date, the CPU's abilities and torch's version."""
    from inductor_x86q import __version__
    from inductor_x86q.tools.bench import machine

    body = {"source": "x86q coverage", "date": time.strftime("%Y-%m-%d"), "version": __version__, "machine": machine()}
    return json.dumps({**body, "rows": [dataclasses.asdict(one) for one in rows]}, indent=1)


def add_command(commands: Any) -> None:
    """`x86q coverage` on the command line."""
    parser = commands.add_parser(
        "coverage",
        help="how much of torchvision's networks runs in int8",
        description=f"{__doc__}\n\nexit codes: 0 every convolution and linear is in int8, 1 not all are",
    )
    parser.add_argument("network", nargs="*", help="names of torchvision models (default: one of each family)")
    parser.add_argument("--stock", action="store_true", help="count the kernels, also of the stock path (minutes each)")
    parser.add_argument("--json", metavar="FILE", type=writable, help="write the counts as JSON")
    parser.set_defaults(run=_command)


def _command(parsed: Any) -> int:
    from inductor_x86q.tools.zoo import ZOO

    networks = parsed.network or list(ZOO)
    found: list[Row] = []
    try:
        with progress.task("counting", total=len(networks)) as advance:
            for one in rows(networks, stock=parsed.stock):
                found.append(one)
                advance()
    finally:  # what is known by then, where somebody has waited for long enough
        show(table(found))
        if parsed.json:
            parsed.json.write_text(to_json(found))
    return int(any(one.error or one.int8_layers < one.layers for one in found))
