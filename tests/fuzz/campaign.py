"""Drawing many graphs and checking them, several to a compile."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from inductor_x86q.report import Report
from tests.fuzz.check import Mismatch, Unexplained, check_together, own_kernels_of
from tests.fuzz.drawing import random_graph
from tests.fuzz.graphs import Graph
from tests.fuzz.reduction import reduced

TOGETHER = 8


@dataclasses.dataclass
class Tally:
    """What was tried: graphs, the operators in them, the kernels they became, the reasons why some did not."""

    graphs: int = 0
    compiled: int = 0  # of them through generated and compiled C++, the others' fused graphs are run as they are
    # In how many graphs: each kind of operator, each operator that reads what another computed, with or without q/dq.
    operators: Counter[str] = dataclasses.field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    own_kernels: int = 0  # layers computed by a kernel of ours
    unexplained: int = 0  # graphs with a layer that stays float for no reason that was put in on purpose
    failures: list[tuple[str, Graph]] = dataclasses.field(default_factory=list)

    def add(self, report: Report) -> None:
        self.own_kernels += own_kernels_of(report)
        for fusion in report.fused:
            name = fusion.kernel.removeprefix("onednn.")
            self.kernels["+".join((name, *fusion.absorbed))] += 1
        for miss in (*report.missed, *report.kept_float):
            self.reasons[miss.reason.name] += 1

    def count(self, drawn: list[Graph], *, generate: bool) -> None:
        self.graphs += len(drawn)
        self.compiled += len(drawn) if generate else 0
        for graph in drawn:
            self.operators.update(set(graph.kinds))
            self.pairs.update(graph.pairs())

    def record(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        misses = sum(self.reasons.values())
        return {
            "graphs": self.graphs,
            "compiled": self.compiled,
            "int8_calls": sum(self.kernels.values()),
            "own_kernels": self.own_kernels,
            "mismatches": len(self.failures) - self.unexplained,
            "misses": misses + self.unexplained,
            "misses_explained_percent": round(100 * misses / max(misses + self.unexplained, 1), 2),
            "kinds_of_operators": len(self.operators),
            "pairs_of_operators": len(self.pairs),
            "operators": dict(self.operators.most_common()),
            "pairs": {" > ".join(pair): count for pair, count in self.pairs.most_common()},
            "kernels": dict(self.kernels.most_common()),
            "left_float": dict(self.reasons.most_common()),
        }

    def __str__(self) -> str:
        record = self.record()
        lines = ["{graphs} graphs, {compiled} of them compiled to C++: {int8_calls} int8 calls, {own_kernels} of them as kernels "
                 "of ours, {mismatches} mismatches, {misses} layers left float, {misses_explained_percent} % of them explained".format(**record),
                 "{kinds_of_operators} kinds of operators, {pairs_of_operators} pairs of operators".format(**record)]  # fmt: skip
        for title in ("operators", "pairs", "kernels", "left_float"):
            counts = list(record[title].items())
            more = f", and {len(counts) - 60} more" if len(counts) > 60 else ""
            shown = ", ".join(f"{name} {count}" for name, count in counts[:60])
            lines.append(f"{title.replace('_', ' ')}: {shown}{more}")
        return "\n".join(lines)


def draw(seed: int, count: int, having: str = "") -> list[Graph]:
    """`count` graphs, the same ones for the same seed; only such that have a kind of operator with that in its name."""
    generator = random.Random(seed)
    drawn = (random_graph(generator) for _ in itertools.count())
    fitting = (graph for graph in drawn if not having or any(re.search(having, kind) for kind in graph.kinds))
    return list(itertools.islice(fitting, count))


def run(
    seed: int, count: int, tally: Tally, *, compile_every: int = 0, mode: str | None = None, having: str = ""
) -> Iterator[Tally]:
    """Checks `count` graphs of `seed`, a group at a time; failures are reduced and noted in `tally`, not raised.

    The first of every `compile_every` groups is compiled to C++ too, in `mode`; none where that is 0.
    """
    drawn = draw(seed, count, having)
    for number, start in enumerate(range(0, len(drawn), TOGETHER)):
        group = drawn[start : start + TOGETHER]
        generate = bool(compile_every) and number % compile_every == 0
        tally.count(group, generate=generate)
        try:
            tally.add(check_together(group, generate=generate, mode=mode))
        except Mismatch as mismatch:
            _one_by_one(group, tally, mismatch, generate=generate, mode=mode)
        yield tally


def _one_by_one(group: list[Graph], tally: Tally, together: Mismatch, *, generate: bool, mode: str | None) -> None:
    alone = 0
    for graph in group:
        try:
            tally.add(check_together([graph], generate=generate, mode=mode))
        except Mismatch as mismatch:
            alone += 1
            tally.unexplained += isinstance(mismatch, Unexplained)
            tally.failures.append(explained(graph, mismatch, generate=generate, mode=mode))
    if not alone:
        tally.failures.append((f"a group fails whose graphs do not fail alone: {together}", group[0]))


def explained(
    graph: Graph, mismatch: Mismatch, *, generate: bool = False, mode: str | None = None
) -> tuple[str, Graph]:
    """The mismatch of the smallest graph found that fails in the same way, and that graph."""

    def kind(error: Mismatch) -> str:
        return hashlib.sha1("".join(c for c in str(error)[:60] if c.isalpha() or c == " ").encode()).hexdigest()

    last = mismatch

    def fails(candidate: Graph) -> bool:
        nonlocal last
        try:
            check_together([candidate], generate=generate, mode=mode)
        except Mismatch as error:
            if kind(error) == kind(mismatch):
                last = error
                return True
        except Exception:  # what the reduction broke is no failure
            return False
        return False

    # A compile takes seconds.
    return str(last), reduced(graph, fails, most_tries=12 if generate else 60)
