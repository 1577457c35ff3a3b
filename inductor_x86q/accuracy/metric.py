"""The metric of a search for a budget: the user's own, checked at each call, or closeness to the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from inductor_x86q.errors import QuantizationError
from inductor_x86q.quantization.arguments import split


class Metric:
    """A function of a module, higher is better, and how often it was asked."""

    def __init__(self, function: Callable[[torch.nn.Module], Any]) -> None:
        self.function, self.evaluations = function, 0

    def __call__(self, module: torch.nn.Module, which: str) -> float:
        """Raises QuantizationError where the function fails, or gives no number."""
        self.evaluations += 1
        try:
            with torch.no_grad():
                value = self.function(module)
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


def closeness(model: torch.nn.Module, calls: Iterable[Any]) -> Callable[[torch.nn.Module], float]:
    """1 less the share of the outputs' energy that is noise, over these calls."""
    inputs = [split(call) for call in calls]
    with torch.no_grad():
        expected = [_floats(model(*args, **named)) for args, named in inputs]
    energy = sum(float(x.double().square().sum()) for values in expected for x in values) or 1.0

    def measured(module: torch.nn.Module) -> float:
        noise = 0.0
        for (args, named), values in zip(inputs, expected, strict=True):
            for x, y in zip(_floats(module(*args, **named)), values, strict=True):
                noise += float((x.double() - y.double()).square().sum())
        return 1 - noise / energy

    return measured


def _floats(value: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
