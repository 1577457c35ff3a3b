"""Torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "profiling.py",
    "What each kernel of a compiled model takes.",
    (Needs("torch.autograd.profiler_util", "FunctionEvent"),),
    "`time_range` of the profiler's events, and kernels being named in them under `cpp.enable_kernel_profile`.",
)


def profiled(call: Callable[[], Any], *, runs: int) -> list[tuple[str, float]]:
    """Name and microseconds of what torch's profiler sees in `runs` calls, in the order in which it began.

    Two calls go before, unseen: the first ones of a process allocate.
    """
    for _ in range(2):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(runs):
            call()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)  # type: ignore[arg-type, return-value]
    return [(event.name, event.time_range.elapsed_us()) for event in events]
