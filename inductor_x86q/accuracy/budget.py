"""A budget of accuracy: as much in int8 as the user's own metric allows."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q import progress
from inductor_x86q.accuracy import drift
from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph import operators
from inductor_x86q.graph.operators import Role
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.graph.quantized_graph import QuantizedGraph
from inductor_x86q.quantization import pt2e
from inductor_x86q.quantization.arguments import positional, split
from inductor_x86q.quantization.config import module_stack
from inductor_x86q.quantization.data import Calls


@dataclasses.dataclass(frozen=True)
class Moved:
    """A layer that went to float32, and why: its share of int8's noise, and of the network's multiply-accumulates."""

    layer: str
    share_of_noise: float
    share_of_macs: float


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the search for a budget found; the graph that `quantize` returned has it as `tuning`."""

    float_metric: float
    int8_metric: float  # with every layer in int8 and no correction but those that were asked for
    metric: float  # of the graph that was returned, on the same data
    max_drop: float
    moved: tuple[Moved, ...]
    corrected: bool  # whether accuracy="best" was taken
    evaluations: int

    @property
    def share_of_macs(self) -> float:
        """Of the multiply-accumulates, what moved out of int8."""
        return sum(layer.share_of_macs for layer in self.moved)

    def __str__(self) -> str:
        lines = [
            f"float32 {self.float_metric:.4g}, int8 {self.int8_metric:.4g}, now {self.metric:.4g}; a drop of "
            f"{self.max_drop:.4g} is allowed ({self.evaluations} evaluations)"
        ]
        if self.corrected:
            lines.append("corrected by accuracy='best'")
        lines += [
            f"{x.layer}: float32, {x.share_of_noise:.0%} of the noise, {x.share_of_macs:.1%} of the MACs"
            for x in self.moved
        ]
        return "\n".join(lines if self.moved else [*lines, "every layer is in int8"])


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
    is not given), then layers stay in float32, those first that do most harm for their multiply-accumulates. The
    result's `tuning` says which, why, and what the metric is. Interrupted (Ctrl-C), it returns what it has found.

    Args:
        validate: the metric of a module, higher is better. None: 1 less the noise's share of the outputs' energy, on the
            calibration data, by which a `max_drop` of 0.01 is a signal-to-noise ratio of 20 dB.
        max_drop: how much less than that of the float model the metric may be.
        **options: all that `inductor_x86q.quantization.pt2e.quantize` takes.

    Raises:
        QuantizationError: as without a budget; or the metric fails or is no number; or no choice of layers is within it.
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


class _Search:
    """One search: what was tried, and the best of it that is within the budget."""

    def __init__(
        self, model: torch.nn.Module, inputs: tuple[Any, ...], validate: Any, max_drop: float, options: dict[str, Any]
    ) -> None:
        self.model, self.inputs, self.max_drop = model, inputs, max_drop
        self.options = dict(options)
        calibration = options.get("calibration")
        if isinstance(calibration, Iterable) and not isinstance(calibration, (list, tuple)):
            calls = Calls(
                calibration, self._example(), self.options.pop("transform", None), self.options.pop("max_batches", None)
            )
            self.options["calibration"] = list(calls)  # read at every attempt
        exclude = options.get("exclude", ())
        self.excluded = (exclude,) if isinstance(exclude, (str, type)) else tuple(exclude)
        self.validate = validate or self._closeness()
        self.evaluations = 0
        self.found: tuple[QuantizedGraph, float, tuple[str, ...]] | None = (
            None  # within the budget, fewest layers moved
        )

    def run(self) -> QuantizedGraph:
        default = self._quantize(())  # complains of bad options before anything takes long
        self.float_metric = self._metric(self.model, "the float model")
        int8_metric = self._metric(default, "the int8 model")
        corrected, rows = False, []
        if self._within(int8_metric):
            self.found = default, int8_metric, ()
        else:
            try:
                corrected = self._correct(int8_metric)
                rows = self._ranked(default) if self.found is None else []
                if rows:
                    self._bisect([name for name, *_ in rows])
            except KeyboardInterrupt:
                if self.found is None:
                    raise
                warnings.warn("interrupted: the search for fewer layers in float32 is not complete", stacklevel=4)
        assert self.found is not None
        graph, metric, names = self.found
        moved = tuple(Moved(name, noise, macs) for name, noise, macs in rows if name in names)
        graph.tuning = Tuning(  # type: ignore[assignment]
            self.float_metric, int8_metric, metric, self.max_drop, moved, corrected, self.evaluations
        )
        return graph

    def _correct(self, before: float) -> bool:
        """Takes accuracy="best" where it raises the metric."""
        if self.options.get("accuracy") is not None or self.options.get("calibration") is None:
            return False
        self.options["accuracy"] = "best"
        graph = self._quantize(())
        metric = self._metric(graph, "the corrected int8 model")
        if self._within(metric):
            self.found = graph, metric, ()
        if metric <= before:
            del self.options["accuracy"]
        return metric > before

    def _ranked(self, default: QuantizedGraph) -> list[tuple[str, float, float]]:
        """Name, share of noise and share of multiply-accumulates of each layer, most harm for its cost first."""
        measured = drift.measure(default, self.inputs, self.options.get("kwargs"), self.model)
        macs = _macs(default, positional(default, self.inputs, self.options.get("kwargs") or {}))
        total = sum(macs.values()) or 1
        noises: dict[str, float] = {}
        for row in measured.layers:
            if row.layer in macs:
                noises[row.layer] = noises.get(row.layer, 0.0) + row.share
        rows = [(name, noise, macs[name] / total) for name, noise in noises.items()]
        return sorted(rows, key=lambda row: -row[1] / max(row[2], 1e-3))  # no kernel is free, however few its MACs

    def _bisect(self, names: Sequence[str]) -> None:
        """The shortest start of the list that is within the budget: double it until it is, then halve the gap."""
        bad, good, length = 0, None, 1
        with progress.task("trying layers in float32", math.ceil(2 * math.log2(len(names) + 1))) as advance:
            while good is None or good - bad > 1:
                if self._try(names[:length]):
                    good = length
                else:
                    bad = length
                advance()
                if good is None and bad == len(names):
                    raise self._unreachable(names)
                length = min(2 * length, len(names)) if good is None else (bad + good) // 2
        self._prune(names[:good])

    def _prune(self, names: Sequence[str]) -> None:
        """Takes back what came before the layer that mattered by being cheap, and does little."""
        for name in list(names[:-1])[::-1][: max(1, len(names) // 4)]:
            assert self.found is not None
            kept = tuple(other for other in self.found[2] if other != name)
            if kept:
                self._try(kept)

    def _try(self, names: Sequence[str]) -> bool:
        try:
            graph = self._quantize(names)
        except QuantizationError as error:
            if "nothing to quantize" in str(error):
                return False
            raise
        metric = self._metric(graph, f"the model with {len(names)} layers in float32")
        self.nearest = metric
        if self._within(metric):
            self.found = graph, metric, tuple(names)
        return self._within(metric)

    def _quantize(self, names: Sequence[str]) -> QuantizedGraph:
        return pt2e.quantize(self.model, self.inputs, **{**self.options, "exclude": (*self.excluded, *names)})

    def _within(self, metric: float) -> bool:
        return metric >= self.float_metric - self.max_drop

    def _unreachable(self, names: Sequence[str]) -> QuantizationError:
        return QuantizationError(
            f"no choice of layers is within max_drop={self.max_drop:g}: the float model has {self.float_metric:.6g}, and "
            f"with {len(names)} layers moved to float32 the last try gave {self.nearest:.6g}: allow more, or keep the "
            "float model"
        )

    # --- the metric ---

    def _metric(self, module: torch.nn.Module, which: str) -> float:
        self.evaluations += 1
        try:
            with torch.no_grad():
                value = self.validate(module)
        except Exception as error:  # the user's own function raises what it likes
            raise QuantizationError(f"validate failed for {which}: {type(error).__name__}: {error}") from error
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise QuantizationError(
                f"validate gave a tensor of shape {tuple(value.shape)} for {which}: expected one number"
            )
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise QuantizationError(f"validate gave a {type(value).__name__} for {which}: expected a number") from None
        if not math.isfinite(number):
            raise QuantizationError(f"validate gave {number} for {which}: expected a finite number")
        return number

    def _example(self) -> tuple[Any, ...]:
        """All arguments of the example, those by name behind the others."""
        return (*self.inputs, *(self.options.get("kwargs") or {}).values())

    def _closeness(self) -> Callable[[torch.nn.Module], float]:
        calls = self.options.get("calibration") or [self.options.get("kwargs") or self.inputs]
        calls = Calls(calls, self._example(), self.options.get("transform"), self.options.get("max_batches"))
        inputs = [split(call) for call in calls]
        with torch.no_grad():
            expected = [_floats(self.model(*args, **named)) for args, named in inputs]
        energy = sum(float(x.double().square().sum()) for values in expected for x in values) or 1.0

        def closeness(module: torch.nn.Module) -> float:
            noise = 0.0
            for (args, named), values in zip(inputs, expected, strict=True):
                for x, y in zip(_floats(module(*args, **named)), values, strict=True):
                    noise += float((x.double() - y.double()).square().sum())
            return 1 - noise / energy

        return closeness


def _floats(value: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


class _Counting(fx.Interpreter):
    """Counts the multiply-accumulates of layers that `exclude` can name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.macs: dict[str, int] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        name = layer_of(node)
        if drift.is_layer(node) and any(path == name for path, _ in module_stack(node)):
            weight = self.env[node.args[1]]  # type: ignore[index]
            per_output = weight[0].numel() if weight.dim() > 2 else weight.shape[-1]
            if operators.role(node) is Role.ATTENTION:
                per_output = 2 * weight.shape[-2]  # a query with all keys, and all values weighted
            self.macs[name] = self.macs.get(name, 0) + value.numel() * per_output
        return value


def _macs(quantized: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, int]:
    counting = _Counting(quantized)
    with torch.no_grad():
        counting.run(*inputs)
    return counting.macs
