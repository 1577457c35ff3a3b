"""What is known of values when compiling: fake tensors, sizes, registered operators, constants."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "fake_tensors.py",
    "Fake values of new nodes, questions about sizes, operators that are registered on import, constants.",
    (
        Needs("torch.ao.quantization.fx._decomposed"),
        Needs("torch._inductor.inductor_prims"),
        Needs("torch._inductor.virtualized", "V.fake_mode"),
        Needs("torch._subclasses", "FakeTensorMode", parameters=("allow_non_fake_inputs",)),
        Needs("torch.fx.experimental.symbolic_shapes", "statically_known_true"),
        Needs("torch.fx.experimental.symbolic_shapes", "guard_or_false"),
        Needs("torch.utils._python_dispatch", "_disable_current_modes"),
        Needs("torch._inductor.freezing_utils", "maybe_set_is_frozen_param"),
    ),
    "`V.fake_mode` being set while Inductor compiles; fake tensors carrying their mode; `statically_known_true` never adding a "
    "guard; a constant's mark being an attribute of it, set within freezing alone.",
)


@functools.cache
def register_quantized_decomposed() -> None:
    """Registers torch.ops.quantized_decomposed; relies on that library being a side effect of this import."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


@functools.cache
def register_primitives() -> None:
    """Registers Inductor's own operators in torch.ops.prims; relies on that being a side effect of this import."""
    import torch._inductor.inductor_prims  # noqa: F401


def propagate_fake_tensors(node: fx.Node) -> None:
    """Sets `meta["val"]` of one new node from its arguments' (relies on fake tensors carrying their mode)."""
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target), f"{node} calls no operator"
    with fake_mode(node.graph):
        node.meta["val"] = node.target(*values[0], **values[1])


def fake_mode(graph: fx.Graph) -> Any:
    """The FakeTensorMode of a graph that Inductor is compiling (relies on `V.fake_mode` being set by compile_fx)."""
    from torch._inductor.virtualized import V

    if isinstance(V.fake_mode, torch._subclasses.FakeTensorMode):
        return V.fake_mode
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds for all sizes that the graph is compiled for; false where it depends.

    Asking by `if` instead would answer for the example at hand and fix the sizes to that answer. Relies on
    `statically_known_true`, which never adds a guard.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def guarded(condition: Any) -> bool:
    """Whether a comparison of sizes holds for the example at hand, which then becomes a guard of the compiled code.

    False where the size has no example. Relies on `guard_or_false`.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def example(size: Any, otherwise: int) -> int:
    """A size, or that of the example at hand where it is open, without a guard; `otherwise` where there is no example."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else otherwise


def same_shape(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    left, right = list(first), list(second)
    return len(left) == len(right) and all(known(a == b) for a, b in zip(left, right, strict=True))


def disable_modes() -> contextlib.AbstractContextManager[Any]:
    """Runs real tensors inside a pass, where fake and functional modes are active (as Inductor's constant folding)."""
    return torch.utils._python_dispatch._disable_current_modes()


def mark_frozen(tensor: torch.Tensor) -> None:
    """Marks a constant as one that freezing made.

    The graph cache then takes it from the graph at hand, as it does the weights, instead of storing and hashing it
    element by element. Relies on `freezing_utils` keeping the mark as an attribute, and on passes running within
    freezing, where alone it sets it.
    """
    from torch._inductor.freezing_utils import maybe_set_is_frozen_param

    maybe_set_is_frozen_param(tensor)
