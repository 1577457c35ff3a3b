"""Drawing many graphs and checking them, several to a compile."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Iterator

from inductor_x86q.report import Report
from tests.fuzz.check import Mismatch, check, check_together
from tests.fuzz.graphs import Graph, random_graph
from tests.fuzz.reduction import reduced

TOGETHER = 8


@dataclasses.dataclass
class Tally:
    """What was tried: graphs, the operators in them, the kernels they became, the reasons why some did not."""

    graphs: int = 0
    operators: Counter[str] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[tuple[str, Graph]] = dataclasses.field(default_factory=list)

    def add(self, drawn: list[Graph], report: Report) -> None:
        self.graphs += len(drawn)
        for graph in drawn:
            self.operators.update(set(graph.kinds))
        for fusion in report.fused:
            name = fusion.kernel.removeprefix("onednn.")
            self.kernels["+".join((name, *fusion.absorbed))] += 1
        for miss in (*report.missed, *report.kept_float):
            self.reasons[miss.reason.name] += 1

    def __str__(self) -> str:
        parts = [f"{self.graphs} graphs, {sum(self.kernels.values())} int8 calls, {len(self.failures)} failures"]
        for title, counter in (("operators", self.operators), ("kernels", self.kernels), ("left float", self.reasons)):
            parts.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counter.most_common()))
        return "\n".join(parts)


def draw(seed: int, count: int) -> list[Graph]:
    """`count` graphs, the same ones for the same seed."""
    generator = random.Random(seed)
    return [random_graph(generator) for _ in range(count)]


def run(seed: int, count: int, tally: Tally, *, generate: bool = False) -> Iterator[Tally]:
    """Checks `count` graphs of `seed`, a group at a time; failures are reduced and noted in `tally`, not raised."""
    drawn = draw(seed, count)
    for start in range(0, len(drawn), TOGETHER):
        group = drawn[start : start + TOGETHER]
        try:
            tally.add(group, check_together(group, generate=generate))
        except Mismatch:
            _one_by_one(group, tally, generate=generate)
        yield tally


def _one_by_one(group: list[Graph], tally: Tally, *, generate: bool) -> None:
    alone = 0
    for graph in group:
        try:
            tally.add([graph], check_together([graph], generate=generate))
        except Mismatch as mismatch:
            alone += 1
            tally.graphs += 1
            tally.failures.append(explained(graph, mismatch))
    if not alone:
        tally.failures.append(("a group fails whose graphs do not fail alone", group[0]))


def explained(graph: Graph, mismatch: Mismatch) -> tuple[str, Graph]:
    """The mismatch of the smallest graph found that fails in the same way, and that graph."""

    def kind(error: Mismatch) -> str:
        return hashlib.sha1("".join(c for c in str(error)[:60] if c.isalpha() or c == " ").encode()).hexdigest()

    last = mismatch

    def fails(candidate: Graph) -> bool:
        nonlocal last
        try:
            check(candidate)
        except Mismatch as error:
            if kind(error) == kind(mismatch):
                last = error
                return True
        except Exception:  # what the reduction broke is no failure
            return False
        return False

    return str(last), reduced(graph, fails)
