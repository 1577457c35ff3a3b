"""What this package uses of torchao's PT2E steps, imported in one place and without torchao's start-up noise."""

from __future__ import annotations

import logging
import warnings

with warnings.catch_warnings():
    # torchao reports on import each of its CUDA libraries that cannot be loaded; none of them matters here.
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        from torchao.quantization.pt2e import (
            FakeQuantize,
            FusedMovingAvgObsFakeQuantize,
            HistogramObserver,
            MovingAverageMinMaxObserver,
            MovingAveragePerChannelMinMaxObserver,
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

ANNOTATION_KEY = "quantization_annotation"

__all__ = [
    "ANNOTATION_KEY",
    "FakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "HistogramObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "SharedQuantizationSpec",
    "convert_pt2e",
    "prepare_pt2e",
    "prepare_qat_pt2e",
]
