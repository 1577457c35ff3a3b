"""Which attention stays float: what int8 would make of its result, measured on calibration data, or on the example."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.attention import SPELLINGS, attention
from inductor_x86q.graph.operators import Role
from inductor_x86q.graph.origin import layer
from inductor_x86q.quantization import rows
from inductor_x86q.quantization.attention import by_rows
from inductor_x86q.quantization.corrections.prepared import fake_quantize, observer_of

# What int8 may make of an attention's result, as signal-to-noise ratio in dB; below it, it stays float unless asked for.
LEAST_RATIO = 20.0
MOVING = frozenset({Role.VIEW, Role.MOVEMENT, Role.SPLIT, Role.ITEM})
NOTES = "x86q_notes"  # in a quantized graph's `meta`: lines that its reports repeat


def keep_float(prepared: fx.GraphModule, calls: Iterable[tuple[Any, ...]]) -> list[str]:
    """Takes the observers away from each attention that int8 would distort, and says which and how much."""
    measured = _Drift(prepared)
    with torch.no_grad():
        for call in calls:
            measured.run(*call)
    notes = []
    for node, (signal, noise) in measured.energies.items():
        ratio = 10 * math.log10(signal / noise) if signal and noise else math.inf
        if ratio < LEAST_RATIO:
            notes.append(
                f"attention of {layer(node)} stays float: int8 would leave {ratio:.1f} dB of signal to noise on the "
                f'data given, less than {LEAST_RATIO:.0f}; attention="int8" has it all the same'
            )
            node.meta.pop(rows.BITS, None)
            for operand in dict.fromkeys(node.all_input_nodes[:3]):
                if observer_of(prepared, operand):
                    node.replace_input_with(operand, qdq.operand(operand))
    if notes:
        _drop_useless_observers(prepared)
    return notes


class _Drift(fx.Interpreter):
    """Runs a calibrated graph in float, observing nothing, and each attention with observed operands in int8 beside it."""

    def __init__(self, prepared: fx.GraphModule) -> None:
        super().__init__(prepared)
        self.graph_module = prepared
        self.energies: dict[fx.Node, tuple[float, float]] = {}  # of the result, and of what int8 changes in it

    def run_node(self, node: fx.Node) -> Any:
        if observer_of(self.graph_module, node):
            return self.env[qdq.operand(node)]
        result = super().run_node(node)
        if node.target in SPELLINGS and (rows.BITS in node.meta or self._is_observed(node)):
            signal, noise = self.energies.get(node, (0.0, 0.0))
            difference = result - self._rounded(node)
            self.energies[node] = signal + _energy(result), noise + _energy(difference)
        return result

    def _is_observed(self, node: fx.Node) -> bool:
        return all(observer_of(self.graph_module, x) for x in node.args[:3])

    def _rounded(self, node: fx.Node) -> torch.Tensor:
        operands: Any = node.args[:3]
        if bits := node.meta.get(rows.BITS):
            reals = by_rows(rows.fake_quantized, map(self.env.__getitem__, operands), bits)
        else:
            reals = [fake_quantize(observer_of(self.graph_module, x), self.env[x]) for x in operands]
        arguments: Any = fx.map_arg(qdq.schema_arguments(node), self.env.__getitem__)
        mask, is_causal, scale = (arguments[name] for name in ("attn_mask", "is_causal", "scale"))
        return attention(reals[0], reals[1], reals[2], mask, is_causal, scale)


def _energy(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def _drop_useless_observers(prepared: fx.GraphModule) -> None:
    """Takes out the observers of values that, moved or not, only float attention reads: nothing would compute with the bytes."""
    useless: set[fx.Node] = set()  # what needs no bytes of what it reads
    for node in reversed(prepared.graph.nodes):
        is_float = node.target in SPELLINGS and not any(observer_of(prepared, x) for x in node.args[:3])
        passes_on = operators.role(node) in MOVING or observer_of(prepared, node)
        if is_float or (passes_on and all(user in useless for user in node.users)):
            useless.add(node)
    for node in useless:
        if observer_of(prepared, node):
            node.replace_all_uses_with(qdq.operand(node))
            prepared.graph.erase_node(node)
    prepared.recompile()
