"""What Inductor makes of the operators that stand for a call: the call, or a kernel of ours, whichever is faster.

Inductor's template interface is private; it is reached in this package's files and nowhere else. What is relied on, all of it
the same in the supported versions: `ChoiceCaller` being what the selection times and builds (a template's by its `bmreq`),
`autotune_select_algorithm` timing the choices once for a shape and keeping the result in Inductor's autotuning cache,
`register_lowering` for operators of other libraries, `ExternKernel.copy_input` giving a copy whose layout is still
open, and `Buffer.decide_layout` laying a result out as what it is computed from.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.select_algorithm import autotune_select_algorithm
from torch._inductor.virtualized import V

from inductor_x86q import cpu
from inductor_x86q.graph import calls
from inductor_x86q.graph.library import STANDS_FOR
from inductor_x86q.inductor.lowering import cat
from inductor_x86q.inductor.lowering.layer import FEW_CHANNELS, describe, epilogue
from inductor_x86q.inductor.lowering.placement import Pixels, buffer, contiguous, image, ints, pixels
from inductor_x86q.inductor.lowering.template import Template, computed, threads
from inductor_x86q.inductor.patches.constants_once import readers
from inductor_x86q.kernels.convolution import Convolution, Epilogue, header, namespace

# A thread more pays where it saves more than waking it costs, which is about this many multiply-accumulates.
MACS_PER_THREAD = 100_000


class _Layer(Template):
    """The generated kernel for one layer, in one blocking."""

    def __init__(
        self, inputs: _Inputs, convolution: Convolution, epilogue: Epilogue, blocking: tuple[int, int]
    ) -> None:
        super().__init__("x86q", inputs.by_name(), inputs.layout, convolution.threads)
        self._inputs, self._convolution, self._epilogue, self._blocking = inputs, convolution, epilogue, blocking

    def shared(self) -> str:
        """What all kernels share. Inductor's own prefix is left out: it takes longer to compile than the kernel."""
        return header(self._convolution.lanes)

    def before(self, name: str) -> str:
        return f"""\
namespace shape_of_{name} {{
using namespace {namespace(self._convolution.lanes)};
{self._convolution.source(*self._blocking)}{self._epilogue.source()}}}
"""

    def body(self, name: str) -> str:
        x, other = self._inputs.x, self._inputs.other
        shape, library = f"shape_of_{name}", namespace(self._convolution.lanes)
        addend = self.address(other) if other is not None else "nullptr"
        return f"""\
{library}::{self._convolution.function}<{shape}::Shape, {shape}::Epilogue>(
    (const uint8_t*){self.address(x)}, (const int32_t*)constants, {addend}, out);"""


@dataclasses.dataclass(frozen=True)
class _Inputs:
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


class _Call(ir.ChoiceCaller):
    """The call of oneDNN as one of the choices, timed on the layer's own weight."""

    def __init__(self, inputs: _Inputs, target: Any, arguments: tuple[Any, ...], key: str) -> None:
        super().__init__("onednn", inputs.nodes, inputs.layout, description=str(target))
        self._inputs, self._target, self._arguments, self._key = inputs, target, arguments, key
        self.is_chosen = False
        self.contest: _Contest

    def benchmark(self, *values: torch.Tensor, out: torch.Tensor) -> float:
        return self.contest.milliseconds(self, values, out)

    def runner(self, values: Sequence[torch.Tensor]) -> Callable[[], Any]:
        given = {node.get_name(): value for node, value in zip(self._inputs.nodes, values, strict=True)}
        arguments = [_real(argument, given) for argument in self._arguments]
        return lambda: self._target(*arguments)

    def call_name(self) -> str:
        return str(self._target)

    def hash_key(self) -> str:
        return f"{self._target}-{self._key}"

    def output_node(self) -> Any:
        self.is_chosen = True
        return lowerings[self._target](*self._arguments)


class _Contest:
    """The choices for one layer, timed against each other when the first of them is asked for its time.

    They take turns, so that a slow moment of the machine meets all of them, and each counts as fast as its fastest call:
    whatever else runs only adds to a call. With threads that wait for each other it adds up to a time slice of the
    scheduler to most calls, so that on a busy machine medians say nothing at all.
    """

    ROUNDS, SECONDS = 6, 0.015  # of a turn

    def __init__(self, call: _Call, templates: Sequence[Any]) -> None:
        self._call, self._templates = call, templates
        self._times: dict[Any, float] = {}
        self._failures: dict[Any, Exception] = {}
        call.contest = self
        for choice in templates:
            choice.benchmark = lambda *values, out, choice=choice: self.milliseconds(choice, values, out)

    def milliseconds(self, choice: Any, values: Sequence[torch.Tensor], out: torch.Tensor) -> float:
        if not self._times:
            self._run(values, out)
        if choice in self._failures:
            raise self._failures[choice]
        return self._times[choice]

    def _run(self, values: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        runs: dict[Any, Callable[[], Any]] = {self._call: self._call.runner(values)}
        # Compiled side by side; Inductor does so only on some versions of Python.
        with ThreadPoolExecutor() as pool:
            builds = [pool.submit(contextvars.copy_context().run, choice.precompile) for choice in self._templates]
        for choice, built in zip(self._templates, builds, strict=True):
            try:
                built.result()
                runs[choice] = choice.bmreq.make_run_fn(*values, out=out)
            except Exception as error:  # a choice that cannot be built is no reason to fail: Inductor passes over it
                self._failures[choice] = error
        for _ in range(self.ROUNDS):
            for choice, run in runs.items():
                self._times[choice] = min(_fastest(run, self.SECONDS), self._times.get(choice, math.inf))
        for choice in self._templates:
            choice.bmreq.cleanup_run_fn()


def _fastest(run: Callable[[], Any], seconds: float) -> float:
    """The milliseconds of the fastest call in so much time, of three at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or len(times) < 3:
        run()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def _real(argument: Any, given: dict[str, torch.Tensor]) -> Any:
    """A tensor for an argument of the call: a constant itself, else a view of the buffer as it was given for timing."""
    if not isinstance(argument, ir.TensorBox):
        return argument
    name = argument.get_name()
    if name in V.graph.constants:
        return V.graph.constants[name]
    layout = argument.get_layout()
    return given[name].as_strided(ints(layout.size), ints(layout.stride), int(layout.offset))


def _filled(node: Any) -> torch.Tensor:
    """A buffer's contents for timing; their values do not matter to integer arithmetic, but fp32 should be finite."""
    if node.get_name() in V.graph.constants:
        return V.graph.constants[node.get_name()]
    size, stride = ints(node.get_size()), ints(node.get_stride())
    return torch.empty_strided(size, stride, dtype=node.get_dtype()).fill_(1)


def _input(layer: calls.Call) -> Pixels:
    """The pixels that a layer reads; an image of few channels lies as what it is computed from."""
    x: Any = layer.x
    few = layer.family == "conv" and layer.geometry[3] == 1 and 1 < int(x.get_size()[1]) <= FEW_CHANNELS
    if few:
        x.realize()
    if few and isinstance(x.data, ir.StorageBox):
        buffer(x).decide_layout()
        return image(x)
    return pixels(x, layer.family)


def _lower(target: Any, constants: Any, kernel: list[int], *arguments: Any) -> Any:
    layer = calls.parse(target, arguments)
    part = cat.place(V.graph.current_node) if layer.family == "conv" else None
    inputs, convolution, after = _layer(layer, constants, kernel, part)
    arguments = inputs.realized(arguments)
    key = repr((convolution, after))
    as_call = _Call(inputs, target, arguments, key)
    blockings = convolution.blockings(cpu.vector_registers())
    templates = [_Layer(inputs, convolution, after, blocking).generate() for blocking in blockings]
    _Contest(as_call, templates)
    generators = dict.fromkeys(range(len(inputs.nodes)), _filled)
    choices = [as_call, *templates]
    chosen = autotune_select_algorithm("x86q", choices, inputs.nodes, inputs.layout, input_gen_fns=generators)
    box = chosen[0] if isinstance(chosen, tuple) else chosen  # a pair in newer versions
    if as_call.is_chosen:
        _forget(constants)
    else:
        box = computed(box, part)
        _forget(layer.weight, layer.weight_scale, layer.weight_zero_point, layer.bias)
    return box


def _forget(*constants: Any) -> None:
    """Takes what was meant for the other choice out of the compiled code, where no other operator reads it."""
    for constant in filter(None, constants):  # there may be no bias
        others = readers(V.graph, constant.get_name())
        others.discard(V.graph.current_node)
        if not others:
            # The module keeps it until the compile is done: whoever asks for the code only runs the graph itself.
            V.graph.constants.pop(constant.get_name(), None)


def _layer(
    layer: calls.Call, constants: Any, kernel: list[int], part: ir.ReinterpretView | None
) -> tuple[_Inputs, Convolution, Epilogue]:
    """What a generated kernel has to compute, as `part` of a larger image where there is one."""
    x = _input(layer)
    other = pixels(layer.binary.other, layer.family, even=True) if layer.binary is not None else None
    size = ints(V.graph.current_node.meta["val"].shape)
    convolution = describe(layer, x.sizes, size, kernel, x.box.get_dtype())
    convolution = dataclasses.replace(
        convolution, x_strides=x.strides, x_channel=x.channel, threads=threads(convolution.macs, MACS_PER_THREAD)
    )
    if other is not None:
        convolution = dataclasses.replace(convolution, other_pixel=other.strides[2])
    layout = contiguous(size, layer.output_dtype, layer.family, part)
    if part is not None:
        convolution = dataclasses.replace(convolution, out_pixel=layout.stride[3])
    inputs = _Inputs(x, buffer(constants), other, layout)
    return inputs, convolution, epilogue(layer, other.box.get_dtype() if other is not None else None)


for _target, _call in STANDS_FOR.items():
    register_lowering(_target, type_promotion_kind=None)(functools.partial(_lower, _call))
