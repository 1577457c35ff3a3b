"""Corrections that go through a calibrated graph once, layer by layer: weights rounded for the least error of the layer's
output, and biases that take out its mean.

Each layer is corrected with what the rounded layers before it really give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from inductor_x86q import progress
from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.quantization.corrections.prepared import Layer, Lockstep, layers, parameters, set_bias, set_constant

_POSITIONS = 512  # of an image, at most, that a convolution's weight is rounded by
_DAMPING = 0.01
_BLOCK = 128


def correct(prepared: fx.GraphModule, calls: Sequence[tuple[Any, ...]], *, rounding: bool, bias: bool) -> None:
    found = {layer.node: layer for layer in layers(prepared)}
    with progress.task("correcting layers", total=len(found)) as advance:

        def at(node: fx.Node, run: Lockstep) -> None:
            layer = found.get(node)
            if layer is None:
                return
            if rounding:
                _round(prepared, layer, run)
            if bias:
                _center(prepared, layer, run)
            advance()

        Lockstep(prepared, calls).run(at)
    prepared.recompile()


# --- bias -------------------------------------------------------------------------------------------------------------


def _center(prepared: fx.GraphModule, layer: Layer, run: Lockstep) -> None:
    """Adds the mean error of each output channel, over all calls, to the bias."""
    pairs = list(zip(run.float[layer.node], run.recompute(layer.node), strict=True))
    channel = operators.channels(layer.node) % pairs[0][0].dim()
    others = [dimension for dimension in range(pairs[0][0].dim()) if dimension != channel]
    count = sum(exact.numel() // exact.shape[channel] for exact, _ in pairs)
    error = torch.stack([(exact.double() - rounded.double()).sum(others) for exact, rounded in pairs]).sum(0) / count
    before = qdq.constant(layer.bias)
    mean = error.to(pairs[0][0].dtype)
    set_bias(prepared, layer, mean if before is None else before + mean)
    if layer.bias in run.rounded:
        run.rounded[layer.bias] = [qdq.constant(layer.bias)] * len(run.calls)


# --- weights ----------------------------------------------------------------------------------------------------------


def _round(prepared: fx.GraphModule, layer: Layer, run: Lockstep) -> None:
    """Rounds the weight column by column; what each column loses, those that are still to come make up for."""
    moments = _moments(layer, run.rounded[layer.activation])
    weight: Any = qdq.constant(layer.weight)
    groups, columns = moments.shape[:2]
    scale = parameters(layer.observer)[0].to(torch.float64)
    scale = scale.expand(weight.shape[0]).reshape(groups, -1, 1)
    low, high = layer.observer.quant_min, layer.observer.quant_max
    rounded = _rounded(weight.detach().double().reshape(groups, -1, columns), scale, moments, low, high)
    set_constant(prepared, layer.weight, rounded.to(weight.dtype).reshape(weight.shape))
    run.reread(layer)


def _moments(layer: Layer, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The second moments of what a weight's columns are multiplied with, for each group: [groups, columns, columns]."""
    total: Any = 0
    for x in inputs:
        if role(layer.node) is Role.LINEAR:
            rows = x.reshape(1, -1, x.shape[-1])
            total = total + (rows.mT @ rows).double()
            continue
        for image in x:
            total = total + _of_patches(layer, image)
    return total


def _of_patches(layer: Layer, image: torch.Tensor) -> torch.Tensor:
    """The second moments of what a convolution's window sees of an image of any number of dimensions."""
    weight: Any = qdq.constant(layer.weight)
    stride, padding, dilation, groups = layer.geometry
    windows = F.pad(image, [size for size in reversed(padding) for _ in range(2)])
    for axis, (size, step, between) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True), 1):
        windows = windows.unfold(axis, between * (size - 1) + 1, step)[..., ::between]
    # [channels, positions..., window...] → [groups, channels of a group and window, positions]
    count = len(stride)
    places = windows.shape[1 : 1 + count].numel()
    windows = windows.flatten(1, count)[:, :: -(-places // _POSITIONS)]
    rows = windows.unflatten(0, (groups, -1)).movedim(2, -1).flatten(1, -2)
    return (rows @ rows.mT).double()


def _rounded(weight: torch.Tensor, scale: torch.Tensor, moments: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The weight on its grid, [groups, rows, columns], so that its products change least for inputs of these moments.

    The column with the most weight in the error comes first, as GPTQ does.
    """
    groups, _, columns = weight.shape
    diagonal = moments.diagonal(dim1=1, dim2=2)
    moments = moments + torch.diag_embed(
        _DAMPING * diagonal.mean(1, keepdim=True).clamp(min=1e-12).expand(groups, columns)
    )
    order = diagonal.argsort(1, descending=True)
    moments = moments.gather(1, order[..., None].expand_as(moments)).gather(2, order[:, None].expand_as(moments))
    weight = weight.gather(2, order[:, None].expand_as(weight)).clone()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    result = torch.empty_like(weight)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty_like(weight[:, :, start:end])
        for column in range(start, end):
            values = weight[:, :, column, None]
            result[:, :, column, None] = on_grid = torch.round(values / scale).clamp(low, high) * scale
            error = (values - on_grid) / inverse[:, column, column].reshape(groups, 1, 1)
            weight[:, :, column:end] -= error * inverse[:, None, column, column:end]
            errors[:, :, column - start, None] = error
        weight[:, :, end:] -= errors @ inverse[:, start:end, end:]
    return torch.empty_like(result).scatter_(2, order[:, None].expand_as(result), result)
