"""The errors this package raises: each says what was wrong, where, and what to do."""

from __future__ import annotations


class QuantizationError(RuntimeError):
    """The model or the data cannot be quantized as asked."""


class CompileError(RuntimeError):
    """The quantized graph cannot be compiled as asked."""


class StrictError(CompileError):
    """Under `strict`, a layer that should have run in int8 does not; `report` is the whole report.

    Example:
        >>> product = testing.qdq_graph(testing.QLinear(16, 16), (torch.randn(8, 16),))  # its input is not quantized
        >>> options = {"strict": True}
        >>> try:
        ...     inductor_x86q.explain(product, (torch.randn(8, 16),), options=options)
        ... except inductor_x86q.StrictError as error:
        ...     print(error.report.missed[0].reason.name)
        ACTIVATION_NOT_QUANTIZED
    """

    def __init__(self, message: str, report: object) -> None:
        super().__init__(message)
        self.report = report
