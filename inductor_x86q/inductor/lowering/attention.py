"""What Inductor makes of int8 attention: a call of its kernel, on the views that query, key and value are.

Beside what `lowering` relies on, this relies on `realize_input` giving a view of a buffer with its strides, and on a layout being
fixed once it is asked for frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V

from inductor_x86q.graph.attention import TARGETS, Attention
from inductor_x86q.graph.outputs import KERNEL
from inductor_x86q.inductor.lowering.placement import buffer, ints
from inductor_x86q.inductor.lowering.template import Template, computed
from inductor_x86q.inductor.patches.linked_objects import mark
from inductor_x86q.kernels import library
from inductor_x86q.kernels.attention import FIELDS, FLOATS, PARAMETERS, STRUCT, AttentionKernel


@dataclasses.dataclass(frozen=True)
class Rows:
    """A tensor (batch, heads, rows, width) in a buffer, its last dimension without gaps; missing dimensions are of size 1.

    What is not known when compiling is Inductor's expression of it.
    """

    buffer: Any
    offset: Any
    sizes: list[Any]
    strides: list[Any]

    @staticmethod
    def of(box: Any) -> Rows:
        box.realize()
        found = ir.ExternKernel.realize_input(box)
        if found.maybe_get_layout() is None or (ints(found.get_stride())[-1] != 1 and ints(found.get_size())[-1] != 1):
            found = ir.ExternKernel.require_contiguous(ir.ExternKernel.copy_input(found))
        buffer(found).freeze_layout()
        layout = found.get_layout()
        sizes, strides = ints(layout.size), ints(layout.stride)
        missing = 4 - len(sizes)
        (offset,) = ints([layout.offset])
        return Rows(buffer(found), offset, [1] * missing + sizes, [0] * missing + strides)

    def repeated(self) -> list[Any]:
        """The strides, 0 along dimensions of one element, which stands for all."""
        return [0 if size == 1 else stride for size, stride in zip(self.sizes, self.strides, strict=True)]


_OPERANDS = ("query", "key", "value")


class AttentionTemplate(Template):
    """The function that calls the kernel with sizes, strides and numbers."""

    def __init__(
        self, call: Attention, kernel: AttentionKernel, tensors: dict[str, Rows], layout: ir.FixedLayout
    ) -> None:
        names: dict[str, str] = {}
        for name, rows in tensors.items():
            names.setdefault(rows.buffer.get_name(), name)
        inputs = {name: tensors[name].buffer for name in names.values()}
        self._call, self._tensors, self._names, self._layout = call, tensors, names, layout
        query, key, value = (tensors[name].sizes for name in _OPERANDS)
        macs = sympy_product([*query[:3], key[2]]) * (query[3] + value[3])
        super().__init__("x86q_attention", inputs, layout, macs)
        self.kernel = kernel

    def shared(self) -> Sequence[str]:
        return STRUCT, f'{mark(self.kernel)}\nextern "C" void {self.kernel.name}({PARAMETERS});\n'

    def body(self, name: str) -> str:
        values = self._values()
        is_known = all(isinstance(value, (int, float)) for value in values.values())
        written = library.initialized(FIELDS, FLOATS, {field: self._written(value) for field, value in values.items()})
        addresses = ", ".join(self._address(name) for name in ("query", "key", "value", "mask"))
        return f"""\
{"static " if is_known else ""}const X86qAttention arguments = {{{written}}};
{self.kernel.name}({addresses}, out, &arguments);"""

    def _written(self, value: Any) -> Any:
        return value if isinstance(value, (int, float, str)) else self.cpp(value)

    def _address(self, name: str) -> str:
        if name not in self._tensors:
            return "nullptr"
        rows = self._tensors[name]
        return f"{self._names[rows.buffer.get_name()]} + {self.cpp(rows.offset)}"

    def _values(self) -> dict[str, Any]:
        call, tensors = self._call, self._tensors
        query, key, value = (tensors[name] for name in _OPERANDS)
        found: dict[str, Any] = {
            **dict(batch=query.sizes[0], heads=query.sizes[1], key_heads=key.sizes[1]),
            **dict(queries=query.sizes[2], keys=key.sizes[2], width=query.sizes[3], value_width=value.sizes[3]),
            **dict(is_causal=int(call.is_causal), query_zero_point=call.query_zero_point),
            **dict(key_zero_point=call.key_zero_point, value_zero_point=call.value_zero_point),
            **dict(zero_point=call.output_zero_point, low=call.quant_min, high=call.quant_max),
            **dict(threads=self.threads, inverse_scale=1 / call.output_scale),
            **self._scales(),
        }
        strides = {name: tensors[name].strides for name in _OPERANDS}
        strides["mask"] = tensors["mask"].repeated() if "mask" in tensors else [0, 0, 0, 0]
        found["mask_key"] = strides["mask"][3]
        out = ints(self._layout.stride)
        strides["out"] = [0] * (4 - len(out)) + out
        for name, (batch, head, row, *_) in strides.items():
            found |= {f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": row}
        return found

    def _scales(self) -> dict[str, Any]:
        call = self._call
        if call.is_by_rows:
            places = {f"{name}_scales": f"(int64_t)({self._address(f'{name}_scales')})" for name in _OPERANDS}
            return {**places, "factor": call.scale, "value_scale": 0.0}
        nowhere = {f"{name}_scales": 0 for name in _OPERANDS}
        return {**nowhere, "factor": call.query_scale * call.key_scale * call.scale, "value_scale": call.value_scale}


def _lower(*arguments: Any) -> Any:
    call = Attention(*arguments)
    tensors = {name: Rows.of(getattr(call, name)) for name in _OPERANDS}
    if call.is_by_rows:
        contiguous = ir.ExternKernel.require_contiguous
        tensors |= {f"{name}_scales": Rows.of(contiguous(getattr(call, f"{name}_scale"))) for name in _OPERANDS}
    if call.mask is not None:
        tensors["mask"] = Rows.of(call.mask)
    node = V.graph.current_node
    size = ints(node.meta["val"].shape)
    *batch, heads, rows, width = size
    stride = [*([rows * heads * width] if batch else []), width, heads * width, 1]
    layout = ir.FixedLayout(torch.device("cpu"), call.output_dtype, size, stride)
    return computed(AttentionTemplate(call, node.meta[KERNEL], tensors, layout).generate().output_node(), None)


register_lowering(TARGETS, type_promotion_kind=None)(_lower)
