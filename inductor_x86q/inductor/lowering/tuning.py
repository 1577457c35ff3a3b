"""Mode "max-autotune": a layer's call and kernels timed against each other, and the fastest taken.

What is relied on, all of it the same in the supported versions: `ChoiceCaller` being what the selection times, and
`autotune_select_algorithm` timing the choices once for a shape, keeping the times in Inductor's autotuning cache under the
shapes and the choices' `hash_key`, and giving what the fastest one's `output_node` gives.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.select_algorithm import autotune_select_algorithm
from torch._inductor.virtualized import V

from inductor_x86q import cpu
from inductor_x86q.graph import per_token
from inductor_x86q.inductor import objects
from inductor_x86q.inductor.lowering.layer import Inputs, LayerTemplate, steps
from inductor_x86q.inductor.lowering.placement import Pixels, ints
from inductor_x86q.kernels.arguments import arguments
from inductor_x86q.kernels.specification import Specification


def fastest(
    target: Any, arguments: tuple[Any, ...], given: Specification, templates: Sequence[LayerTemplate]
) -> LayerTemplate | None:
    """The fastest of these kernels; None where the call is faster still."""
    inputs, convolution = templates[0].inputs, templates[0].convolution
    layer = f"{cpu.identity()} {convolution} {given.epilogue}"
    calls = [] if target in per_token.TARGETS else [CallChoice(inputs, target, arguments, layer)]
    kernels = [KernelChoice(template, layer) for template in templates]
    choices: list[Choice] = [*calls, *kernels]
    contest = Contest(choices, usual=calls[0] if calls and given.is_call else kernels[0])
    for choice in choices:
        choice.contest = contest
    generators = dict.fromkeys(range(len(inputs.nodes)), _filled)
    chosen = autotune_select_algorithm("x86q", choices, inputs.nodes, inputs.layout, input_gen_fns=generators)
    best = chosen[0] if isinstance(chosen, tuple) else chosen  # a pair in newer versions
    return best.template if isinstance(best, KernelChoice) else None


class Choice(ir.ChoiceCaller):
    contest: Contest

    def __init__(self, inputs: Inputs, name: str, layer: str) -> None:
        super().__init__(name, inputs.nodes, inputs.layout, description=name)
        self.inputs, self._key = inputs, f"{name} {layer}"

    def benchmark(self, *values: torch.Tensor, out: torch.Tensor) -> float:
        return self.contest.milliseconds(self, values, out)

    def runner(self, values: Sequence[torch.Tensor], out: torch.Tensor) -> Callable[[], Any]:
        """What is timed, on these tensors in the place of the inputs' buffers."""
        raise NotImplementedError

    def call_name(self) -> str:
        return str(self.name)

    def hash_key(self) -> str:
        return self._key

    def output_node(self) -> Any:
        """Stands for the result, which lowering makes."""
        return self


class CallChoice(Choice):
    """The call of oneDNN, timed on the layer's own weight."""

    def __init__(self, inputs: Inputs, target: Any, arguments: tuple[Any, ...], layer: str) -> None:
        super().__init__(inputs, str(target), layer)
        self._target, self._arguments = target, arguments

    def runner(self, values: Sequence[torch.Tensor], out: torch.Tensor) -> Callable[[], Any]:
        given = {node.get_name(): value for node, value in zip(self.inputs.nodes, values, strict=True)}
        arguments = [_real(argument, given) for argument in self._arguments]
        return lambda: self._target(*arguments)


class KernelChoice(Choice):
    """A kernel of ours."""

    def __init__(self, template: LayerTemplate, layer: str) -> None:
        super().__init__(template.inputs, template.kernel.name, layer)
        self.template = template

    def runner(self, values: Sequence[torch.Tensor], out: torch.Tensor) -> Callable[[], Any]:
        given = {node.get_name(): value for node, value in zip(self.inputs.nodes, values, strict=True)}
        x, other = self.inputs.x, self.inputs.other
        constants = given[self.inputs.constants.get_name()].data_ptr()
        addresses = [_address(x, given), constants, _address(other, given) if other else 0, out.data_ptr()]
        computed = self.inputs.computed()
        places = {name: _address(tensor, given) for name, tensor in computed.items()}
        numbers = [int(value) for value in arguments(self.template.convolution, **places, **steps(computed))]
        struct = (ctypes.c_int64 * len(numbers))(*numbers)
        function = objects.load(self.template.kernel)
        pointers = [ctypes.c_void_p(address) for address in addresses]
        return lambda: function(*pointers, struct)


def _address(image: Pixels, given: dict[str, torch.Tensor]) -> int:
    return given[image.buffer.get_name()].data_ptr() + image.offset * image.box.get_dtype().itemsize


class Contest:
    """The choices for one layer, timed against each other when the first of them is asked for its time.

    They take turns, so that a slow moment of the machine meets all of them, and each counts as fast as its fastest call:
    whatever else runs only adds to a call. With threads that wait for each other it adds up to a time slice of the
    scheduler to most calls, so that on a busy machine medians say nothing at all. Hence no compiler runs beside them, and
    what is not the usual choice, the one without timing, has to be clearly faster: its time counts for more than it is.
    """

    ROUNDS, SECONDS = 6, 0.015  # of a turn
    HANDICAP = 1.05

    def __init__(self, choices: Sequence[Choice], usual: Choice) -> None:
        self._choices, self._usual = choices, usual
        self._times: dict[Choice, float] = {}
        self._failures: dict[Choice, Exception] = {}

    def milliseconds(self, choice: Choice, values: Sequence[torch.Tensor], out: torch.Tensor) -> float:
        if not self._times:
            self._run(values, out)
        if choice in self._failures:
            raise self._failures[choice]
        return self._times[choice] * (1 if choice is self._usual else self.HANDICAP)

    def _run(self, values: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        runs: dict[Choice, Callable[[], Any]] = {}
        for choice in self._choices:
            try:
                runs[choice] = choice.runner(values, out)
            except Exception as error:  # a choice that cannot be built is no reason to fail: Inductor passes over it
                self._failures[choice] = error
        objects.wait()
        for _ in range(self.ROUNDS):
            for choice, run in runs.items():
                self._times[choice] = min(_fastest(run, self.SECONDS), self._times.get(choice, math.inf))


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
