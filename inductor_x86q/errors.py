"""The errors this package raises: each says what was wrong, where, and what to do."""

from __future__ import annotations


class QuantizationError(RuntimeError):
    """The model or the data cannot be quantized as asked."""


class NothingToQuantizeError(QuantizationError):
    """No layer of the model can be, or is to be, int8."""


class BudgetError(QuantizationError):
    """No choice of layers keeps the accuracy within the budget that was named."""


class CompileError(RuntimeError):
    """The quantized graph cannot be compiled as asked."""


class StrictError(CompileError):
    """Under `strict`, a layer that should have run in int8 does not; `report` is the whole report.

    What `torch.compile` returned raises it as the `inner_exception` of Dynamo's BackendCompilerFailed.

    Example:
        >>> inputs = (torch.randn(8, 16),)
        >>> graph = testing.qdq_graph(testing.QLinear(16, 16), inputs)  # nothing quantizes the input
        >>> try:
        ...     inductor_x86q.explain(graph, inputs, options={"strict": True})
        ... except inductor_x86q.StrictError as error:
        ...     print(error.report.missed[0].reason.name)
        ACTIVATION_NOT_QUANTIZED
    """

    def __init__(self, message: str, report: object) -> None:
        super().__init__(message)
        self.report = report


def of_ours(error: BaseException | None) -> CompileError | None:
    """The CompileError that torch wrapped in an error of its own, None if there is none."""
    while error is not None and not isinstance(error, CompileError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error
