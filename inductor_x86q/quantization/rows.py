"""Weights that are rounded without an observer: each row symmetric, by its largest value."""

from __future__ import annotations

import torch

from inductor_x86q.graph.qdq import SMALLEST_SCALE


def rounded(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of `-largest` to `largest`, and the scales (…, 1) of the rows of (…, row)."""
    scale = (weight.abs().amax(-1, keepdim=True) / largest).clamp(min=SMALLEST_SCALE)
    return (weight / scale).round().clamp(-largest, largest).to(torch.int8), scale
