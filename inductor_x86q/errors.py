"""The errors this package raises: each says what was wrong, where, and what to do."""

from __future__ import annotations


class QuantizationError(RuntimeError):
    """The model or the data cannot be quantized as asked."""


class BudgetError(QuantizationError):
    """No choice of layers keeps the accuracy within the budget that was named."""


class CompileError(RuntimeError):
    """The quantized graph cannot be compiled as asked."""


class StrictError(CompileError):
    """Under `strict`, a layer that should have run in int8 does not; `report` is the whole report."""

    def __init__(self, message: str, report: object) -> None:
        super().__init__(message)
        self.report = report
