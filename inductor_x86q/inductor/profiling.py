"""Torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def profiled(call: Callable[[], Any], *, runs: int) -> list[tuple[str, float]]:
    """Name and microseconds of what torch's profiler sees in `runs` calls, in the order in which it began.

    Two calls go before, unseen: the first ones of a process allocate. Relies on `time_range` of the profiler's events.
    """
    for _ in range(2):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(runs):
            call()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)  # type: ignore[arg-type, return-value]
    return [(event.name, event.time_range.elapsed_us()) for event in events]
