"""The pipeline: the stages, in the order in which they run on the graph that Inductor is freezing."""

from __future__ import annotations

import hashlib
import inspect
import logging
import marshal
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import fx

from inductor_x86q.graph.library import STANDS_FOR
from inductor_x86q.graph.outputs import KERNEL
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.passes import channels, finish, fuse, generate, images, normalize, propagate
from inductor_x86q.passes.stage import Rule, Stage, StageResult
from inductor_x86q.version import sources_digest

__all__ = ["FUSED", "STAGES", "No", "Rule", "Stage", "register_pass", "run"]

log = logging.getLogger(__name__)

# What holds before a stage is what holds after the one above it; before the first, the graph is as AOTAutograd leaves it
# and parameters are constants.
NORMALIZE = Stage(
    "normalize",
    [*normalize.RULES],
    "Each thing has one spelling: constant scales are numbers, weights are per channel, a linear is `linear`.",
)
PROPAGATE = Stage(
    "propagate", [*propagate.RULES], "No operator that only moves data stands between a dequantize and a quantize."
)
CHANNELS = Stage(
    "channels", [*channels.RULES], "No channel shuffle stands between convolutions that can do without it."
)
COMPUTE = Stage(
    "fuse: compute", [*fuse.COMPUTE_RULES], "Every eligible convolution and linear is a call with float output."
)
PER_TOKEN = Stage(
    "fuse: per token",
    [*fuse.PER_TOKEN_RULES],
    "Every scale for each row, and the bias behind it, is an argument of the linear's call.",
)
POST_OPS = Stage(
    "fuse: post-ops",
    [*fuse.POST_OP_RULES],
    "Every call has absorbed what it can of the activation, addition and quantize behind it.",
)
OUTPUT_TYPES = Stage(
    "fuse: output types", [*fuse.OUTPUT_TYPE_RULES], "Every call gives a type that this CPU has a fast kernel for."
)
FINISH = Stage("finish", [*finish.RULES], "The graph is legal for Inductor.")
IMAGES = Stage(
    "images",
    [*images.RULES],
    "Every cat and pool of int8 images of known sizes is ours, no cat repeats what another one joins, and factors of channels are "
    "computed once.",
)
GENERATE = Stage(
    "generate",
    [*generate.RULES],
    "Every call brings along what the kernel of ours needs that may replace it.",
)
STAGES = (NORMALIZE, PROPAGATE, CHANNELS, COMPUTE, PER_TOKEN, POST_OPS, OUTPUT_TYPES, FINISH, IMAGES, GENERATE)
# Without these all calls stay oneDNN's.
OURS = (PER_TOKEN, GENERATE)
# After this one all that is fused is, and nothing is taken apart for Inductor yet: what a report is made of.
FUSED = OUTPUT_TYPES


def register_pass(stage: str, rule: Rule[Any]) -> Callable[[], None]:
    """Adds a rule to a stage, behind the stage's own, for all compiles of this process from now on.

    The report, the debug dump and `x86q why` list it by its name as they list ours.

    Args:
        stage: "normalize", "propagate", "channels", "fuse: compute", "fuse: per token", "fuse: post-ops", "fuse: output types",
            "finish", "images" or "generate"; what holds after each is said in STAGES, and the rule has to keep it so.

    Returns:
        A function that takes the rule out again.

    Raises:
        ValueError: there is no such stage, or it has a rule of that name.

    Example:
        >>> def find(node):
        ...     return inductor_x86q.No("this one never matches")
        >>> def rewrite(node, found):
        ...     return node
        >>> rule = inductor_x86q.Rule("never", (torch.ops.aten.mul.Tensor,), find, rewrite)
        >>> remove = inductor_x86q.register_pass("propagate", rule)
        >>> remove()
    """
    chosen = next((s for s in STAGES if s.name == stage), None)
    if chosen is None:
        raise ValueError(f"no stage {stage!r}: expected one of {', '.join(repr(s.name) for s in STAGES)}")
    if any(rule.name == other.name for other in chosen.rules):
        raise ValueError(f"stage {stage!r} already has a rule named {rule.name!r}: give this one another name")
    chosen.rules.append(rule)
    return lambda: chosen.rules.remove(rule)


def run(
    graph: fx.Graph,
    between: Callable[[Stage, fx.Graph], None] = lambda stage, graph: None,
    *,
    without: Collection[Stage] = (),
) -> list[StageResult]:
    """Runs the stages on `graph`, but for those it is to do `without`; calls `between(stage, graph)` after each."""
    verify = bool(os.environ.get("INDUCTOR_X86Q_VERIFY"))
    results = []
    for stage in [stage for stage in STAGES if stage not in without]:
        with fake_tensors.disable_modes():  # rules compute with real constants; fake tensors are asked for explicitly
            result = stage.apply(graph)
            if verify:
                stage.check(graph)
        log.debug("%s: %s in %.0f ms", stage.name, dict(result.matches), result.seconds * 1e3)
        results.append(result)
        between(stage, graph)
    return results


def computed_by(node: fx.Node) -> str:
    """The kernel of ours that computes a node of a graph that has gone through all stages; empty where none does."""
    if node.target in STANDS_FOR:
        return generate.choice(node)[0]
    return node.meta[KERNEL].name if KERNEL in node.meta else ""


def fingerprint() -> str:
    """Names the sources of this package and the rules as they stand; part of the key under which a graph is cached."""
    lines = [f"{stage.name}: {', '.join(rule.name for rule in stage.rules)}" for stage in STAGES]
    own = f"{__name__.partition('.')[0]}."
    added = [
        rule for stage in STAGES for rule in stage.rules if not getattr(rule.find, "__module__", "").startswith(own)
    ]
    sources = [_source(function) for rule in added for function in (rule.find, rule.rewrite)]
    return "\n".join([f"inductor_x86q {sources_digest()}", *lines, *sources])


def _source(function: Any) -> str:
    """What a function of somebody else's does: a hash of the file that it is in, or of its code where there is none."""
    try:
        contents = Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):  # from standard input, or no function
        contents = marshal.dumps(function.__code__) if hasattr(function, "__code__") else repr(function).encode()
    return hashlib.blake2b(contents, digest_size=16).hexdigest()
