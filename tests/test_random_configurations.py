"""Random networks with random configurations: each layer is what it was said to be, and the numbers are the graph's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx

import inductor_x86q
from inductor_x86q import QuantizationError, inspection, testing
from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.origin import layer
from inductor_x86q.tools import zoo
from tests.fuzz import configurations

MODES = {qdq.DEQUANTIZE: "static", qdq.DEQUANTIZE_TENSOR: "per_tensor", qdq.DEQUANTIZE_TOKEN: "per_token"}


def how(graph: fx.GraphModule) -> dict[str, str]:
    found = {}
    for node in graph.graph.nodes:
        if operators.role(node) in (operators.Role.CONVOLUTION, operators.Role.LINEAR):
            activation, weight = operators.factors(node)
            tensor = qdq.constant(weight)
            narrow = tensor is not None and tensor.dtype == torch.bfloat16
            found[layer(node)] = MODES.get(activation.target, "bfloat16" if narrow else "float")
    return found


def check(seed: int) -> bool:
    """Whether there was anything to quantize."""
    case = configurations.draw(seed)
    x, calibration = torch.randn(4, 3, 8, 8), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    try:
        graph = inductor_x86q.quantize(case.model, (x,), calibration=calibration, config=case.config)
    except QuantizationError as error:
        assert "nothing to quantize" in str(error) and set(case.modes.values()) <= {"bfloat16", "float"}, case
        return False
    assert how(graph) == case.modes, case
    with torch.no_grad():
        expected, exact = graph(x), case.model(x)
    outputs, report = inspection.run_fused(graph, (x,))
    assert not report.missed, (report.missed_text(), str(case))
    in_int8 = {name for name, mode in case.modes.items() if mode not in ("bfloat16", "float")}
    assert {fusion.layer for fusion in report.fused} == in_int8, case
    assert testing.snr(outputs, expected) > min(40, zoo.rounding_floor(graph, (x,)) - 6), case
    assert testing.snr(expected, exact) > 15, case
    return True


@pytest.mark.parametrize("first", range(0, 20, 10))
def test_random_configurations(first: int) -> None:
    assert sum(check(seed) for seed in range(first, first + 10)) >= 6


def test_every_mode_meets_every_other() -> None:
    """Among these seeds, which take no time to draw."""
    pairs = set()
    for seed in range(40):
        modes = list(configurations.draw(seed).modes.values())
        pairs |= set(itertools.pairwise(modes))
    assert len(pairs) >= 20 and {mode for pair in pairs for mode in pair} == {*MODES.values(), "bfloat16", "float"}
