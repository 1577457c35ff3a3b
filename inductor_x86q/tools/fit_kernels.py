"""Measures kernels against each other and against oneDNN's calls, and fits the cost model on what was measured.

    python -m inductor_x86q.tools.fit_kernels measure --networks resnet18 mobilenet_v2 --random 50 [--seconds 100]
    python -m inductor_x86q.tools.fit_kernels fit

`measure` adds to `measurements.json` beside the kernels what it does not hold yet, for as long as it is told; `fit` writes
`weights.json`, which the cost model reads, and says how good its choices are on all that was measured. With ONEDNN_MAX_CPU_ISA both oneDNN and the kernels do without
what it hides: so smaller CPUs are measured on larger ones.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import inductor_x86q.kernels
from inductor_x86q import cpu
from inductor_x86q.kernels import cost, isa
from inductor_x86q.kernels.arguments import arguments
from inductor_x86q.kernels.convolution import Convolution
from inductor_x86q.kernels.epilogue import Epilogue, Numbers
from inductor_x86q.kernels.family import Kernel, candidates

HERE = Path(inductor_x86q.kernels.__file__).parent
MEASUREMENTS, WEIGHTS = HERE / "measurements.json", HERE / "weights.json"
EPILOGUE = Epilogue(torch.uint8)
ROUNDS, SECONDS = 3, 0.005  # of a turn

Layer = tuple[int, ...]  # n, h, w, c, out_c, kernel, stride, padding, dilation: two each, groups


def network_layers(name: str, batch: int = 1, size: int = 224) -> Iterator[Layer]:
    """The convolutions and linears of one of torchvision's networks."""
    import torchvision

    found: list[Layer] = []

    def seen(module: Any, inputs: Any, output: Any) -> None:
        x = inputs[0]
        if isinstance(module, torch.nn.Conv2d):
            n, c, h, w = x.shape
            pairs = (*module.kernel_size, *module.stride, *module.padding, *module.dilation)
            found.append((n, h, w, c, module.out_channels, *pairs, module.groups))
        else:
            c = x.shape[-1]
            found.append((1, 1, x.numel() // c, c, module.out_features, 1, 1, 1, 1, 0, 0, 1, 1, 1))

    keywords = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **keywords).eval().to("meta")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(seen)
    with torch.no_grad():
        model(torch.empty(batch, 3, size, size, device="meta"))
    yield from dict.fromkeys(found)


def random_layers(count: int, seed: int = 0) -> Iterator[Layer]:
    """Layers of all sizes that take up to some milliseconds."""
    generator = random.Random(seed)
    while count:
        kernel = generator.choice([(1, 1), (1, 1), (3, 3), (5, 5), (1, 3), (7, 7)])
        depthwise = generator.random() < 0.25 and kernel != (1, 1)
        c = int(2 ** generator.uniform(3, 10.5)) // 4 * 4
        out_c = c if depthwise else int(2 ** generator.uniform(3, 10.5)) // 4 * 4
        h, w, n = (int(2 ** generator.uniform(0, top)) for top in (7, 7, 4))
        stride, padding = generator.choice([1, 1, 1, 2]), (kernel[0] // 2, kernel[1] // 2)
        if h < kernel[0] or w < kernel[1]:
            continue
        layer = (n, h, w, c, out_c, *kernel, stride, stride, *padding, 1, 1, c if depthwise else 1)
        if 1e4 < describe(layer, 16, 1).macs < 1e9:
            yield layer
            count -= 1


def describe(layer: Layer, lanes: int, threads: int) -> Convolution:
    n, h, w, c, out_c, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups = layer
    return Convolution(
        *(n, h, w, c, out_c, (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)),
        *(groups, lanes, False, not cpu.has_vnni()),
        x_strides=(h * w * c, w * c, c),
        threads=threads,
    )


@dataclasses.dataclass
class Runs:
    """What may compute a layer, ready to run, by name."""

    by_name: dict[str, Callable[[], Any]]
    kept: list[Any]  # tensors whose addresses are in use

    @staticmethod
    def of(layer: Layer, threads: int) -> Runs:
        runs = Runs({}, [])
        for name in runnable():
            runs._kernels(name, describe(layer, isa.ISAS[name].lanes, threads))
        runs.by_name[cost.ONEDNN] = _call(describe(layer, 16, threads))
        return runs

    def _kernels(self, name: str, conv: Convolution) -> None:
        numbers = Numbers(0.02, 7, torch.rand(conv.out_c) * 0.01, torch.randn(conv.out_c), 0.1, 64)
        packed = conv.constants(_weight(conv), numbers, EPILOGUE)
        constants = _aligned(len(packed))
        constants.copy_(packed)
        x, out = _image(conv), torch.empty(conv.pixels * conv.out_c, dtype=torch.uint8)
        values = arguments(conv)
        given = (ctypes.c_int64 * len(values))(*map(int, values))
        self.kept += [constants, x, out, given]
        pointers = [ctypes.c_void_p(address) for address in (x.data_ptr(), constants.data_ptr(), 0, out.data_ptr())]
        for kernel in candidates(conv, EPILOGUE, name):
            self.by_name[key(kernel)] = functools.partial(_function(kernel), *pointers, given)


@functools.cache
def _function(kernel: Kernel) -> Any:
    from inductor_x86q.inductor import objects

    return objects.load(kernel)


def _call(conv: Convolution) -> Callable[[], Any]:
    weight, scale = _weight(conv), torch.rand(conv.out_c) * 0.01
    bias, zero_points = torch.randn(conv.out_c), torch.zeros(conv.out_c, dtype=torch.int32)
    x = _image(conv)
    if (*conv.kernel, *conv.stride, *conv.padding, conv.groups) == (1, 1, 1, 1, 0, 0, 1):
        rows = x.view(-1, conv.c)
        packed = torch.ops.onednn.qlinear_prepack(weight.flatten(1), list(rows.shape))
        return lambda: torch.ops.onednn.qlinear_pointwise(
            *(rows, 0.02, 7, packed, scale, zero_points, bias, 0.1, 64, torch.uint8, "none", [], "")
        )
    image = x.permute(0, 3, 1, 2)
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 0.02, 7, *geometry, list(image.shape))
    return lambda: torch.ops.onednn.qconv_pointwise(
        *(image, 0.02, 7, packed, scale, zero_points, bias, *geometry, 0.1, 64, torch.uint8, "none", [], "")
    )


def runnable() -> list[str]:
    """The instruction sets to measure a layer with: the best of each vector width."""
    flags = cpu.usable_flags()
    return [isa.best(flags, lanes) for lanes in (16, 8) if lanes <= cpu.int8_lanes()]


def key(kernel: Kernel) -> str:
    return f"{kernel.isa} {kernel.rows}x{kernel.columns}"


def _weight(conv: Convolution) -> torch.Tensor:
    return torch.randint(-63, 64, (conv.out_c, conv.c // conv.groups, *conv.kernel), dtype=torch.int8)


def _image(conv: Convolution) -> torch.Tensor:
    return torch.randint(0, 128, (conv.n, conv.h, conv.w, conv.c), dtype=torch.uint8)


def _aligned(size: int) -> torch.Tensor:
    buffer = torch.empty(size + 64, dtype=torch.int8)
    return buffer[-buffer.data_ptr() % 64 :][:size]


def measure(layer: Layer, threads: int) -> dict[str, float]:
    """Microseconds of the fastest call of each, which take turns."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        runs = Runs.of(layer, threads)
        best: dict[str, float] = {}
        for _ in range(ROUNDS):
            for name, run in runs.by_name.items():
                best[name] = min(_fastest(run), best.get(name, math.inf))
    return {name: float(f"{seconds * 1e6:.3g}") for name, seconds in best.items()}


def _fastest(run: Callable[[], Any]) -> float:
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < end or len(times) < 2:
        run()
        times.append(time.perf_counter() - started)
    return min(times)


@dataclasses.dataclass(frozen=True)
class Measured:
    layer: Layer
    threads: int
    times: dict[str, float]

    @property
    def machine(self) -> str:
        """The best instruction set that was measured, which is what the call had as well."""
        return next(iter(self.times)).split()[0]


def load() -> list[Measured]:
    if not MEASUREMENTS.exists():
        return []
    names, *rows = json.loads(MEASUREMENTS.read_text())
    return [
        Measured(tuple(layer), threads, {names[number]: taken for number, taken in zip(numbers, times, strict=True)})
        for layer, threads, numbers, times in rows
    ]


def store(found: Sequence[Measured]) -> None:
    """Names once, then a line for each layer: its sizes, the threads, which names, microseconds."""
    names = list(dict.fromkeys(name for entry in found for name in entry.times))
    rows = [
        [entry.layer, entry.threads, [names.index(name) for name in entry.times], list(entry.times.values())]
        for entry in found
    ]
    lines = [json.dumps(row, separators=(",", ":")) for row in (names, *rows)]
    MEASUREMENTS.write_text("[" + ",\n".join(lines) + "]\n")


def take(layers: Sequence[Layer], threads: Sequence[int], seconds: float) -> None:
    """Measures what is not measured yet, for so long."""
    found = load()
    known = {(entry.layer, entry.threads) for entry in found if entry.machine == runnable()[0]}
    wanted = [(layer, count) for layer in layers for count in threads if (layer, count) not in known]
    end = time.monotonic() + seconds
    try:
        for done, (layer, count) in enumerate(wanted):
            if time.monotonic() > end:
                print(f"{len(wanted) - done} of {len(wanted)} left")
                break
            found.append(Measured(layer, count, measure(layer, count)))
    finally:
        store(found)


def fit() -> None:
    """Writes what each kind of work costs, and prints how good choices are that rely on it."""
    from scipy.optimize import nnls

    found = load()
    rows: dict[tuple[str, str], list[tuple[dict[str, float], float]]] = {}
    for entry in found:
        for name, taken in entry.times.items():
            machine, kind, work = _work(entry, name)
            rows.setdefault((machine, kind), []).append((work, taken))
    weights: dict[str, dict[str, float]] = {}
    for (machine, kind), times in rows.items():
        names = [name for name in times[0][0] if any(work[name] for work, _ in times)]
        matrix = torch.tensor([[work[name] / taken for name in names] for work, taken in times]).double()
        scale = matrix.abs().amax(0).clamp(min=1e-30)
        solution, _ = nnls((matrix / scale).numpy(), torch.ones(len(times)).double().numpy())
        for name, value in zip(names, solution / scale.numpy(), strict=True):
            weights.setdefault(machine, {})[f"{kind} {name}"] = float(f"{value:.4g}")
        errors = matrix @ torch.from_numpy(solution / scale.numpy()) - 1
        print(f"{machine:24s} {kind:12s} {len(times):5d} times, error {errors.abs().mean():.1%}")
    WEIGHTS.write_text(json.dumps(weights, indent=1) + "\n")
    cost._fitted.cache_clear()
    judge(found)


def _work(entry: Measured, name: str) -> tuple[str, str, dict[str, float]]:
    """The machine, the kind and the work of what was measured under that name."""
    if name == cost.ONEDNN:
        machine = entry.machine
        return (
            f"{cost.ONEDNN} {machine}",
            *cost.call_work(describe(entry.layer, isa.ISAS[machine].lanes, entry.threads)),
        )
    machine = name.split()[0]
    convolution = describe(entry.layer, isa.ISAS[machine].lanes, entry.threads)
    kernel = next(kernel for kernel in candidates(convolution, EPILOGUE, machine) if key(kernel) == name)
    return (machine, *cost.kernel_work(kernel, convolution))


def judge(found: Sequence[Measured]) -> None:
    """Prints how often the model's choice is about the best, and what it loses in all."""
    weights = cost._fitted()
    groups: dict[str, list[tuple[float, Measured, str, str]]] = {}
    for entry in found:
        predicted = {}
        for name in entry.times:
            machine, kind, work = _work(entry, name)
            predicted[name] = sum(weights[machine].get(f"{kind} {what}", 0.0) * count for what, count in work.items())
        chosen = min(predicted, key=predicted.__getitem__)
        best = min(entry.times, key=entry.times.__getitem__)
        loss = entry.times[chosen] / entry.times[best]
        groups.setdefault(f"{entry.machine}, {entry.threads} threads", []).append((loss, entry, chosen, best))
    for name, choices in groups.items():
        losses = torch.tensor([loss for loss, *_ in choices])
        print(
            f"{name}: of {len(choices)} layers {(losses < 1.05).float().mean():.1%} within 5 % of the best; the geometric "
            f"mean loses {losses.log().mean().exp() - 1:.2%}, the worst {losses.max() - 1:.0%}"
        )
        for loss, entry, chosen, best in sorted(choices, key=lambda choice: -choice[0])[:8]:
            print(f"  {loss:.2f} {entry.layer} {chosen} {entry.times[chosen]} instead of {best} {entry.times[best]}")
        call = sum(best == cost.ONEDNN for _, _, _, best in choices)
        print(f"  the call is best of {call}, chosen for {sum(chosen == cost.ONEDNN for _, _, chosen, _ in choices)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    measuring = commands.add_parser("measure")
    measuring.add_argument("--networks", nargs="*", default=[], help="of torchvision")
    measuring.add_argument("--batch", type=int, nargs="*", default=[1])
    measuring.add_argument("--random", type=int, default=0, help="how many random layers")
    measuring.add_argument("--layer", type=int, nargs=14, action="append", default=[])
    measuring.add_argument(
        "--threads", type=int, nargs="*", default=[1], help="several wait for each other: only on an idle machine"
    )
    measuring.add_argument("--seconds", type=float, default=100)
    measuring.add_argument("--build", action="store_true", help="only compile the kernels that it takes")
    commands.add_parser("fit")
    options = parser.parse_args()
    if options.command == "fit":
        return fit()
    layers = [layer for name in options.networks for batch in options.batch for layer in network_layers(name, batch)]
    layers = list(dict.fromkeys([*layers, *random_layers(options.random), *map(tuple, options.layer)]))
    print(f"{len(layers)} layers")
    if options.build:
        from inductor_x86q.inductor import objects

        kernels = dict.fromkeys(
            kernel
            for layer in layers
            for name in runnable()
            for kernel in candidates(describe(layer, isa.ISAS[name].lanes, 1), EPILOGUE, name)
        )
        print(f"{len(kernels)} kernels")
        objects.build(map(objects.file, kernels))
    else:
        take(layers, options.threads, options.seconds)


if __name__ == "__main__":
    main()
