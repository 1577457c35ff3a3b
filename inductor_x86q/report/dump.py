"""What the passes did, step by step: INDUCTOR_X86Q_DEBUG=directory writes it, `x86q why` asks it of one node.

Each graph that is compiled gets a directory graph0, graph1, ... with

    00 before.txt              the graph as Inductor gives it to the passes
    01 after normalize.txt ... the graph after each stage
    why.txt                    at the end of each stage, why each rule did not match the nodes that it looks at
    passes.txt                 each stage's time, and how often each of its rules matched
    report.txt, report.json    the report
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from inductor_x86q import passes
from inductor_x86q.graph.library import STANDS_FOR
from inductor_x86q.graph.origin import layer, source
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.passes.stage import Rule, StageResult
from inductor_x86q.report import Report

VARIABLE = "INDUCTOR_X86Q_DEBUG"


@dataclasses.dataclass(frozen=True)
class Place:
    """A node's name, and the layer that it comes from, which is the same where that is not known."""

    node: str
    layer: str

    def __str__(self) -> str:
        return self.node if self.node == self.layer else f"{self.node} of {self.layer}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """Why a rule did not match a node at the end of a stage; `rule` is empty where no rule of the stage looks at it."""

    stage: str
    node: str
    operator: str
    layer: str
    rule: str
    why: str
    nodes: tuple[Place, ...] = ()  # what stood in the way, as far as the rule knows

    def __str__(self) -> str:
        return f"{self.stage}: {self.node} ({self.operator}, {self.layer}): {self.reason}"

    @property
    def reason(self) -> str:
        """Which rule did not match, why, and what stood in the way."""
        rule = f"rule {self.rule!r}: " if self.rule else ""
        nodes = ", ".join(map(str, self.nodes))
        return f"{rule}{self.why}{f' [{nodes}]' if nodes else ''}"


def answers(stage: str, nodes: Iterable[fx.Node]) -> list[Answer]:
    """Asks each rule of a stage why it does not match each of the nodes; changes nothing."""
    rules = next(s.rules for s in passes.STAGES if s.name == stage)
    found = []
    for node in nodes:
        asked = [rule for rule in rules if node.target in rule.targets]
        for rule in asked:
            found.append(_answer(stage, node, rule.name, _ask(rule, node)))
        if node.target in STANDS_FOR:
            found.append(_answer(stage, node, "generated kernel", No(passes.generate.choice(node)[1])))
        elif not asked:
            found.append(_answer(stage, node, "", No("no rule of this stage looks at this operator")))
    return found


def _ask(rule: Rule[Any], node: fx.Node) -> No:
    with fake_tensors.disable_modes():
        found = rule.ask(node)
    return found if isinstance(found, No) else No("it matches")


def _answer(stage: str, node: fx.Node, rule: str, no: No) -> Answer:
    places = tuple(Place(other.name, layer(other)) for other in no.nodes)
    return Answer(stage, node.name, str(node.target), layer(node), rule, no.why, places)


def text(graph: fx.Graph) -> str:
    """The graph, a line a node: name, type and shape, operator and arguments, layer and line of source."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if hasattr(value, "dtype") else ""
        arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        origin = f"  # {layer(node)} {source(node)}" if node.op == "call_function" else ""
        lines.append(f"{node.name}: {kind} = {node.op}[{node.target}]({arguments}){origin}")
    return "\n".join(lines) + "\n"


class Dump:
    """Writes one graph's way through the stages below `directory`; writes nothing where that is None."""

    def __init__(self, directory: Path | None, graph: fx.Graph) -> None:
        self._directory = directory
        self._count = 0
        self._why: list[Answer] = []
        self._write("00 before.txt", text(graph) if directory else "")

    @classmethod
    def from_environment(cls, graph: fx.Graph) -> Dump:
        base = os.environ.get(VARIABLE)
        if not base:
            return cls(None, graph)
        number = 0
        while True:  # another process may take the same number
            try:
                directory = Path(base) / f"graph{number}"
                directory.mkdir(parents=True)
                return cls(directory, graph)
            except FileExistsError:
                number += 1

    def after(self, stage: str, graph: fx.Graph) -> None:
        if self._directory is None:
            return
        self._count += 1
        self._write(f"{self._count:02} after {stage.replace(':', '')}.txt", text(graph))
        self._why += [a for a in answers(stage, [n for n in graph.nodes if n.op == "call_function"]) if a.rule]

    def finish(self, results: Sequence[StageResult], report: Report) -> None:
        if self._directory is None:
            return
        lines = []
        for result in results:
            lines.append(f"{result.stage}: {result.seconds * 1000:.1f} ms")
            lines += [f"  {count} × {rule}" for rule, count in result.matches.items()]
        self._write("passes.txt", "\n".join(lines) + "\n")
        self._write("why.txt", "".join(f"{answer}\n" for answer in self._why))
        self._write("report.txt", report.table() + "\n")
        self._write("report.json", report.to_json())

    def _write(self, name: str, content: str) -> None:
        if self._directory is not None:
            (self._directory / name).write_text(content)
