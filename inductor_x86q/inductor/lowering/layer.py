"""One layer as a kernel of ours in Inductor's hands: what it reads, and the function that calls the kernel's object."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch._inductor import ir
from torch._inductor.virtualized import V

from inductor_x86q.errors import CompileError
from inductor_x86q.graph import calls
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.inductor.lowering.placement import Pixels, buffer, contiguous, image, ints, pixels
from inductor_x86q.inductor.lowering.template import Template
from inductor_x86q.inductor.patches.linked_objects import mark
from inductor_x86q.kernels import family
from inductor_x86q.kernels.convolution import FEW_CHANNELS, Convolution
from inductor_x86q.kernels.specification import Specification


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The buffers that a kernel reads, and where in them its tensors begin."""

    x: Pixels
    constants: Any
    other: Pixels | None
    layout: Any  # of the output

    def realized(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The call's arguments, with the tensors as the kernels read them: the first, and a binary call's seventh."""
        changed = list(arguments)
        changed[0] = self.x.box
        if self.other is not None:
            changed[6] = self.other.box
        return tuple(changed)

    def by_name(self) -> dict[str, Any]:
        """Each buffer under one name, also where the other operand lies in the input's."""
        found = {"x": self.x.buffer, "constants": self.constants}
        if self.other is not None and self.other.buffer.get_name() != self.x.buffer.get_name():
            found["other"] = self.other.buffer
        return found

    @property
    def nodes(self) -> list[Any]:
        return list(self.by_name().values())


class LayerTemplate(Template):
    """The function that calls a kernel with a layer's sizes."""

    def __init__(self, inputs: Inputs, convolution: Convolution, kernel: family.Kernel) -> None:
        super().__init__("x86q", inputs.by_name(), inputs.layout, convolution.threads)
        self.inputs, self.kernel, self.arguments = inputs, kernel, family.arguments(convolution)

    def shared(self) -> Sequence[str]:
        parameters = (
            "const void* x, const void* constants, const void* other, void* out, const X86qArguments* arguments"
        )
        return family.STRUCT, f'{mark(self.kernel)}\nextern "C" void {self.kernel.name}({parameters});\n'

    def body(self, name: str) -> str:
        x, other = self.inputs.x, self.inputs.other
        addend = self.address(other) if other is not None else "nullptr"
        return f"""\
static const X86qArguments arguments = {{{", ".join(map(str, self.arguments))}}};
{self.kernel.name}({self.address(x)}, constants, {addend}, out, &arguments);"""


def specified(
    call: calls.Call, constants: Any, text: str, part: ir.ReinterpretView | None
) -> tuple[Inputs, Specification]:
    """What a kernel reads, and computes as `part` of a larger image where there is one: as specified, and where all lies."""
    x = _input(call)
    other = pixels(call.binary.other, call.family, even=True) if call.binary is not None else None
    size = ints(V.graph.current_node.meta["val"].shape)
    layout = contiguous(size, call.output_dtype, call.family, part)
    given = Specification.read(text)
    convolution = dataclasses.replace(
        given.convolution,
        x_strides=x.strides,
        x_channel=x.channel,
        other_pixel=0 if other is None else other.strides[2],
        out_pixel=0 if part is None else layout.stride[3],
    )
    found = dataclasses.replace(given, convolution=convolution)
    _check(call, found, int(constants.get_size()[0]))
    return Inputs(x, buffer(constants), other, layout), found


def _check(call: calls.Call, found: Specification, size: int) -> None:
    """Raises CompileError where the kernel would not read just what was packed for it."""
    if found.convolution.constants_size != size:
        raise CompileError(
            f"layer {layer_of(V.graph.current_node)}: {size} bytes of constants were packed for its kernel, which reads "
            f"{found.convolution.constants_size}: an error of inductor_x86q, whose passes and lowering differ on {found.convolution}"
        )


def _input(call: calls.Call) -> Pixels:
    """The pixels that a layer reads; an image of few channels lies as what it is computed from."""
    x: Any = call.x
    few = call.family == "conv" and call.geometry[3] == 1 and 1 < int(x.get_size()[1]) <= FEW_CHANNELS
    if few:
        x.realize()
    if few and isinstance(x.data, ir.StorageBox):
        buffer(x).decide_layout()
        return image(x)
    return pixels(x, call.family)
