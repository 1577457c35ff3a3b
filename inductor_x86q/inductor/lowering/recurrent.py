"""What Inductor makes of the steps of a recurrent layer: a call of our kernel, for all of them.

Beside what `template` relies on, this relies on `to_dtype` and on a lowering giving a tuple for an operator with several
results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering, to_dtype
from torch._inductor.virtualized import V

from inductor_x86q.graph.outputs import KERNEL
from inductor_x86q.graph.qdq import QParams
from inductor_x86q.graph.recurrence import PACKED_RECURRENCE
from inductor_x86q.inductor.lowering.choice import forget
from inductor_x86q.inductor.lowering.placement import buffer, ints, laid_out
from inductor_x86q.inductor.lowering.template import Template, several
from inductor_x86q.inductor.patches.linked_objects import mark
from inductor_x86q.kernels import library
from inductor_x86q.kernels.recurrence import FIELDS, FLOATS, PARAMETERS, STRUCT, Kernel, Recurrence


class _Steps(Template):
    """The function that calls the kernel with a layer's sizes."""

    results = ("out", "states")

    def __init__(
        self, tensors: Mapping[str, Any], layout: ir.Layout, kernel: Kernel, values: Mapping[str, Any], macs: int
    ) -> None:
        self._tensors, self._kernel_of_ours, self._values = tensors, kernel, values
        by_name = {buffer(box).get_name(): buffer(box) for box in tensors.values()}
        self._names = {name: f"in{number}" for number, name in enumerate(by_name)}
        inputs = {self._names[name]: node for name, node in by_name.items()}
        super().__init__("x86q_steps", inputs, layout, values["batch"] * macs)

    def shared(self) -> Sequence[str]:
        kernel = self._kernel_of_ours
        return STRUCT, f'{mark(kernel)}\nextern "C" void {kernel.name}({PARAMETERS});\n'

    def body(self, name: str) -> str:
        values = {
            field: value if isinstance(value, float) else self.cpp(value) for field, value in self._values.items()
        }
        written = library.initialized(FIELDS, FLOATS, {**values, "threads": self.threads})
        tensors = [self._start(name) for name in ("x", "hidden", "cell_state", "constants")]
        results = [name if self.is_read(name) else "nullptr" for name in self.results]
        return f"""\
const X86qRecurrence sizes = {{{written}}};
{self._kernel_of_ours.name}({", ".join([*tensors, *results])}, &sizes);"""

    def _start(self, name: str) -> str:
        """The C++ of where a tensor begins."""
        box = self._tensors.get(name)
        if box is None:
            return "nullptr"
        return f"{self._names[buffer(box).get_name()]} + {self.cpp(ints([box.get_layout().offset])[0])}"


def _lower(
    constants: Any,
    specification: str,
    cell: str,
    x: Any,
    hidden: Any,
    cell_state: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    batch_first: bool,
    *of_output: Any,
) -> Any:
    given = Recurrence.read(specification)
    forget(weight, scale, bias)
    inputs = {"x": x, "hidden": hidden, "cell_state": cell_state}
    tensors = {
        name: laid_out(to_dtype(box, torch.float32), ir.ExternKernel.require_contiguous)
        for name, box in inputs.items()
        if box is not None
    }
    output, states = (ints(value.shape) for value in V.graph.current_node.meta["val"])
    grid = QParams(*of_output)
    first, second, out_row = output
    steps, batch = (second, first) if batch_first else (first, second)
    values = {
        **dict(steps=steps, batch=batch, hidden=given.hidden, directions=given.directions),
        **_strides("x", ints(x.get_size())[2], steps, batch, batch_first),
        **_strides("out", out_row, steps, batch, batch_first),
        **dict(zero_point=grid.zero_point, low=grid.quant_min, high=grid.quant_max, inverse_scale=1 / grid.scale),
    }
    layouts = [_layout(output, grid.dtype), _layout(states, torch.float32)]
    kernel = V.graph.current_node.meta[KERNEL]
    template = _Steps({**tensors, "constants": constants}, layouts[0], kernel, values, given.macs())
    return tuple(several(template, layouts))


def _strides(name: str, width: Any, steps: Any, batch: Any, batch_first: bool) -> dict[str, Any]:
    """Of a step and a row, in elements, where a row of a step is so wide."""
    step, row = (width, steps * width) if batch_first else (batch * width, width)
    return {f"{name}_step": step, f"{name}_row": row}


def _layout(size: list[Any], dtype: torch.dtype) -> ir.FixedLayout:
    return ir.FixedLayout(torch.device("cpu"), dtype, size, ir.FlexibleLayout.contiguous_strides(size))


register_lowering(PACKED_RECURRENCE, type_promotion_kind=None)(_lower)
