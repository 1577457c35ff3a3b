"""A random graph: the source text of a module, and what is known of it.

What comes out is a script: the one that a failure prints.
"""

from __future__ import annotations

import dataclasses
import linecache
import re
from collections.abc import Mapping
from typing import Any

import torch

from tests.fuzz.catalogue import SIGNS

PREAMBLE = '''\
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
import torch.nn.functional as F

import inductor_x86q.graph.operators  # registers its own

q = torch.ops.quantized_decomposed


def integers(seed, shape, low, high, dtype):
    """Integers from `low` up to and with `high`."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reals(seed, shape, low, high):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low

'''
HELPERS: dict[str, Any] = {}
exec(PREAMBLE, HELPERS)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A module as text, its inputs as expressions, and what is known of it."""

    constants: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...]
    lines: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    kinds: tuple[str, ...]  # the operators drawn, for the counts
    defects: frozenset[str]  # the report's reasons that were put in on purpose
    products: int  # convolutions, linears and matrix products in the source

    def source(self) -> str:
        """The module's definition."""
        registered = [f'        self.register_buffer("{name}", {expression})' for name, expression in self.constants]
        names = ", ".join(name for name, _ in self.inputs)
        return "\n".join([
            "class Model(torch.nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *registered,
            "",
            f"    def forward(self, {names}):",
            *(f"        {line}" for line in self.lines),
            f"        return {', '.join(self.outputs)}",
            "",
        ])  # fmt: skip

    def pairs(self) -> set[tuple[str, str]]:
        """Each operator that computes something, and one that reads it; what only converts is looked through."""
        behind: dict[str, set[str]] = {name: {"input"} for name, _ in self.inputs}
        found = set()
        for line in self.lines:
            name, expression = line.split(" = ", 1)
            read = set[str]().union(*(behind.get(operand, set()) for operand in re.findall(r"\b[vx]\d+\b", expression)))
            operator = _operator(expression)
            found |= {(before, operator) for before in read if operator}
            behind[name] = {operator} if operator else read
        return found

    def module(self) -> torch.nn.Module:
        namespace = dict(HELPERS)
        source = self.source()
        # Dynamo and the traceback look a line of source up by its file's name.
        name = f"<random graph {hash(source)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), namespace)
        return namespace["Model"]().eval()

    def example(self, run: int, batch: int | None = None) -> tuple[torch.Tensor, ...]:
        """The inputs of call number `run`: other values each time; `batch` replaces their first dimension."""
        found = []
        for number, (_, expression) in enumerate(self.inputs):
            value = eval(expression.replace("SEED", str(1000 * run + number)), HELPERS)
            if batch is not None:
                value = torch.cat([value] * batch)[:batch] if value.shape[0] else value
            found.append(value)
        return tuple(found)

    def script(self, run: int = 0, mode: str | None = None) -> str:
        """A file that compiles the graph and prints how far it is from itself run eagerly."""
        inputs = [expression.replace("SEED", str(1000 * run + n)) for n, (_, expression) in enumerate(self.inputs)]
        mark = "for x in inputs:\n    torch._dynamo.maybe_mark_dynamic(x, 0)\n" if self.dynamic_batch else ""
        chosen = f', mode="{mode}"' if mode else ""
        return (
            f"{PREAMBLE}\n{self.source()}\n\nmodel = Model().eval()\ninputs = ({', '.join(inputs)},)\n{mark}"
            "with torch.no_grad():\n"
            "    expected = model(*inputs)\n"
            f'    actual = torch.compile(model, backend="inductor_x86q"{chosen})(*inputs)\n'
            "if not isinstance(expected, tuple):\n    expected, actual = (expected,), (actual,)\n"
            "for e, a in zip(expected, actual, strict=True):\n"
            "    print(tuple(e.shape), e.dtype, (e.double() - a.double()).abs().max().item() if e.numel() else 0)\n"
        )


def _operator(expression: str) -> str:
    """The operator that a line computes; empty for quantize, dequantize, conversions and the parts of a split."""
    called = re.match(r"(?:torch\.ops\.(?:aten|inductor_x86q)|torch|F)\.(\w+)(?:\.default)?\(", expression)
    if called:
        return called[1]
    sign = re.match(r"\(?[vx]\d+ ([+*-]) ", expression)
    if sign:
        return SIGNS[sign[1]]
    method = re.match(r"[vx]\d+\.(\w+)\(", expression)
    if method:
        return method[1] if method[1] != "to" else ""
    return "slice" if ":" in expression and not expression.startswith("q.") else ""


def written(lines: str, constants: Mapping[str, str], inputs: Mapping[str, str], *, defects: str = "",
            dynamic_batch: bool = False) -> Graph:  # fmt: skip
    """A graph written by hand: assignments, one a line, whose last one is the output (or several, with commas).

    Args:
        constants: name and expression of buffers; those that no line reads are left out.
        defects: names of the reasons for which something in it may stay float.
    """
    rows = [line.strip() for line in lines.strip().splitlines()]
    outputs = rows.pop().removeprefix("return ").split(", ") if rows[-1].startswith("return ") else [
        rows[-1].split(" = ")[0]]  # fmt: skip
    read = {name: text for name, text in constants.items() if re.search(rf"\bself\.{name}\b", lines)}
    return Graph(
        tuple(read.items()), tuple(inputs.items()), tuple(rows), tuple(outputs), dynamic_batch, (),
        frozenset(defects.split()), 0,
    )  # fmt: skip
