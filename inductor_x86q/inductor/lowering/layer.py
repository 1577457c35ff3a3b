"""One layer as a kernel of ours in Inductor's hands: what it reads, and the function that calls the kernel's object."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch._inductor import ir
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V

from inductor_x86q.errors import CompileError
from inductor_x86q.graph import calls
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.inductor.lowering.placement import Pixels, buffer, contiguous, image, ints, pixels
from inductor_x86q.inductor.lowering.template import Template
from inductor_x86q.inductor.patches.linked_objects import mark
from inductor_x86q.kernels.arguments import PARAMETERS, STRUCT, arguments
from inductor_x86q.kernels.convolution import FEW_CHANNELS, Convolution, Depth
from inductor_x86q.kernels.family import Kernel
from inductor_x86q.kernels.specification import Specification


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The buffers that a kernel reads, and where in them its tensors begin."""

    x: Pixels
    constants: Any
    other: Pixels | None
    layout: Any  # of the output
    scales: Pixels | None = None  # of the input, where they are computed at run time
    zero_points: Pixels | None = None

    def open_sizes(self) -> dict[str, Any]:
        """The kernel's arguments that are not known when compiling, as Inductor's expressions."""
        names = ("n", "h", "w", "d", "x_image", "x_row", "x_pixel", "x_plane", "x_channel")
        values = (*self.x.sizes[:3], self.x.planes, *self.x.strides, self.x.plane, self.x.channel)
        return {name: value for name, value in zip(names, values, strict=True) if not isinstance(value, int)}

    @property
    def is_known(self) -> bool:
        """Whether all sizes, strides and places are known when compiling."""
        tensors = (self.x, self.other, self.scales, self.zero_points)
        return not self.open_sizes() and all(isinstance(tensor.offset, int) for tensor in tensors if tensor is not None)

    def realized(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The call's arguments, with the tensors as the kernels read them: the first three, and a binary call's seventh."""
        changed = list(arguments)
        for position, tensor in ((0, self.x), (1, self.scales), (2, self.zero_points), (6, self.other)):
            if tensor is not None:
                changed[position] = tensor.box
        return tuple(changed)

    def by_name(self) -> dict[str, Any]:
        """Each buffer under one name, also where two operands lie in one."""
        found = {"x": self.x.buffer, "constants": self.constants}
        for name, tensor in (("other", self.other), ("x_scales", self.scales), ("x_zero_points", self.zero_points)):
            if tensor is not None and all(tensor.buffer.get_name() != other.get_name() for other in found.values()):
                found[name] = tensor.buffer
        return found

    def computed(self) -> dict[str, Pixels]:
        """The tensors whose addresses are arguments of the kernel, by its names of these."""
        found = {"x_scales": self.scales, "x_zero_points": self.zero_points}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nodes(self) -> list[Any]:
        return list(self.by_name().values())


class LayerTemplate(Template):
    """The function that calls a kernel with a layer's sizes."""

    def __init__(self, inputs: Inputs, convolution: Convolution, kernel: Kernel) -> None:
        outputs = sympy_product(inputs.layout.size)
        of_output = convolution.macs // (convolution.pixels * convolution.out_c)
        work = outputs * of_output if inputs.open_sizes() else convolution.macs
        super().__init__("x86q", inputs.by_name(), inputs.layout, work)
        self.inputs, self.convolution, self.kernel = inputs, convolution, kernel

    def shared(self) -> Sequence[str]:
        return STRUCT, f'{mark(self.kernel)}\nextern "C" void {self.kernel.name}({PARAMETERS});\n'

    def body(self, name: str) -> str:
        x, other = self.inputs.x, self.inputs.other
        addend = self.address(other) if other is not None else "nullptr"
        open_ = self._open() | self._computed()
        values = arguments(self.convolution, **open_)
        return f"""\
{"" if open_ else "static "}const X86qArguments arguments = {{{", ".join(map(str, values))}}};
{self.kernel.name}({self.address(x)}, constants, {addend}, out, &arguments);"""

    def _computed(self) -> dict[str, str | int]:
        """The arguments that say where scales and zero points are."""
        found = self.inputs.computed()
        addresses = {name: f"(int64_t)({self.address(tensor)})" for name, tensor in found.items()}
        return {**addresses, **steps(found)}

    def _open(self) -> dict[str, str | int]:
        """The C++ of the arguments that are not known when compiling."""
        open_ = {name: self.cpp(value) for name, value in self.inputs.open_sizes().items()}
        return {**open_, "threads": self.threads} if open_ else {}


def steps(computed: dict[str, Pixels]) -> dict[str, int]:
    """The arguments that say whether each pixel has a scale, and a zero point, of its own."""
    return {f"{name}_step": int(tensor.sizes[2] != 1) for name, tensor in computed.items()}


def specified(
    call: calls.Call, constants: Any, text: str, part: ir.ReinterpretView | None
) -> tuple[Inputs, Specification, Convolution]:
    """What a kernel reads, what is specified of it, and that with where all lies.

    Args:
        part: of a larger image that the result is, if any.
    """
    x = _input(call)
    other = pixels(call.binary.other, call.family, even=True) if call.binary is not None else None
    size = ints(V.graph.current_node.meta["val"].shape)
    layout = contiguous(size, call.output_dtype, call.family, part)
    given = Specification.read(text)
    depth = given.convolution.depth
    if depth != Depth():
        depth = dataclasses.replace(depth, x_stride=_number(x.plane))
    convolution = dataclasses.replace(
        given.convolution,
        depth=depth,
        x_strides=(_number(x.strides[0]), _number(x.strides[1]), _number(x.strides[2])),
        x_channel=_number(x.channel),
        other_pixel=0 if other is None else other.strides[2],
        out_pixel=0 if part is None else layout.stride[3],
    )
    _check(convolution, int(constants.get_size()[0]))
    return Inputs(x, buffer(constants), other, layout, *_computed_parameters(call)), given, convolution


def _computed_parameters(call: calls.Call) -> tuple[Pixels | None, Pixels | None]:
    """The input's scales and zero points where they are tensors; the kernel reads them, also those that are constants."""
    if call.is_static:
        return None, None
    return pixels(call.x_scale, "linear"), pixels(call.x_zero_point, "linear")


def _number(size: Any) -> int:
    """A size, 0 where it is not known when compiling."""
    return size if isinstance(size, int) else 0


def _check(found: Convolution, size: int) -> None:
    """Raises CompileError where the kernel would not read just what was packed for it."""
    if found.constants_size != size:
        raise CompileError(
            f"layer {layer_of(V.graph.current_node)}: {size} bytes of constants were packed for its kernel, which reads "
            f"{found.constants_size}: an error of inductor_x86q, whose passes and lowering differ on {found}"
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
