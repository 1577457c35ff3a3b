"""The generated C++: counting its kernel calls, and making it stable to compare."""

from __future__ import annotations

import re
from collections import Counter

# A call of an operator through its C shim, and a call of a generated kernel with a body in the same text.
_SHIM = re.compile(r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_(\w+)\(")
_PROXY = re.compile(r'aoti_torch_call_dispatcher\("([\w:]+)", "(\w*)"')
_KERNEL = re.compile(r"^\s+(cpp_\w+)\(\(", re.MULTILINE)

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


def kernel_calls(code: str) -> Counter[str]:
    """How often the wrapper calls each kernel.

    Keys: "qconv", "qconv.binary", "qlinear", "qlinear.binary" for the onednn int8 operators; "convolution", "linear"
    and their ".binary" for float oneDNN; other operators under the name of their C shim; and each generated kernel by
    its name, which begins with "cpp_".
    """
    body = code[code.find("inductor_entry_impl(") :]
    counts: Counter[str] = Counter()
    for match in _SHIM.finditer(body):
        counts[_NAMES.get(match.group(1), match.group(1))] += 1
    for match in _PROXY.finditer(body):
        counts[match.group(1)] += 1
    for match in _KERNEL.finditer(body):
        counts[match.group(1)] += 1
    return counts
