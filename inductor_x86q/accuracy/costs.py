"""What each layer costs: its multiply-accumulates, and its time in a compiled graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q import inspection, progress
from inductor_x86q.accuracy import drift
from inductor_x86q.graph.macs import count
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.quantization.config import module_stack
from inductor_x86q.report.model import Fusion, Miss

log = logging.getLogger(__name__)


def macs(quantized: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, int]:
    """The multiply-accumulates of each layer that a configuration can name."""
    counting = _Counting(quantized)
    with torch.no_grad():
        counting.run(*inputs)
    return counting.macs


class _Counting(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.macs: dict[str, int] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        name = layer_of(node)
        if drift.is_layer(node) and any(path == name for path, _ in module_stack(node)):
            # By the sizes at hand, some of which the graph leaves open.
            here = count(node, lambda other: (value if other is node else self.env[other]).shape)
            self.macs[name] = self.macs.get(name, 0) + (here or 0)
        return value


def microseconds(
    quantized: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[dict[str, float], float]:
    """The time of each layer by its name, and that of all kernels; empty where the graph cannot be compiled here."""
    try:
        with progress.task("timing layers"):
            report = inspection.explain(quantized, inputs, kwargs=kwargs, timing=True)
    except Exception as error:  # no compiler, or whatever else torch.compile raises: the search can do without
        log.warning("layers are not timed: %s: %s", type(error).__name__, str(error).strip().partition("\n")[0])
        return {}, 0.0
    found: dict[str, float] = {}
    items: list[Fusion | Miss] = [*report.fused, *report.missed, *report.kept_float]
    for item in items:
        if item.microseconds is not None:
            found[item.layer] = found.get(item.layer, 0.0) + item.microseconds
    return found, report.microseconds or 0.0
