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
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from inductor_x86q import _torch, qgraph


@dataclasses.dataclass(frozen=True)
class No:
    """Why a rule does not match; false in a condition."""

    why: str

    def __bool__(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a stage.

    `targets` are the operators that it is anchored at; `find` takes the anchor and gives its findings or a `No`;
    `rewrite` takes both. It runs with the graph's insertion point in front of the anchor, and gives the node that
    replaces it (what nobody uses any more is erased), or None where it changed the graph by itself.
    """

    name: str
    targets: tuple[Any, ...]
    find: Callable[[fx.Node], Any]
    rewrite: Callable[[fx.Node, Any], fx.Node | None]


class Stage:
    """An ordered set of rules, applied until none matches, with what holds afterwards.

    `before` and `after` are the stage's contract in words; `check` raises AssertionError where `after` does not hold,
    and runs between stages when the environment variable INDUCTOR_X86Q_VERIFY is set.
    """

    def __init__(
        self,
        name: str,
        rules: Sequence[Rule],
        *,
        before: str,
        after: str,
        check: Callable[[fx.Graph], None] = lambda graph: None,
    ) -> None:
        self.name, self.before, self.after, self.check = name, before, after, check
        self.rules: list[Rule] = []
        self._matches: Counter[str] = Counter()
        self._matcher = _torch.matcher_pass(f"inductor_x86q.{name}")
        for rule in rules:
            self.add(rule)

    def add(self, rule: Rule) -> None:
        """Appends a rule; rules anchored at the same operator are tried in this order."""
        self.rules.append(rule)

        def matches(match: Any) -> bool:
            match.found = rule.find(match.output_node())
            return not isinstance(match.found, No) and match.found is not None

        def handler(match: Any, *args: Any, **kwargs: Any) -> None:
            self._matches[rule.name] += 1
            node = match.output_node()
            with node.graph.inserting_before(node):
                new = rule.rewrite(node, match.found)
            if new is not None:
                node.replace_all_uses_with(new)
                qgraph.erase_dead(node)

        _torch.register(self._matcher, rule.targets, matches, handler)

    def remove(self, rule: Rule) -> None:
        """Takes a rule out again; raises ValueError where the stage does not have it."""
        rules = [*self.rules]
        rules.remove(rule)
        self.rules = []
        self._matcher = _torch.matcher_pass(f"inductor_x86q.{self.name}")
        for remaining in rules:
            self.add(remaining)

    def apply(self, graph: fx.Graph) -> StageResult:
        """Applies the rules until none matches any more; returns how often each did and how long it took."""
        started = time.perf_counter()
        self._matches = Counter()
        rounds = 0
        while self._matcher.apply(graph):
            _torch.sort_topologically(graph)
            rounds += 1
            if rounds > 1000:
                raise AssertionError(f"stage {self.name} does not end; its last matches: {dict(self._matches)}")
        graph.eliminate_dead_code()
        return StageResult(self.name, Counter(self._matches), time.perf_counter() - started)


@dataclasses.dataclass(frozen=True)
class StageResult:
    """How often each rule of a stage matched, and the stage's seconds."""

    stage: str
    matches: Counter[str]
    seconds: float
