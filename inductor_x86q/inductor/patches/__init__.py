"""What of torch is replaced while it compiles a graph of ours, one file each, and where that is in force.

Each says what it replaces, since which torch, why, and when it can go. `python -m inductor_x86q.inductor` lists them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from inductor_x86q.inductor.dynamo import one_at_a_time
from inductor_x86q.inductor.patches import (
    constant_folding,
    constants_once,
    convolution_layout,
    decompositions_ahead_of_time,
    eight_bytes_at_once,
    fake_values,
    generated_modules,
    generated_source,
    graph_cache,
    linked_objects,
    operand_layouts,
    pipeline,
    pool_calls,
    precompiled_headers,
    sources_side_by_side,
)
from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.precompiled_headers import headers_ahead
from inductor_x86q.inductor.patches.scopes import COMPILE

__all__ = ["PATCHES", "applied", "headers_ahead"]

PATCHES: tuple[Patch, ...] = (
    *pipeline.PATCHES,
    *decompositions_ahead_of_time.PATCHES,
    *constant_folding.PATCHES,
    *fake_values.PATCHES,
    *operand_layouts.PATCHES,
    *convolution_layout.PATCHES,
    *constants_once.PATCHES,
    *pool_calls.PATCHES,
    *eight_bytes_at_once.PATCHES,
    *graph_cache.PATCHES,
    *linked_objects.PATCHES,
    *precompiled_headers.PATCHES,
    *sources_side_by_side.PATCHES,
    *generated_modules.PATCHES,
    *generated_source.PATCHES,
)


@contextlib.contextmanager
def applied(run_passes: Callable[[fx.Graph], Any]) -> Iterator[None]:
    """Within this context Inductor compiles a graph of ours: freezing runs `run_passes(graph)`, and all else is patched.

    Compiles of other threads wait; those that torch lets run at the same time are as they were.
    """
    patches = [patch for patch in PATCHES if patch.scope is COMPILE]
    with one_at_a_time(), COMPILE.entered(run_passes, patches):
        yield
