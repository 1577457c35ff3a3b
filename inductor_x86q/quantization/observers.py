"""Observers that torchao has not: ranges that cut off a share of the values, and those of the least squared error."""

from __future__ import annotations

from typing import Any

import torch

from inductor_x86q.quantization import torchao

_CANDIDATES = 40  # for each end of a range


class _RangeOfHistogram(torchao.HistogramObserver):
    """Keeps torchao's histogram and takes the range from it by another rule.

    Relies on HistogramObserver keeping `histogram`, `min_val` and `max_val`, and `calculate_qparams` taking the range
    from `_non_linear_param_search`.
    """

    def _non_linear_param_search(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = float(self.min_val), float(self.max_val)
        if not low < high:
            return self.min_val, self.max_val
        width = (high - low) / len(self.histogram)
        edges = low + width * torch.arange(len(self.histogram) + 1, dtype=torch.float64)
        found = self._range(self.histogram.double(), edges)
        return tuple(torch.as_tensor(x, dtype=self.min_val.dtype) for x in found)  # type: ignore[return-value]

    def _range(self, counts: torch.Tensor, edges: torch.Tensor) -> tuple[Any, Any]:
        raise NotImplementedError


class PercentileObserver(_RangeOfHistogram):
    """The range without the outermost values: `percentile` percent lie below its end, and as many above its start."""

    def __init__(self, percentile: float = 99.99, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.percentile = percentile

    def _range(self, counts: torch.Tensor, edges: torch.Tensor) -> tuple[Any, Any]:
        below = torch.cat([counts.new_zeros(1), counts.cumsum(0) / counts.sum()])
        share = self.percentile / 100
        first = int((below <= 1 - share).nonzero().max())
        last = int((below >= share).nonzero().min())
        return edges[first], edges[last]


class MeanSquaredErrorObserver(_RangeOfHistogram):
    """The range with the least squared error, of rounding inside it and of clipping outside it, tried on a grid."""

    def _range(self, counts: torch.Tensor, edges: torch.Tensor) -> tuple[Any, Any]:
        centers = (edges[1:] + edges[:-1]) / 2
        shares = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES, dtype=torch.float64)
        lows = edges[0].clamp(max=0) * shares if edges[0] < 0 else edges.new_zeros(1)
        highs = edges[-1].clamp(min=0) * shares if edges[-1] > 0 else edges.new_zeros(1)
        rounded = counts.clone()
        if edges[0] == 0:
            rounded[0] = 0  # what a relu made zero is exact, whatever the range
        # Below, above and inside: the cut at one end does not depend on the other.
        below = (counts * (lows[:, None] - centers).clamp(min=0).square()).sum(1)
        above = (counts * (centers - highs[:, None]).clamp(min=0).square()).sum(1)
        total = rounded.sum()
        step = (highs[None] - lows[:, None]) / (self.quant_max - self.quant_min)
        error = below[:, None] + above[None] + total * step.square() / 12
        best = int(error.argmin())
        return lows[best // len(highs)], highs[best % len(highs)]
