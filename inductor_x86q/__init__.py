"""int8 for TorchInductor on x86 CPUs.

`quantize` a model, then `torch.compile(quantized, backend="inductor_x86q")`; `explain` and `cpp_code` say what became
of it. Nothing here needs to be imported to compile: the backend is found by its name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inductor_x86q.version import __version__

if TYPE_CHECKING:
    from inductor_x86q.accuracy.budget import quantize
    from inductor_x86q.aot import load, package
    from inductor_x86q.errors import BudgetError, CompileError, QuantizationError, StrictError
    from inductor_x86q.inspection import cpp_code, explain, why
    from inductor_x86q.passes import No, Rule, register_pass
    from inductor_x86q.quantization.config import LayerConfig
    from inductor_x86q.quantization.pt2e import convert, prepare_qat
    from inductor_x86q.quantization.quantizer import X86Quantizer, from_x86_inductor
    from inductor_x86q.report import Report

# Imported when first used: torch.compile loads the backend alone, without torchao.
_HOME = {
    "BudgetError": "errors",
    "CompileError": "errors",
    "QuantizationError": "errors",
    "LayerConfig": "quantization.config",
    "No": "passes",
    "Report": "report",
    "Rule": "passes",
    "StrictError": "errors",
    "X86Quantizer": "quantization.quantizer",
    "convert": "quantization.pt2e",
    "cpp_code": "inspection",
    "explain": "inspection",
    "from_x86_inductor": "quantization.quantizer",
    "load": "aot",
    "package": "aot",
    "prepare_qat": "quantization.pt2e",
    "quantize": "accuracy.budget",
    "register_pass": "passes",
    "why": "inspection",
}

__all__ = [
    "BudgetError", "CompileError", "LayerConfig", "No", "QuantizationError", "Report", "Rule", "StrictError", "X86Quantizer",
    "__version__", "convert", "cpp_code", "explain", "from_x86_inductor", "load", "package", "prepare_qat", "quantize", "register_pass", "why",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"inductor_x86q.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
