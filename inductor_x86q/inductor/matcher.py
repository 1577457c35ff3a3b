"""Inductor's pattern matcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def matcher_pass(name: str) -> Any:
    """A new `PatternMatcherPass`; the keyword is the same in all supported versions."""
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
