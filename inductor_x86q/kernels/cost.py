"""What a layer costs on a CPU, as far as it can be told without timing: which kernel is best, or whether oneDNN's call is.

A kernel's time is a sum of how often it does what, which its shape says, times what each costs, which is fitted to times that
were measured on one CPU (`measurements.json`, `weights.json`; `python -m inductor_x86q.tools.fit_kernels`). What is known
of other CPUs scales it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib import resources

import torch

from inductor_x86q import cpu
from inductor_x86q.kernels import isa
from inductor_x86q.kernels.convolution import Convolution
from inductor_x86q.kernels.epilogue import Epilogue
from inductor_x86q.kernels.family import Kernel, candidates

ONEDNN = "onednn"
Choice = Kernel | str
Work = dict[str, float]  # how often something is done


def choose(convolution: Convolution, epilogue: Epilogue) -> list[Choice]:
    """What may compute a layer, the best first; `ONEDNN` stands for the call."""
    name = isa.best(cpu.usable_flags(), convolution.lanes)
    found: list[Choice] = [*candidates(convolution, epilogue, name), ONEDNN]
    taken = {choice: microseconds(choice, convolution) for choice in found}
    ranked = sorted(taken, key=taken.__getitem__)
    usual = next(choice for choice in taken if _as_good(taken[choice], taken[ranked[0]]))
    return [usual, *(choice for choice in ranked if choice != usual)]


def _as_good(taken: float, best: float) -> bool:
    """Whether a choice loses so little that it is taken where it comes first: so networks need fewer kernels to be compiled."""
    return taken <= 1.03 * best + 0.1


def microseconds(choice: Choice, convolution: Convolution) -> float:
    """What a layer takes about."""
    if isinstance(choice, Kernel):
        costs, (kind, work) = _costs(choice.isa, call=False), kernel_work(choice, convolution)
    else:
        costs, (kind, work) = _costs(isa.best(cpu.usable_flags(), cpu.int8_lanes()), call=True), call_work(convolution)
    return sum(costs.get(f"{kind} {what}", 0.0) * count for what, count in work.items())


def widest(convolution: Convolution, epilogue: Epilogue) -> Convolution:
    """The layer with vectors as wide as is best for it, which its weight is then packed for."""
    widths = [lanes for lanes in (16, 8) if lanes <= cpu.int8_lanes()]
    choices = [dataclasses.replace(convolution, lanes=lanes) for lanes in widths]

    def best(choice: Convolution) -> float:
        found = candidates(choice, epilogue, isa.best(cpu.usable_flags(), choice.lanes))
        return min(microseconds(kernel, choice) for kernel in found)

    times = [best(choice) for choice in choices]
    return next(choice for choice, taken in zip(choices, times, strict=True) if _as_good(taken, min(times)))


@functools.cache
def _fitted() -> dict[str, dict[str, float]]:
    """Microseconds by instruction set ("onednn ..." for the calls) and kind of work."""
    return json.loads(resources.files(__package__).joinpath("weights.json").read_text())


# The instruction set whose costs stand in for those of one that could not be measured.
_STANDS_IN = {"avx_vnni": "avx512_vnni_256", f"{ONEDNN} avx_vnni": f"{ONEDNN} avx512_vnni"}


def _costs(name: str, call: bool) -> dict[str, float]:
    name = f"{ONEDNN} {name}" if call else name
    costs = _fitted()[_STANDS_IN.get(name, name)]
    # Measured where 512 bits are run as two halves.
    whole = isa.ISAS[name.removeprefix(f"{ONEDNN} ")].lanes == 16 and not cpu.halves_512()
    faster = 16 if call and cpu.has_amx() else 2 if whole else 1
    return {what: cost / faster if what.endswith(" products") else cost for what, cost in costs.items()}


def threads(convolution: Convolution) -> int:
    return convolution.threads or torch.get_num_threads()


def kernel_work(kernel: Kernel, convolution: Convolution) -> tuple[str, Work]:
    """The kind of a kernel, and the work of the thread that has most."""
    if kernel.taps:
        kind, work = kernel.kind, _depthwise(kernel, convolution)
    else:
        kind = "pixel" if convolution.pixels == 1 else kernel.kind  # which takes another loop
        work = _by_runs(kernel, convolution)
    return kind, {**work, "calls": 1, "threads": float(threads(convolution) > 1)}


PASS_BYTES = 16384  # as in the C++


def _by_runs(kernel: Kernel, conv: Convolution) -> Work:
    rows, columns = kernel.rows, kernel.columns
    pixels, runs, run = conv.pixels, conv.runs, conv.row_runs[1]
    fours = math.ceil(run / 4)
    panels = math.ceil(conv.group_vectors / columns)
    panel_bytes = columns * runs * fours * 4 * conv.lanes
    together = min(max(PASS_BYTES // panel_bytes, 1), panels)
    if pixels == 1:
        rows = 1
    count = math.ceil(pixels / rows) * conv.groups
    tasks = count * math.ceil(panels / together)
    blocks = count * panels * math.ceil(tasks / threads(conv)) / tasks  # by panels
    steps = blocks * runs * fours
    return {
        "products": steps * rows * columns,
        "loads": steps * (rows + columns),
        "runs": blocks * runs,
        "rests": blocks * runs * (rows + columns) * (run % 4 != 0),
        "blocks": blocks,
        "rows": blocks * rows,
        "outputs": blocks * rows * columns,
        "streamed": steps * columns * (panel_bytes > PASS_BYTES),
        "copied": _copied(conv),
    }


def _copied(conv: Convolution) -> float:
    height, width = (size + 2 * padding for size, padding in zip((conv.h, conv.w), conv.padding, strict=True))
    return conv.n * (conv.d + 2 * conv.depth.padding) * height * width * conv.c / threads(conv) * conv.copied


def _depthwise(kernel: Kernel, conv: Convolution) -> Work:
    assert kernel.taps is not None
    (height, width), columns = kernel.taps.kernel, kernel.columns
    rows = math.ceil(conv.n * conv.out_h / threads(conv)) * (conv.channel_count // (4 * conv.lanes))
    blocks = rows * math.ceil(conv.out_w / columns)
    reach = (columns - 1) * kernel.taps.stride_w + (width - 1) * kernel.taps.dilation_w + 1
    fours = math.ceil(height / 4)
    return {
        "products": blocks * columns * width * fours,
        "reads": blocks * reach * height,
        "interleaved": blocks * reach * fours,
        "blocks": blocks,
        "outputs": blocks * columns,
        "rows": rows,
    }


def call_work(conv: Convolution) -> tuple[str, Work]:
    """What kind of call computes a layer, and its work on one thread."""
    share = 1 / threads(conv)
    pixels = conv.pixels * share
    group_out = math.ceil(conv.out_c / conv.groups / 16) * 16 * conv.groups
    steps = conv.depth.kernel * math.prod(conv.kernel) * math.ceil(conv.c / conv.groups / 4)
    is_linear = (*conv.kernel, *conv.stride, *conv.padding, conv.groups) == (1, 1, 1, 1, 0, 0, 1)
    kind = (
        "linear" if is_linear else "depthwise" if conv.is_depthwise else "grouped" if conv.groups > 1 else "convolution"
    )
    return kind, {
        "calls": 1,
        "threads": float(threads(conv) > 1),
        "products": pixels * steps * group_out / 16,
        "outputs": pixels * conv.out_c,
        "pixels": pixels,
        "inputs": conv.n * conv.d * conv.h * conv.w * conv.c * share,
        "weights": conv.out_c * conv.c // conv.groups * math.prod(conv.kernel) * conv.depth.kernel,
        "narrow": pixels * steps * group_out / 16 * (steps < 16),
    }
