"""What Inductor makes of the steps of a recurrent layer: a call of our kernel, for all of them.

Beside what `template` relies on, this relies on `to_dtype` and on a lowering giving a tuple for an operator with several
results. They lie one behind the other in one buffer, since a template computes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering, to_dtype
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V

from inductor_x86q.graph.recurrence import PACKED_RECURRENCE
from inductor_x86q.inductor import configuration
from inductor_x86q.inductor.lowering.choice import forget
from inductor_x86q.inductor.lowering.placement import buffer, ints, laid_out
from inductor_x86q.inductor.lowering.template import Template, computed
from inductor_x86q.inductor.patches.linked_objects import mark
from inductor_x86q.kernels.recurrence import FIELDS, PARAMETERS, STRUCT, Kernel, Recurrence


class _Steps(Template):
    """The function that calls the kernel with a layer's sizes."""

    def __init__(
        self, tensors: Mapping[str, Any], layout: ir.Layout, kernel: Kernel, sizes: Mapping[str, Any], macs: int
    ) -> None:
        self._tensors, self._kernel_of_ours, self._sizes, self._macs = tensors, kernel, sizes, macs
        by_name = {buffer(box).get_name(): buffer(box) for box in tensors.values()}
        self._names = {name: f"in{number}" for number, name in enumerate(by_name)}
        inputs = {self._names[name]: node for name, node in by_name.items()}
        super().__init__("x86q_steps", inputs, layout, self._threads if isinstance(self._threads, int) else 0)

    @property
    def _threads(self) -> int | None:
        """How many threads share the multiply-accumulates of a step; None where its rows are not known when compiling."""
        batch = self._sizes["batch"]
        if not isinstance(batch, int):
            return None
        return configuration.threads(batch * self._macs, configuration.MACS_PER_THREAD)

    def shared(self) -> Sequence[str]:
        kernel = self._kernel_of_ours
        return STRUCT, f'{mark(kernel)}\nextern "C" void {kernel.name}({PARAMETERS});\n'

    def body(self, name: str) -> str:
        sizes = {field: self._size(value) for field, value in self._sizes.items()}
        threads: Any = self._threads
        if threads is None:
            threads = configuration.threads_cpp(f"{sizes['batch']} * {self._macs}", configuration.MACS_PER_THREAD)
        values = {**sizes, "threads": threads}
        states = f"out + {sizes['steps']} * {sizes['batch']} * {sizes['directions']} * {sizes['hidden']}"
        tensors = [self._start(name) for name in ("x", "hidden", "cell_state", "constants")]
        return f"""\
const X86qRecurrence sizes = {{{", ".join(str(values[field]) for field in FIELDS)}}};
{self._kernel_of_ours.name}({", ".join(tensors)}, out, {states}, &sizes);"""

    def _size(self, size: Any) -> str:
        return str(size) if isinstance(size, int) else self.cpp(size)

    def _start(self, name: str) -> str:
        """The C++ of where a tensor begins."""
        box = self._tensors.get(name)
        if box is None:
            return "nullptr"
        return f"{self._names[buffer(box).get_name()]} + {self._size(ints([box.get_layout().offset])[0])}"


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
    first, second, _ = output
    steps, batch = (second, first) if batch_first else (first, second)
    layout = ir.FixedLayout(torch.device("cpu"), torch.float32, [sympy_product(output) + sympy_product(states)], [1])
    x_row, out_row = ints(x.get_size())[2], output[2]
    sizes = {
        **dict(steps=steps, batch=batch, hidden=given.hidden, directions=given.directions),
        **_strides("x", x_row, steps, batch, batch_first),
        **_strides("out", out_row, steps, batch, batch_first),
    }
    kernel = given.kernel()
    template = _Steps({**tensors, "constants": constants}, layout, kernel, sizes, given.macs())
    whole = computed(template.generate().output_node(), None)
    return _part(whole, output, 0), _part(whole, states, sympy_product(output))


def _strides(name: str, width: Any, steps: Any, batch: Any, batch_first: bool) -> dict[str, Any]:
    """Of a step and a row, in elements, where a row of a step is so wide."""
    step, row = (width, steps * width) if batch_first else (batch * width, width)
    return {f"{name}_step": step, f"{name}_row": row}


def _part(whole: Any, size: list[Any], offset: Any) -> Any:
    stride = ir.FlexibleLayout.contiguous_strides(size)
    layout = ir.FixedLayout(torch.device("cpu"), torch.float32, size, stride, offset)
    return ir.TensorBox(ir.ReinterpretView(data=whole.data, layout=layout))


register_lowering(PACKED_RECURRENCE, type_promotion_kind=None)(_lower)
