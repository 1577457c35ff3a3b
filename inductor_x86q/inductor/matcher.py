"""Inductor's pattern matcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "matcher.py",
    "Rules are found by Inductor's pattern matcher.",
    (
        Needs("torch._inductor.pattern_matcher", "PatternMatcherPass", parameters=("pass_name",)),
        Needs("torch._inductor.pattern_matcher", "CallFunctionVarArgs"),
        Needs("torch._inductor.pattern_matcher", "register_graph_pattern", parameters=("extra_check", "pass_dict")),
        Needs("torch._inductor.pattern_matcher", "stable_topological_sort"),
    ),
    "A pattern of one operator matching all its calls; what the check sets on a match being there for the handler.",
)


def matcher_pass(name: str) -> Any:
    """A new `PatternMatcherPass`."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    return PatternMatcherPass(pass_name=name)


def register(
    matcher: Any, targets: tuple[Any, ...], check: Callable[[Any], bool], handler: Callable[..., None]
) -> None:
    """Registers `handler` for every call of one of `targets`, whatever its arguments, that `check` accepts."""
    from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern

    register_graph_pattern(CallFunctionVarArgs(list(targets)), extra_check=check, pass_dict=matcher)(handler)


def sort_topologically(graph: fx.Graph) -> None:
    """Restores the order after rewrites that put a node before one it uses."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
