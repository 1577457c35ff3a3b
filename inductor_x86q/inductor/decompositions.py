"""What Inductor decomposes operators into before the passes see a graph, and what it leaves to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.fake_tensors import register_quantized_decomposed
from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "decompositions.py",
    "The table that Inductor decomposes by, and tracing one decomposition.",
    (
        Needs("torch._inductor.decomposition", "select_decomp_table"),
        Needs("torch.fx.experimental.proxy_tensor", "make_fx", parameters=("decomposition_table",)),
    ),
    "`select_decomp_table` giving the table that a compile would use; `meta['val']` of a node being its fake value.",
)

aten = torch.ops.aten

# Activations that Inductor decomposes before freezing, where the passes want to see one node. What no pass
# consumed is decomposed afterwards (`decompose_node`), by the very same table.
KEPT_WHOLE: tuple[Any, ...] = (
    aten.clamp.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.leaky_relu.default,
)


def _choose_qparams(x: torch.Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype) -> Any:
    """The operator's own arithmetic. Inductor's decomposition forgets that the range has to include 0."""
    low, high = torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / float(quant_max - quant_min)).to(torch.float32).clamp(min=eps)
    zero_point = (quant_min - torch.round(low / scale).to(torch.int32)).clamp(quant_min, quant_max)
    return scale.to(torch.float64).reshape(1), zero_point.to(torch.int64).reshape(1)


def _choose_qparams_symmetric(x: torch.Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype) -> Any:
    """The same with the zero point in the middle; Inductor has no decomposition of it."""
    low, high = torch.aminmax(x)
    largest = torch.maximum(-low, high).clamp(min=0)
    scale = (largest / (float(quant_max - quant_min) / 2)).to(torch.float32).clamp(min=eps)
    zero_point = torch.full((1,), 128 if dtype == torch.uint8 else 0, dtype=torch.int64)
    return scale.to(torch.float64).reshape(1), zero_point


def _batch_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, mean: torch.Tensor,
                variance: torch.Tensor, momentum: float, eps: float) -> Any:  # fmt: skip
    """x·factor + shift, as the eager kernel computes it: two constants for each channel where Inductor keeps four."""
    factor = torch.rsqrt(variance.float() + eps)
    if weight is not None:
        factor = factor * weight
    shift = -mean * factor
    if bias is not None:
        shift = shift + bias
    channels = [-1] + [1] * (x.dim() - 2)
    result = x.float() * factor.float().view(channels) + shift.float().view(channels)
    return result.to(x.dtype), x.new_empty(0), x.new_empty(0)


class _Table(dict[Any, Callable[..., Any]]):
    """A decomposition table that is pickled by what makes it: it is part of the key under which Inductor caches a graph."""

    def __reduce__(self) -> tuple[Any, ...]:
        return decompositions, ()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decomposition table without KEPT_WHOLE, with the operators that choose scales corrected."""
    from torch._inductor.decomposition import select_decomp_table

    table = _Table(select_decomp_table())
    for target in KEPT_WHOLE:
        table.pop(target, None)
    register_quantized_decomposed()
    table[aten._native_batch_norm_legit_no_training.default] = _batch_norm
    table[torch.ops.quantized_decomposed.choose_qparams.tensor] = _choose_qparams
    table[torch.ops.quantized_decomposed.choose_qparams_symmetric.tensor] = _choose_qparams_symmetric
    return table


def decompose_node(graph_module: fx.GraphModule, node: fx.Node, written_out: Mapping[Any, Callable[..., Any]]) -> None:
    """Replaces `node` by what Inductor decomposes it into, or, if it is in `written_out`, by what is said there."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    table = {**select_decomp_table(), **written_out}
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]

    def call(*values: torch.Tensor) -> torch.Tensor:
        pending = iter(values)
        arguments = [next(pending) if isinstance(a, fx.Node) else a for a in node.args]
        assert callable(node.target), f"{node} calls no operator"
        return node.target(*arguments, **node.kwargs)

    fakes = [t.meta["val"] for t in tensors]
    with fakes[0].fake_mode:
        traced = make_fx(call, decomposition_table=table)(*fakes)
    environment: dict[fx.Node, fx.Node] = {}
    for inner, outer in zip(traced.graph.find_nodes(op="placeholder"), tensors, strict=True):
        environment[inner] = outer
    with node.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                node.replace_all_uses_with(environment[inner.args[0]])
                continue
            copy = node.graph.node_copy(inner, lambda n: environment[n])
            for key in ("nn_module_stack", "stack_trace"):
                if key in node.meta:
                    copy.meta[key] = node.meta[key]
            environment[inner] = copy
    node.graph.erase_node(node)
