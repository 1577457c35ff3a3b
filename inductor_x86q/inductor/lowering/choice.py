"""What Inductor makes of the operators that stand for a call: the call, or a kernel of ours.

Inductor's template interface is private; it is reached in this folder and nowhere else. What is relied on here, all of it the
same in the supported versions: `register_lowering` for operators of other libraries, `ExternKernel.copy_input` giving a copy
whose layout is still open, and `Buffer.decide_layout` laying a result out as what it is computed from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V

from inductor_x86q.graph import calls
from inductor_x86q.graph.library import STANDS_FOR
from inductor_x86q.inductor import configuration
from inductor_x86q.inductor.lowering import cat, tuning
from inductor_x86q.inductor.lowering.layer import LayerTemplate, specified
from inductor_x86q.inductor.lowering.template import computed
from inductor_x86q.inductor.patches.constants_once import outer_graphs, readers
from inductor_x86q.kernels.specification import Specification


def _lower(target: Any, constants: Any, specification: str, *arguments: Any) -> Any:
    call = calls.parse(target, arguments)
    part = cat.place(V.graph.current_node) if call.family == "conv" else None
    inputs, given, convolution = specified(call, constants, specification, part)
    arguments = inputs.realized(arguments)
    templates = [LayerTemplate(inputs, convolution, kernel) for kernel in given.kernels]
    chosen = decide(target, arguments, given, templates)
    if chosen is None:
        forget(constants)
        return lowerings[target](*arguments)
    forget(call.weight, call.weight_scale, call.weight_zero_point, call.bias)
    return computed(chosen.generate().output_node(), part)


def decide(
    target: Any, arguments: tuple[Any, ...], given: Specification, templates: Sequence[LayerTemplate]
) -> LayerTemplate | None:
    """The kernel that computes a layer, of some, the best guess first; None for the call.

    Nothing is timed where a size is open: what is best for one is not for another.
    """
    if configuration.is_autotuning() and templates[0].inputs.is_known:
        return tuning.fastest(target, arguments, given, templates)
    return templates[0]


def forget(*constants: Any) -> None:
    """Takes what was meant for the other choice out of the compiled code, where no other operator reads it."""
    for constant in filter(None, constants):  # there may be no bias
        others = readers(V.graph, constant.get_name())
        others.discard(V.graph.current_node)
        if not others:
            # The module keeps it until the compile is done: whoever asks for the code only runs the graph itself.
            for graph in (V.graph, *outer_graphs(V.graph)):
                graph.constants.pop(constant.get_name(), None)


for _target, _call in STANDS_FOR.items():
    register_lowering(_target, type_promotion_kind=None)(functools.partial(_lower, _call))
