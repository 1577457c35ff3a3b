"""A budget of accuracy: as much in int8 as the user's own metric allows."""

from __future__ import annotations

import inspect
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from inductor_x86q import cpu, progress
from inductor_x86q.accuracy import costs, drift
from inductor_x86q.accuracy.metric import Metric, closeness
from inductor_x86q.errors import BudgetError, NothingToQuantizeError, QuantizationError
from inductor_x86q.graph.quantized_graph import QuantizedGraph
from inductor_x86q.quantization import corrections, pt2e
from inductor_x86q.quantization.arguments import positional
from inductor_x86q.quantization.config import by_selector
from inductor_x86q.quantization.data import Calls
from inductor_x86q.report.model import Drift, Moved, Step, Tuning

_TYPES = {"bfloat16": "bfloat16", "float": "float32"}  # by the mode that a configuration names


def quantize(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    validate: Callable[[torch.nn.Module], float] | None = None,
    max_drop: float | None = None,
    **options: Any,
) -> QuantizedGraph:
    """Quantizes a model to int8 with torchao's PT2E steps and X86Quantizer, within a budget where there is one.

    With a budget, first every layer is quantized; if that loses too much, `accuracy="best"` is tried (where `accuracy`
    is not given), then layers move to bfloat16 where this CPU has it, and to float32 where that is not enough: those
    first that do most harm for the time that moving them costs, for which two graphs are compiled and timed. The
    result's `tuning` says which moved, why, what each costs, and what the metric is. Interrupted (Ctrl-C), it returns
    the best of what it has found within the budget.

    Args:
        validate: the metric of a module, higher is better. None: 1 less the noise's share of the outputs' energy, on the
            calibration data, by which a `max_drop` of 0.01 is a signal-to-noise ratio of 20 dB.
        max_drop: how much less than that of the float model the metric may be.
        **options: as of `inductor_x86q.quantization.pt2e.quantize`.

    Raises:
        QuantizationError: as without a budget; or the metric fails or is no number.
        BudgetError: no choice of layers is within the budget.

    Example:
        >>> q = inductor_x86q.quantize(model, (x,), calibration=batches, exclude=["10"])
        >>> q(x).shape
        torch.Size([4, 4])
        >>> inductor_x86q.explain(q, (x,)).kept_float[0].layer
        '10'
    """
    if max_drop is None:
        if validate is not None:
            raise QuantizationError("validate is given without max_drop: say how much of the metric may be lost")
        return pt2e.quantize(model, example_inputs, **options)
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)) or not 0 <= max_drop < math.inf:
        raise QuantizationError(f"max_drop is {max_drop!r}: expected a number, at least 0")
    if validate is not None and not callable(validate):
        raise QuantizationError(f"validate is a {type(validate).__name__}: expected a function of a module")
    with progress.task("tuning"):
        return _Search(model, example_inputs, validate, float(max_drop), options).run()


# For help() and editors: every argument by its name.
_parameters = inspect.signature(quantize).parameters
quantize.__signature__ = inspect.signature(pt2e.quantize).replace(  # type: ignore[attr-defined]
    parameters=[
        *inspect.signature(pt2e.quantize).parameters.values(),
        *(_parameters[name] for name in ("validate", "max_drop")),
    ]
)
if quantize.__doc__ and pt2e.quantize.__doc__:  # python -OO has none
    _explained = re.search(r"Args:\n.*?\n(?=\n +Raises:)", pt2e.quantize.__doc__, re.DOTALL)
    assert _explained is not None
    quantize.__doc__ = re.sub(r" +\*\*options:.*\n", "", quantize.__doc__).replace("Args:\n", _explained[0])


class _Search:
    """One search: what was tried, and the best of it that is within the budget."""

    def __init__(
        self, model: torch.nn.Module, inputs: tuple[Any, ...], validate: Any, max_drop: float, options: dict[str, Any]
    ) -> None:
        self.model, self.inputs, self.max_drop = model, inputs, max_drop
        self.kwargs = options.get("kwargs")
        self.options = dict(options)
        calibration = options.get("calibration")
        if isinstance(calibration, Iterable) and not isinstance(calibration, (list, tuple)):
            # Read at every attempt.
            self.options["calibration"] = list(self._calls(calibration))
            for name in ("transform", "max_batches"):  # by which the list is made already
                self.options.pop(name, None)
        data = self.options.get("calibration") or [self.kwargs or inputs]
        self.metric = Metric(validate or closeness(model, self._calls(data)))
        self.modes = ("bfloat16", "float") if cpu.has_bf16() else ("float",)
        self.corrected: tuple[str, ...] = ()
        self.drifts: dict[QuantizedGraph, Drift] = {}
        self.steps: list[tuple[str, float, dict[str, str]]] = []
        self.found: tuple[QuantizedGraph, float, dict[str, str]] | None = None  # within the budget, fewest moved
        self.rows: list[tuple[str, float, float]] = []  # layer, share of noise and of multiply-accumulates
        self.times: dict[str, dict[str, float]] = {}  # by mode, int8 too, the microseconds of each layer
        self.total = 0.0  # the microseconds of all of int8

    def run(self) -> QuantizedGraph:
        started, interrupted = time.perf_counter(), False
        default = self._quantize({})  # complains of bad options before anything takes long
        self.float_metric = self.metric(self.model, "the float model")
        int8_metric = self._judge(default, {}, "int8")
        try:
            best = default if self.found else self._corrected(default, int8_metric)
            if self.found is None:
                self._move_layers(best)
        except KeyboardInterrupt:
            if self.found is None:
                raise
            interrupted = True
            warnings.warn("interrupted: the search for fewer layers out of int8 is not complete", stacklevel=4)
        assert self.found is not None
        graph, metric, moved = self.found
        corrected = self.corrected if graph is not default else ()
        drifts = (self._drift(default), self._drift(graph)) if graph is not default else (None, None)
        graph.tuning = Tuning(  # type: ignore[assignment]
            self.float_metric, int8_metric, metric, self.max_drop, self._moved(moved), corrected,
            self.metric.evaluations, time.perf_counter() - started, interrupted, self._steps(), *drifts,
        )  # fmt: skip
        return graph

    # --- graphs and what they are worth ---

    def _quantize(self, moved: Mapping[str, str], **changes: Any) -> QuantizedGraph:
        options = {**self.options, **changes}
        if moved:
            options["config"] = {**by_selector(options.get("config")), **moved}
        return pt2e.quantize(self.model, self.inputs, **options)

    def _judge(self, graph: QuantizedGraph, moved: dict[str, str], what: str) -> float:
        """The metric of a graph, which is what was found if that is within the budget."""
        metric = self.metric(graph, what)
        self.steps.append((what, metric, moved))
        if metric >= self.float_metric - self.max_drop:
            self.found = graph, metric, moved
        return metric

    def _corrected(self, default: QuantizedGraph, before: float) -> QuantizedGraph:
        """Takes accuracy="best" from here on where it raises the metric."""
        if self.options.get("accuracy") is not None or self.options.get("calibration") is None:
            return default
        graph = self._quantize({}, accuracy="best")
        if self._judge(graph, {}, "int8, corrected") <= before:
            return default
        self.corrected = self.options["accuracy"] = graph.meta[corrections.MADE]  # which help is not asked again
        return graph

    def _try(self, names: Sequence[str], mode: str) -> bool:
        moved = dict.fromkeys(names, mode)
        try:
            graph = self._quantize(moved)
        except NothingToQuantizeError:
            return False
        metric = self._judge(graph, moved, f"{len(names)} in {_TYPES[mode]}")
        return metric >= self.float_metric - self.max_drop

    # --- the search ---

    def _move_layers(self, graph: QuantizedGraph) -> None:
        self._rank(graph)
        names = [name for name, *_ in self.rows]
        for mode in self.modes:
            self._time(mode)
            if (count := self._bisect(names, mode)) is not None:
                self._prune(names[:count], mode)
                return
        nearest = max(metric for _, metric, _ in self.steps)
        raise BudgetError(
            f"no choice of layers is within max_drop={self.max_drop:g}: the float model has {self.float_metric:.6g}, the "
            f"best that was tried, with up to {len(names)} layers moved to float32, {nearest:.6g}: allow more, or keep "
            "the float model"
        )

    def _rank(self, graph: QuantizedGraph) -> None:
        """The layers that can be moved, those first that do most harm for what moving them costs."""
        counts = costs.macs(graph, positional(graph, self.inputs, self.kwargs or {}))
        total, noises = sum(counts.values()) or 1, dict.fromkeys(counts, 0.0)
        for row in self._drift(graph).layers:
            if row.layer in noises:
                noises[row.layer] += row.share
        self.rows = [(name, noise, counts[name] / total) for name, noise in noises.items()]
        self.rows.sort(key=lambda row: -row[1])
        self.times["int8"], self.total = costs.microseconds(graph, self.inputs, self.kwargs)
        self._time(self.modes[0])
        # No kernel is free, however short it is.
        least = 1e-3 * self.total if self.total else 1e-3
        self.rows.sort(key=lambda row: -row[1] / max(self._cost(row, self.modes[0]), least))

    def _time(self, mode: str) -> None:
        """Times layers in bfloat16 or float32: all at once, but for the one that does least harm, for the rest is no int8."""
        if mode in self.times or not self.total or len(self.rows) < 2:
            return
        example = self.options.get("calibration") and [self.kwargs or self.inputs]
        ends: dict[str, Any] = {"accuracy": None, "calibration": example, "transform": None, "max_batches": None}
        moved = dict.fromkeys((name for name, *_ in self.rows[:-1]), mode)
        self.times[mode], _ = costs.microseconds(self._quantize(moved, **ends), self.inputs, self.kwargs)

    def _cost(self, row: tuple[str, float, float], mode: str) -> float:
        """The microseconds that moving the layer costs; where nothing is timed, its share of the multiply-accumulates."""
        if not self.total:
            return row[2]
        before, after = (self.times.get(kind, {}).get(row[0]) for kind in ("int8", mode))
        if before is None or after is None:
            return row[2] * self.total
        return after - before

    def _bisect(self, names: Sequence[str], mode: str) -> int | None:
        """The shortest start of the list that is within the budget: double it until it is, then halve the gap."""
        bad, good, length = 0, None, 1
        what = f"trying layers in {_TYPES[mode]}"
        with progress.task(what, math.ceil(2 * math.log2(len(names) + 1))) as advance:
            while good is None or good - bad > 1:
                if self._try(names[:length], mode):
                    good = length
                else:
                    bad = length
                advance()
                if good is None and bad == len(names):
                    return None
                length = min(2 * length, len(names)) if good is None else (bad + good) // 2
        return good

    def _prune(self, names: Sequence[str], mode: str) -> None:
        """Takes back what came before the layer that mattered by being cheap, and does little."""
        for name in list(names[:-1])[::-1][: max(1, len(names) // 4)]:
            assert self.found is not None
            kept = [other for other in self.found[2] if other != name]
            if kept:
                self._try(kept, mode)

    # --- the result ---

    def _drift(self, graph: QuantizedGraph) -> Drift:
        if graph not in self.drifts:
            self.drifts[graph] = drift.measure(graph, self.inputs, self.kwargs, self.model)
        return self.drifts[graph]

    def _moved(self, moved: Mapping[str, str]) -> tuple[Moved, ...]:
        def of(row: tuple[str, float, float]) -> Moved:
            name, mode = row[0], moved[row[0]]
            return Moved(
                name, _TYPES[mode], *row[1:], self.times.get("int8", {}).get(name), self.times.get(mode, {}).get(name)
            )

        return tuple(of(row) for row in self.rows if row[0] in moved)

    def _steps(self) -> tuple[Step, ...]:
        steps = []
        for what, metric, moved in self.steps:
            rows = [row for row in self.rows if row[0] in moved]
            more = sum(self._cost(row, moved[row[0]]) for row in rows)
            taken = (self.total + more) / 1000 if self.total else None
            steps.append(Step(what, metric, sum(row[2] for row in rows), taken))
        return tuple(steps)

    def _calls(self, calibration: Any) -> Calls:
        example = (*self.inputs, *(self.kwargs or {}).values())  # those by name behind the others
        return Calls(calibration, example, self.options.get("transform"), self.options.get("max_batches"))
