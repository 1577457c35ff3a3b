"""The generated C++: counting its kernel calls, and making it stable to compare."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

# A call of an operator through its C shim, and a call of a generated kernel with a body in the same text.
_SHIM = re.compile(r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_(\w+)\(")
_PROXY = re.compile(r'torch_call_dispatcher\("([\w:]+)", "(\w*)"')
_KERNEL = re.compile(r"^\s+(cpp_\w+)\(\(")

# In the body of a generated kernel: a call of an object of ours, which is named by its kind and more.
_OURS = re.compile(r"^\s+x86q_([a-z]+)_\w+\(", re.MULTILINE)

_NAMES = {
    "_qconv_pointwise_tensor": "qconv",
    "_qconv2d_pointwise_binary_tensor": "qconv.binary",
    "_qlinear_pointwise_tensor": "qlinear",
    "_qlinear_pointwise_binary_tensor": "qlinear.binary",
    "mkldnn__convolution_pointwise": "convolution",
    "mkldnn__convolution_pointwise_binary": "convolution.binary",
    "mkldnn__convolution_pointwise_binary_": "convolution.binary",
    "mkldnn__linear_pointwise": "linear",
    "mkldnn__linear_pointwise_binary": "linear.binary",
    "_linear_pointwise": "linear",
    "_linear_pointwise_binary": "linear.binary",
}


# Where a call puts its result: the handle that the shim fills, or a pointer that a generated kernel writes through.
_HANDLE = re.compile(r"&(\w+)_handle\b")
_POINTER = re.compile(r"\((const )?\w+\*\)\((\w+)\.data_ptr\(\)\)")

_BODY_START = "inductor_entry_impl("
_BODY_END = "} // inductor_entry_impl"


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A kernel call in the wrapper."""

    name: str  # as `kernel_calls` counts it
    symbol: str  # of the function that the wrapper calls
    results: tuple[str, ...]  # the buffers that it writes
    line: str


def calls(code: str) -> Iterator[KernelCall]:
    """The wrapper's kernel calls in their order."""
    ours = {name: _OURS.search(body) for name, _, body in _KERNEL_DEFINITION.findall(code)}
    for line in _body(code):
        if name := _called(line):
            shim, kernel = _SHIM.search(line), ours.get(name)
            symbol = f"aoti_torch_cpu_{shim[1]}" if shim else name
            yield KernelCall(f"x86q.{kernel[1]}" if kernel else name, symbol, tuple(results(line)), line.strip())


def kernels(code: str) -> dict[str, str]:
    """The generated kernels by their names."""
    return {match.group(1): match.group() for match in _KERNEL_DEFINITION.finditer(code)}


def kernel_calls(code: str) -> Counter[str]:
    """How often the wrapper calls each kernel.

    Keys: "qconv", "qconv.binary", "qlinear", "qlinear.binary" for the onednn int8 operators; "x86q.convolution",
    "x86q.depthwise" and so on for layers in kernels of ours, by their kind; "convolution", "linear" and their ".binary" for
    float oneDNN; other operators under the name of their C shim, or their own where they are called through the dispatcher;
    and each generated kernel by its name, which begins with `cpp_`.

    Example:
        >>> code = inductor_x86q.cpp_code(q, (x,), options={"kernels": "onednn"})
        >>> calls = testing.kernel_calls(code)
        >>> calls["qconv"], calls["qlinear"]
        (3, 1)
    """
    return Counter(call.name for call in calls(code))


def _body(code: str) -> Iterator[str]:
    """The lines of the wrappers' entry functions."""
    for part in code.split(_BODY_START)[1:]:
        yield from part.split(_BODY_END)[0].splitlines()


def _called(line: str) -> str | None:
    """The kernel that a line of the wrapper calls."""
    if match := _SHIM.search(line):
        return _NAMES.get(match.group(1), match.group(1))
    match = _PROXY.search(line) or _KERNEL.match(line)
    return match.group(1) if match else None


# --- stable -----------------------------------------------------------------------------------------------------------

# What says nothing of the computation, or is said otherwise by other versions of torch.
_NOISE = re.compile(
    r"^\s*(//|#include|#pragma once|assert_size_stride|AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_empty_strided"
    r"|static constexpr int64_t int_array|AtenTensorHandle \w+;|\w+\.reset\(\);|CACHE_TORCH"
    r"|inductor_cpu_|std::atomic<int> inductor_cpu_"
    r"|py::gil|(\[\[maybe_unused\]\] )?auto \w+ = std::move\((inputs|args)|auto inputs = |\) \{$"
    r"|(int32_t|int64_t|const char\*|double|bool) var_\d+ =|RAIIAtenTensorHandle \w+\(\w+_handle\);)"
)
_SAME = (
    (re.compile(r"static_cast<const int64_t\*>\(std::array<int64_t, \d+>\{([^}]*)\}\.data\(\)\)"), r"{\1}"),
    (re.compile(r"std::array<[^<>]*, \d+>\{([^}]*)\}\.(?:cbegin|data)\(\)"), r"{\1}"),
    (re.compile(r"static_cast<int64_t>\((-?\w+)\)"), r"\1"),
    (re.compile(r"\b(\d+)L\b"), r"\1"),
    (re.compile(r"\(((?:const )?\w+\*)\)\((\w+)\.data_ptr\(\)\)"), r"\2"),
    (re.compile(r"AOTI_TORCH_ERROR_CODE_CHECK\((.*)\);"), r"\1;"),
    (re.compile(r"inductor_vec_mask_cast<(\w+),1>\((\w+)\)"), r"\2.template cast<\1,1>()"),
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
)
_INPUT = re.compile(r"auto (\w+) = std::move\((?:inputs|args)\[(\d+)\]\)")
_VARIABLE = re.compile(r"(?:int32_t|int64_t|const char\*|double|bool) (var_\d+) = (.*?);")
_KERNEL_DEFINITION = re.compile(r'^extern "C" +void +(cpp_\w+)\((.*?)\)\n\{\n(.*?)^\}', re.MULTILINE | re.DOTALL)
_KERNEL_NAME = re.compile(r"\bcpp_\w+\b")


def stable(code: str) -> str:
    """The code without what differs between machines, processes and versions of torch.

    What remains: the wrapper's calls in their order, and the bodies of the generated kernels. Inputs and constants are
    called `input0`, `constant0`, ... in the order of their use, generated kernels `kernel0`, ...; allocations, checks
    of sizes, comments, addresses and everything in Python are left out. Vector width and number of threads do show in
    kernels: compile with `options=PINNED` of `inductor_x86q.testing` where the text is to be compared.

    Example:
        >>> code = inductor_x86q.cpp_code(q, (x,), options=testing.PINNED)
        >>> testing.stable(code).splitlines()[0]
        'kernel0(input0, buf0);'
    """
    names = _Names()
    parts = []
    for number, part in enumerate(code.split(_BODY_START)[1:]):
        body, _, rest = part.partition(_BODY_END)
        inputs, variables = dict(_INPUT.findall(body)), dict(_VARIABLE.findall(body))
        count = _count_of_inputs(code, number, inputs)
        lines = [line for line in body.splitlines()[1:] if line.strip() and not _NOISE.match(line)]
        lines = [
            line
            for line in lines
            if not line.strip().startswith(("AtenTensorHandle*", "input_handles", "output_handles "))
        ]
        text = _simplified("\n".join(line.strip() for line in lines))
        text = re.sub(r"\bvar_\d+\b", lambda m: variables.get(m.group(), m.group()), text)  # noqa: B023
        text = re.sub(r"\b\w+\b", lambda m: names.of(m.group(), inputs, count), text)  # noqa: B023
        parts.append(text)
        for name, _, kernel in _KERNEL_DEFINITION.findall(rest):
            lines = [line for line in kernel.splitlines() if line.strip() and not _NOISE.match(line)]
            parts.append(f"{name}:\n" + _simplified("\n".join(lines)))
    return _KERNEL_NAME.sub(names.kernel, "\n\n".join(parts)).strip() + "\n"


def _simplified(text: str) -> str:
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    return re.sub(r"  +(?=\S)", lambda m: m.group() if m.start() == 0 or text[m.start() - 1] == "\n" else " ", text)


def _count_of_inputs(code: str, number: int, inputs: Mapping[str, str]) -> int:
    """How many of the handles are inputs; the rest are constants (the Python part lists them)."""
    lists = re.findall(r"constants_tensor = \[(.*?)\]", code)
    constants = [name for name in lists[number].split(", ") if name] if number < len(lists) else []
    return len(inputs) - len([name for name in constants if name in inputs])


class _Names:
    """New names, numbered in the order in which they are asked for."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def _numbered(self, name: str, kind: str) -> str:
        if name not in self._names:
            self._names[name] = f"{kind}{self._counts[kind]}"
            self._counts[kind] += 1
        return self._names[name]

    def of(self, name: str, inputs: Mapping[str, str], count: int) -> str:
        if name not in inputs:
            return name
        return self._numbered(name, "input" if int(inputs[name]) < count else "constant")

    def kernel(self, match: re.Match[str]) -> str:
        return self._numbered(match.group(), "kernel")


# --- which layer a call serves ----------------------------------------------------------------------------------------


def annotate(code: str, layers: Mapping[str, Sequence[str]]) -> str:
    """The code with a comment in front of each kernel call that says which layers it serves.

    Args:
        layers: for each buffer of the wrapper, the layers that it is computed for.
    """
    lines, inside = [], False
    for line in code.splitlines():
        inside = (inside or _BODY_START in line) and _BODY_END not in line
        served = served_layers(line, layers) if inside and _called(line) else []
        if served:
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}{_COMMENT}{', '.join(served)}")
        lines.append(line)
    return "\n".join(lines) + "\n"


_COMMENT = "// layer: "


def served_layers(line: str, layers: Mapping[str, Sequence[str]]) -> list[str]:
    """The layers whose results a call writes."""
    found: dict[str, None] = {}
    for buffer in results(line):
        found.update(dict.fromkeys(layers.get(buffer, ())))
    return list(found)


def results(line: str) -> list[str]:
    """The buffers that a call writes."""
    if handles := _HANDLE.findall(line):
        return handles
    return [name for const, name in _POINTER.findall(line) if not const]


def only_layer(code: str, layer: str) -> str:
    """Of annotated code, the calls that serve a layer or what is inside it, and the kernels that these calls name.

    Raises:
        KeyError: no call serves that layer; the message lists those that are served.
    """
    lines = code.splitlines()
    calls, seen = [], set()
    for line, call in itertools.pairwise(lines):
        if not line.strip().startswith(_COMMENT):
            continue
        served = line.strip().removeprefix(_COMMENT).split(", ")
        seen.update(served)
        if any(name == layer or name.startswith(f"{layer}.") for name in served):
            calls += [line.strip(), call.strip()]
    if not calls:
        raise KeyError(
            f"no kernel call serves layer {layer!r}; those that are served: {', '.join(sorted(seen)) or 'none'}"
        )
    wanted = set(_KERNEL_NAME.findall("\n".join(calls)))
    called = [text for name, text in kernels(code).items() if name in wanted]
    return "\n\n".join(["\n".join(calls), *called]) + "\n"
