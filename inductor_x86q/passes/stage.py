"""What a stage is made of: rules, each a row that names what it looks at, what it looks for and what it does.

A rule is registered with torch's pattern matcher by the operators it is anchored at. `find` inspects the anchor and
answers with its findings, or with a `No` that says what stood in the way; `rewrite` acts on the findings: it makes what
is to stand in the anchor's place, which the stage then puts there. The two are apart so that the reason why a rule did
not match can be asked for without changing the graph.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import matcher

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Rule(Generic[Found]):
    """One row of a stage.

    `targets` are the operators that it is anchored at; `find` takes the anchor and gives its findings, whatever their
    type is, or a `No`; `rewrite` takes both. It runs with the graph's insertion point in front of the anchor, and gives the node that
    replaces it (what nobody uses any more is erased), or None where it changed the graph by itself.
    """

    name: str
    targets: tuple[Any, ...]
    find: Callable[[fx.Node], Found | No]
    rewrite: Callable[[fx.Node, Found], fx.Node | None]

    def ask(self, node: fx.Node) -> Found | No:
        """What `find` says of the node; a TypeError where it says nothing."""
        found = self.find(node)
        if found is None:
            raise TypeError(f'find of rule {self.name!r} gave None for {node}: expected its findings, or No("why not")')
        return found

    def register(self, patterns: Any, counts: Counter[str]) -> None:
        """Makes `patterns` apply the rule, and count in `counts` how often it did."""

        def matches(match: Any) -> bool:
            match.found = self.ask(match.output_node())
            return not isinstance(match.found, No)

        def handler(match: Any, *args: Any, **kwargs: Any) -> None:
            counts[self.name] += 1
            node = match.output_node()
            with node.graph.inserting_before(node):
                new = self.rewrite(node, match.found)
            if new is not None:
                node.replace_all_uses_with(new)
                qdq.erase_dead(node)

        matcher.register(patterns, self.targets, matches, handler)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Rules that are applied until none matches, those of one operator in their order; `after` says what holds then."""

    name: str
    rules: list[Rule[Any]]
    after: str

    def apply(self, graph: fx.Graph) -> StageResult:
        """Applies the rules until none matches any more; returns how often each did and how long it took."""
        started = time.perf_counter()
        counts: Counter[str] = Counter()
        patterns = matcher.matcher_pass(f"inductor_x86q.{self.name}")
        for rule in self.rules:
            rule.register(patterns, counts)
        rounds = 0
        while patterns.apply(graph):
            matcher.sort_topologically(graph)
            rounds += 1
            if rounds > 1000:
                raise AssertionError(f"stage {self.name} does not end; its last matches: {dict(counts)}")
        graph.eliminate_dead_code()
        return StageResult(self.name, counts, time.perf_counter() - started)

    def check(self, graph: fx.Graph) -> None:
        """Raises AssertionError where the graph is no legal one or a rule still matches.

        Runs between stages when the environment variable INDUCTOR_X86Q_VERIFY is set.
        """
        graph.lint()
        for node in graph.nodes:
            for rule in self.rules:
                matches = node.target in rule.targets and not isinstance(rule.ask(node), No)
                assert not matches, f"{node}: {rule.name} matches after {self.name}"


@dataclasses.dataclass(frozen=True)
class StageResult:
    """How often each rule of a stage matched, and the stage's seconds."""

    stage: str
    matches: Counter[str]
    seconds: float
