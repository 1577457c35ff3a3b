"""The pipeline: the stages, in the order in which they run on the graph that Inductor is freezing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from torch import fx

import inductor_x86q
from inductor_x86q import _torch
from inductor_x86q.passes import finish, fuse, normalize, propagate
from inductor_x86q.passes.stage import Stage, StageResult

log = logging.getLogger(__name__)

STAGES = (
    Stage(
        "normalize",
        normalize.RULES,
        before="The graph is as AOTAutograd leaves it, parameters are constants.",
        after="Each thing has one spelling: constant scales are numbers, weights are per channel, a linear is `linear`.",
        check=normalize.check,
    ),
    Stage(
        "propagate",
        propagate.RULES,
        before="normalize",
        after="No operator that only moves data stands between a dequantize and a quantize.",
        check=propagate.check,
    ),
    Stage(
        "fuse: compute",
        fuse.COMPUTE_RULES,
        before="propagate",
        after="Every eligible convolution and linear is an onednn call with float output.",
    ),
    Stage(
        "fuse: post-ops",
        fuse.POST_OP_RULES,
        before="fuse: compute",
        after="Every call has absorbed what it can of the activation, addition and quantize behind it.",
    ),
    Stage(
        "finish",
        finish.RULES,
        before="fuse: post-ops",
        after="The graph is legal for Inductor.",
        check=finish.check,
    ),
)


def run(graph: fx.Graph, between: Callable[[str, fx.Graph], None] = lambda stage, graph: None) -> list[StageResult]:
    """Runs all stages on `graph`; calls `between(stage name, graph)` after each."""
    verify = bool(os.environ.get("INDUCTOR_X86Q_VERIFY"))
    results = []
    for stage in STAGES:
        with _torch.disable_modes():  # rules compute with real constants; fake tensors are asked for explicitly
            result = stage.apply(graph)
        log.debug("%s: %s in %.0f ms", stage.name, dict(result.matches), result.seconds * 1e3)
        if verify:
            graph.lint()
            stage.check(graph)
        results.append(result)
        between(stage.name, graph)
    return results


def fingerprint() -> str:
    """Names this version of the package and the passes as they stand; part of the key under which a graph is cached."""
    lines = [f"{stage.name}: {', '.join(rule.name for rule in stage.rules)}" for stage in STAGES]
    return "\n".join([f"inductor_x86q {inductor_x86q.__version__}", *lines])
