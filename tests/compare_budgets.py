"""The same budget of accuracy for the same network and data, by this package and by NNCF for OpenVINO.

    python -m tests.compare_budgets x86q --max-drop 0.002
    python -m tests.compare_budgets nncf --max-drop 0.002        # needs pip install openvino nncf

EfficientNet-Lite0, calibrated with 32 crops of photographs and judged by 48 others. The metric is 1 less the share of noise in
the outputs, so 0.002 is 27 dB. Prints a row of `budgets` in tools/benchmarks/budget.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from inductor_x86q.accuracy.metric import closeness
from tests.test_trained_networks import Network, photographs


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of a hundred calls, after twenty that are not counted."""
    times = []
    for _ in range(120):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times[20:]), 2)


def by_us(network: Network, max_drop: float) -> list[dict[str, Any]]:
    validate = closeness(network.model, network.test)
    started = time.perf_counter()
    graph = network.quantized(validate=validate, max_drop=max_drop)
    tuning, seconds = graph.tuning, time.perf_counter() - started
    print(tuning)
    rows = []
    x = network.calibration[0][0][:1].contiguous(memory_format=torch.channels_last)
    for mode in (None, "max-autotune"):
        torch._dynamo.reset()
        compiled = torch.compile(graph, backend="inductor_x86q", mode=mode)
        with torch.no_grad():
            compiled(x)
            taken = milliseconds(lambda compiled=compiled: compiled(x))  # type: ignore[misc]
        rows.append({
            "engine": f"x86q{f'-{mode}' if mode else ''}", "default": tuning.int8_metric, "metric": tuning.metric,
            "moved": len(tuning.moved), "evaluations": tuning.evaluations, "seconds": round(seconds), "milliseconds": taken,
        })  # fmt: skip
    return rows


def by_nncf(network: Network, max_drop: float) -> list[dict[str, Any]]:
    import nncf
    import openvino

    samples = [x[None].contiguous().numpy() for (batch,) in network.calibration for x in batch]
    inputs = [x[None].contiguous() for (batch,) in network.test for x in batch]
    with torch.no_grad():
        pairs = [(x.numpy(), network.model(x).numpy()) for x in inputs]
    evaluations = 0

    def validate(compiled: Any, items: Any) -> tuple[float, None]:
        nonlocal evaluations
        evaluations += 1
        noise = signal = 0.0
        for x, y in items:
            noise += float(((compiled(x)[0].astype("f8") - y) ** 2).sum())
            signal += float((y.astype("f8") ** 2).sum())
        return 1 - noise / signal, None

    model = openvino.convert_model(network.model, example_input=inputs[0], input=[-1, *inputs[0].shape[1:]])
    calibration, validation = nncf.Dataset(samples), nncf.Dataset(pairs, lambda pair: pair)
    started = time.perf_counter()
    quantized = nncf.quantize_with_accuracy_control(model, calibration, validation, validate, max_drop=max_drop)
    seconds, asked = time.perf_counter() - started, evaluations
    core = openvino.Core()
    default, compiled = (
        core.compile_model(x, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        for x in (nncf.quantize(model, calibration), quantized)
    )
    products = [x for x in quantized.get_ops() if x.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")]
    moved = [x for x in products if x.input_value(0).get_node().get_type_name() != "FakeQuantize"]
    return [{
        "engine": "openvino-int8", "default": validate(default, pairs)[0], "metric": validate(compiled, pairs)[0],
        "moved": len(moved), "evaluations": asked, "seconds": round(seconds),
        "milliseconds": milliseconds(lambda: compiled(samples[0])),
    }]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["x86q", "nncf"])
    parser.add_argument("--max-drop", type=float, default=0.002)
    parsed = parser.parse_args()
    network = photographs()
    network = Network(network.model, network.calibration, network.test[:3], network.answers)
    for row in (by_us if parsed.engine == "x86q" else by_nncf)(network, parsed.max_drop):
        print(json.dumps({"network": "EfficientNet-Lite0", "max_drop": parsed.max_drop, **row}))
