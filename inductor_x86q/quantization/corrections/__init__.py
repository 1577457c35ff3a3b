"""Corrections of a prepared graph: what of rounding to int8 can be made up for, each a switch of `quantize(accuracy=…)`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from inductor_x86q.errors import QuantizationError
from inductor_x86q.quantization.corrections.layerwise import correct
from inductor_x86q.quantization.corrections.prepared import Lockstep
from inductor_x86q.quantization.corrections.scaling import equalize, smooth

log = logging.getLogger(__name__)

SWITCHES = ("ranges", "equalize", "smooth", "rounding", "bias")
MADE = "x86q_corrections"  # in the `meta` of what quantize() returns: the names of those that were made
# In which "best" tries them: with ranges that clip, a mean error is that of the few values that are clipped, and taking it out
# of all the others does harm.
_TRIED = ("equalize", "smooth", "rounding", "bias", "ranges")
# Of the data, that corrections are made with: so many rows, and no fewer than make up so many values.
ROWS, VALUES = 64, 2**14


def switches(accuracy: Any) -> tuple[str, ...]:
    """The corrections that `accuracy` asks for, in the order in which they are made."""
    if accuracy is None:
        return ()
    asked = [accuracy] if isinstance(accuracy, str) else list(accuracy) if isinstance(accuracy, Iterable) else [None]
    if unknown := [name for name in asked if name not in SWITCHES and asked != ["best"]]:
        raise QuantizationError(
            f"accuracy: {unknown[0]!r}, expected 'best' or some of {', '.join(map(repr, SWITCHES))}"
        )
    return SWITCHES if asked == ["best"] else tuple(name for name in SWITCHES if name in asked)


def corrected(
    prepare: Callable[[Any], fx.GraphModule],
    calibrate: Callable[[fx.GraphModule], None],
    calls: Sequence[tuple[Any, ...]],
    chosen: Sequence[str],
    config: Any,
    *,
    best: bool,
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A calibrated graph with corrections, and which these are: the chosen ones, or with `best` those of them that raise the
    signal-to-noise ratio.

    Where there are several calls, what helps is judged by some that nothing was corrected with.
    """
    held_out = max(1, len(calls) // 4) if len(calls) > 1 else 0
    fit, judged = (calls[:-held_out], calls[-held_out:]) if held_out else (calls, calls)

    def attempt(names: Sequence[str], fit: Sequence[tuple[Any, ...]] = calls) -> fx.GraphModule:
        prepared = prepare(_with_ranges(config) if "ranges" in names else config)
        if "equalize" in names:
            equalize(prepared, fit)
        if "smooth" in names:
            smooth(prepared, fit)
        calibrate(prepared)
        if "rounding" in names or "bias" in names:
            correct(prepared, fit, rounding="rounding" in names, bias="bias" in names)
        return prepared

    if not best:
        return attempt(chosen), tuple(chosen)
    kept: list[str] = []
    ratio = _ratio(attempt(kept, fit), judged)
    for name in _TRIED:
        here = _ratio(attempt([*kept, name], fit), judged)
        if here > ratio:
            log.info("%s helps: %.1f dB, before %.1f dB", name, here, ratio)
            kept, ratio = [*kept, name], here
    return attempt(kept), tuple(kept)


def _ratio(prepared: fx.GraphModule, calls: Sequence[tuple[Any, ...]]) -> float:
    """Of a corrected graph against what it computes in float, which no correction but those of weights changes."""
    run = Lockstep(prepared, calls)
    run.run()
    return run.signal_to_noise


def _with_ranges(config: Any) -> Any:
    """The configuration with the observer of least squared error where it names none for the whole model."""
    if config is None:
        return "mse"
    return {"": "mse", **config} if isinstance(config, Mapping) and "" not in config else config
