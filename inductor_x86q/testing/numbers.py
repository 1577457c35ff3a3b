"""Assertions on numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from inductor_x86q.quantization.arguments import each_tensor
from inductor_x86q.testing.code import Compiled, compile_once


def snr(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The signal-to-noise ratio of `actual` against `reference` in dB; infinite where they are equal.

    Example:
        >>> reference = torch.ones(100)
        >>> round(testing.snr(reference + 0.1, reference), 1)
        20.0
    """
    reference, actual = reference.double(), actual.double()
    noise = (actual - reference).square().sum().item()
    signal = reference.square().sum().item()
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def assert_close_to_reference(
    q: torch.nn.Module,
    inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    step: float | None = None,
    min_snr: float | None = None,
) -> Compiled:
    """Asserts that the compiled graph returns what the q/dq graph returns eagerly, that it does so at each call, and
    that it leaves its inputs alone.

    For a graph of one fused region leave `min_snr` out: integer outputs may differ by one step on at most 1 % of their
    elements (one element in small tensors), float outputs by float rounding.

    Args:
        step: the scale of float outputs that come from a dequantize: these too may differ by one step, likewise.
        min_snr: for whole nets, the least signal-to-noise ratio in dB, in place of the bounds above.

    Returns:
        The compile, so that more can be asserted of it.

    Raises:
        AssertionError: with the output's position, its largest difference and its signal-to-noise ratio.

    Example:
        >>> compiled = testing.assert_close_to_reference(q, (x,), min_snr=30)
        >>> sum(testing.own_calls(compiled.code).values()) + sum(testing.int8_calls(compiled.code).values())
        4
    """
    named = dict(kwargs or {})
    copies, named_copies = each_tensor(torch.clone, (inputs, named))
    with torch.no_grad():
        reference = q(*copies, **named_copies)
    compiled = compile_once(q, inputs, kwargs=named, mode=mode, options=options)
    again = compiled.run(*inputs, **named)
    for key, before in (*enumerate(copies), *named_copies.items()):
        after = named[key] if isinstance(key, str) else inputs[key]
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after), f"input {key} was written to"
    for call, outputs in (("first", compiled.outputs), ("second", again)):
        assert_same(outputs, reference, step=step, min_snr=min_snr, where=f"{call} call, ")
    return compiled


def assert_same(
    actual: Any, reference: Any, *, step: float | None = None, min_snr: float | None = None, where: str = ""
) -> None:
    """The comparison of `assert_close_to_reference` on given outputs, in any nesting of tuples, lists and dicts.

    Example:
        >>> testing.assert_same({"y": torch.tensor([1, 2])}, {"y": torch.tensor([1, 2])})
        >>> testing.assert_same(torch.tensor([1.0]), torch.tensor([1.1]), where="my model, ")
        Traceback (most recent call last):
            ...
        AssertionError: my model, output 0: more than float rounding (1.1e-05): largest difference 0.1, ...
    """
    left, right = (torch.utils._pytree.tree_leaves(x) for x in (actual, reference))
    assert len(left) == len(right), f"{where}{len(left)} outputs, the reference has {len(right)}"
    for position, (mine, theirs) in enumerate(zip(left, right, strict=True)):
        if not isinstance(theirs, torch.Tensor):
            assert mine == theirs, f"{where}output {position} is {mine!r}, the reference {theirs!r}"
            continue
        problem = _difference(mine, theirs, step, min_snr)
        assert problem is None, f"{where}output {position}: {problem}"


def _difference(actual: torch.Tensor, reference: torch.Tensor, step: float | None, min_snr: float | None) -> str | None:
    """What is wrong with `actual`, None where nothing is."""
    described = (
        f"{actual.dtype} of shape {tuple(actual.shape)}, the reference {reference.dtype} of {tuple(reference.shape)}"
    )
    if actual.dtype != reference.dtype or actual.shape != reference.shape:
        return described
    if not reference.numel():
        return None
    ratio = snr(actual, reference)
    error = (actual.double() - reference.double()).abs()
    text = f"largest difference {error.max():.4g}, signal-to-noise ratio {ratio:.1f} dB, {described}"
    if min_snr is not None:
        return None if ratio >= min_snr else f"below {min_snr} dB: {text}"
    if not reference.dtype.is_floating_point:
        step = 1.0
    few = max(1, reference.numel() // 100)
    rounding = 0.0 if not reference.dtype.is_floating_point else _rounding(reference)
    if step is None:
        return None if bool((error <= rounding).all()) else f"more than float rounding ({rounding:.3g}): {text}"
    differing = int((error > rounding).sum())
    if not bool((error <= step + rounding).all()):
        return f"more than one step ({step:.4g}): {text}"
    return (
        None
        if differing <= few
        else f"{differing} of {reference.numel()} elements differ by a step, at most {few} may: {text}"
    )


def _rounding(reference: torch.Tensor) -> float:
    """What a sum in another order, rounded once to the output's type, may differ by."""
    largest = reference.double().abs().max().item()
    return largest * max(1e-5, 2 * torch.finfo(reference.dtype).eps if reference.itemsize == 2 else 0.0)
