"""What this package uses of torchao's PT2E steps, imported in one place and without torchao's start-up noise."""

from __future__ import annotations

import logging
import warnings

from torch import fx

with warnings.catch_warnings():
    # torchao reports on import each of its CUDA libraries that cannot be loaded; none of them matters here.
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        from torchao.quantization.pt2e import (
            FakeQuantize,
            HistogramObserver,
            MinMaxObserver,
            MovingAverageMinMaxObserver,
            MovingAveragePerChannelMinMaxObserver,
            ObserverBase,
            PerChannelMinMaxObserver,
            PlaceholderObserver,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import (
            QuantizationAnnotation,
            QuantizationSpec,
            Quantizer,
            SharedQuantizationSpec,
        )
    finally:
        logging.disable(_level)


def prepare_for_training(graph_module: fx.GraphModule, quantizer: Quantizer) -> fx.GraphModule:
    """What `prepare_qat_pt2e` does, less its rewriting of convolutions with batch norms.

    That one takes every batch norm to have ε = 1e-5 and the default momentum, divides by a γ of 0, and rewrites
    excluded layers too. Relies on `prepare(..., is_qat=True)` inserting fake quantization as annotated.
    """
    from torchao.quantization.pt2e.prepare import prepare
    from torchao.quantization.pt2e.utils import _get_node_name_to_scope

    quantizer.annotate(graph_module)
    return prepare(graph_module, _get_node_name_to_scope(graph_module), is_qat=True)


def forget_graphs() -> None:
    """Lets go of the graphs that torchao's steps have seen, float weights and all.

    Relies on `_assert_and_get_unique_device` being what keeps them: a function with an unbounded cache, whose keys are
    modules. torch has it under another name.
    """
    from torch.ao.quantization.fx import utils as torch_utils
    from torchao import utils as torchao_utils

    for module, name in (
        (torchao_utils, "_assert_and_get_unique_device"),
        (torch_utils, "assert_and_get_unique_device"),
    ):
        clear = getattr(getattr(module, name, None), "cache_clear", None)
        if clear is not None:
            clear()


ANNOTATION_KEY = "quantization_annotation"

__all__ = [
    "ANNOTATION_KEY",
    "FakeQuantize",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "SharedQuantizationSpec",
    "convert_pt2e",
    "forget_graphs",
    "prepare_for_training",
    "prepare_pt2e",
    "prepare_qat_pt2e",
]
