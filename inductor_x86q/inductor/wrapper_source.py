"""The source that Inductor generates, and which nodes each of its buffers stands for."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import fx

from inductor_x86q.inductor.caches import graph_caches_off
from inductor_x86q.inductor.patches.generated_source import source_goes_to
from inductor_x86q.inductor.patches.scopes import SOURCE
from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "wrapper_source.py",
    "Which nodes of the graph each buffer of generated code stands for.",
    (
        Needs("torch._inductor.virtualized", "V.graph"),
        Needs("torch._inductor.scheduler", "BaseSchedulerNode.get_nodes"),
        Needs("torch._inductor.scheduler", "BaseSchedulerNode.get_buffer_names"),
        Needs("torch._inductor.scheduler", "BaseSchedulerNode.is_extern"),
        Needs("torch._inductor.scheduler", "BaseSchedulerNode.is_template"),
    ),
    "`V.graph.scheduler.nodes` being the fused nodes, each with its nodes, their IR and its `origins`.",
)


@dataclasses.dataclass(frozen=True)
class Generated:
    """The source of one wrapper, and for each of its buffers the nodes of the graph that the buffer stands for."""

    code: str
    origins: dict[str, list[fx.Node]]


@contextlib.contextmanager
def generated_code() -> Iterator[list[Generated]]:
    """Collects every wrapper that Inductor generates in this context, for this thread's compiles.

    Caches are bypassed, since a cache hit generates nothing.
    """
    found: list[Generated] = []

    def save(code: str) -> None:
        found.append(Generated(code, _buffer_origins()))

    with graph_caches_off(), source_goes_to(save):
        yield found


def _buffer_origins() -> dict[str, list[fx.Node]]:
    from torch._inductor.virtualized import V

    scheduled = {fused: fused.get_nodes() for fused in V.graph.scheduler.nodes}
    called = {origin for nodes in scheduled.values() for node in nodes if _is_call(node) for origin in _origins(node)}
    found: dict[str, list[fx.Node]] = {}
    for fused, nodes in scheduled.items():
        origins = dict.fromkeys(origin for node in nodes for origin in _origins(node, called))
        for name in fused.get_buffer_names():
            found[name] = list(origins)
    return found


def _is_call(scheduled: Any) -> bool:
    return bool(scheduled.is_extern() or scheduled.is_template())


def _origins(scheduled: Any, called: Collection[fx.Node] = ()) -> Iterable[fx.Node]:
    """What a scheduled node computes.

    The origins of an operator's call also name its operands, and those of an operand the operator that asked for it in
    memory; both are left out.
    """
    origins = list(getattr(scheduled.node, "origins", None) or ())
    if not _is_call(scheduled):
        return [node for node in origins if node not in called] or origins
    operands = {operand for node in origins for operand in node.all_input_nodes}
    return [node for node in origins if node not in operands]


class _Enough(BaseException):
    """Unwinds Inductor once the source is there; no Exception, so that nothing on the way takes it for a failure."""


@contextlib.contextmanager
def until_source() -> Iterator[None]:
    """Leaves this context, inside of `generated_code`, once Inductor has the source of a graph."""
    collect = SOURCE.value
    assert collect is not None, "until_source is entered outside of generated_code"

    def save(code: str) -> None:
        collect(code)
        raise _Enough

    with contextlib.suppress(_Enough), source_goes_to(save):
        yield
