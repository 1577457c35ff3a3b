"""Freezing runs our passes first, and no quantization passes of Inductor's or of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _apply(stock: Callable[..., int], patterns: Any, graph: Any) -> int:
    from torch._inductor.fx_passes import freezing_patterns, post_grad

    pipeline, freezing = COMPILE.value, freezing_patterns.pass_patterns
    assert pipeline is not None
    if patterns is freezing[0]:
        pipeline(graph)
    lists = (*freezing, *post_grad.pass_patterns)
    return stock(_inductors_own(patterns) if any(patterns is other for other in lists) else patterns, graph)


def _inductors_own(patterns: Any) -> Any:
    """The patterns without those of quantization passes."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    own = PatternMatcherPass(pass_name=patterns.pass_name)
    for key, entries in patterns.patterns.items():
        kept = [entry for entry in entries if _is_inductors_own(entry)]
        if kept:
            own.patterns[key] = kept
    return own


def _is_inductors_own(entry: Any) -> bool:
    """False for the patterns of Inductor's or a third party's quantization passes (told by the handler's module)."""
    handler = getattr(entry, "handler", None)
    module = getattr(handler, "__module__", "torch._inductor") or "torch._inductor"
    return module.startswith("torch._inductor") and not module.endswith(".quantization")


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.pattern_matcher",
        attribute="PatternMatcherPass.apply",
        replacement=_apply,
        why="Our passes need weights that are constants and a graph that Inductor has not packed yet: that is there "
        "between constant folding and the first of freezing's own patterns. Other libraries' patterns in the same lists "
        "would take the same nodes.",
        since="2.13",
        until="Inductor has a hook for passes inside of freezing, per compile. None filed; that there is no official way to "
        "register passes from outside is said in pytorch/ao#2555, and torchao registers its own on import for "
        "that reason (pytorch/ao#2140, pytorch/pytorch#178466).",
        instead="`register_freezing_graph_pattern` registers for every compile of the process, and behind what is there. Of "
        "the configured hooks, which take a `CustomGraphPass` with a `uuid`, `joint_custom_post_pass` runs before "
        "weights are constants and `post_grad_custom_pre_pass` after they are packed.",
        relies_on="Freezing applying `freezing_patterns.pass_patterns` from the first on, each once for a graph, and "
        "lowering those of `post_grad`; both looking the lists up at each call; a pattern's handler being of the module "
        "that registered it.",
        needs=(
            Needs("torch._inductor.fx_passes.freezing_patterns", "pass_patterns"),
            Needs(
                "torch._inductor.fx_passes.freezing_patterns", "freezing_passes", looks_up=("pass_patterns", "apply")
            ),
            Needs("torch._inductor.fx_passes.post_grad", "pass_patterns"),
            Needs("torch._inductor.fx_passes.post_grad", "post_grad_passes", looks_up=("pass_patterns",)),
            Needs("torch._inductor.pattern_matcher", "PatternMatcherPass", parameters=("pass_name",)),
        ),
    ),
)
