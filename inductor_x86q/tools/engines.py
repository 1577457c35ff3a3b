"""The engines that `x86q bench` measures: each takes the model and its input, and returns what to call.

What an engine compiles, it compiles at the first call.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inductor_x86q.inductor import compiling, configuration

BASELINE = "inductor-fp32"


def _at_first_call(start: Callable[[], Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
    """What `start` returns, started at the first call, as what `torch.compile` returns does by itself."""
    started = functools.cache(start)
    return lambda: started()()


def _eager(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(x)


def _inductor(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    compiled = torch.compile(model)

    def start() -> Callable[[], torch.Tensor]:
        with configuration.frozen():
            compiled(x)
        return lambda: compiled(x)

    return _at_first_call(start)


def _inductor_bf16(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    compiled = _inductor(model, x)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled()

    return run


def _stock(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What PyTorch's tutorial does: torchao's quantizer, strict export, the global freezing flag."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    from inductor_x86q import cpu

    config = get_default_x86_inductor_quantization_config(reduce_range=not cpu.has_vnni())
    exported = torch.export.export(model, (x,), strict=True).module()
    prepared = prepare_pt2e(exported, X86InductorQuantizer().set_global(config))
    prepared(x)
    return _inductor(convert_pt2e(prepared), x)


def _ours(mode: str | None, dynamic: bool | str = False) -> Callable[..., Callable[[], torch.Tensor]]:
    def engine(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        from inductor_x86q import quantize

        quantized = quantize(model, (x,), calibration=None if dynamic else [x], dynamic=dynamic)
        compiled = torch.compile(quantized, backend="inductor_x86q", mode=mode)
        return lambda: compiled(x)

    return engine


# Names the file of a package that is kept for a second process, where `bench` measures starts.
PACKAGE_VARIABLE = "INDUCTOR_X86Q_BENCH_PACKAGE"


def _package(options: dict[str, Any]) -> Callable[[torch.nn.Module, torch.Tensor], Callable[[], torch.Tensor]]:
    """Where a process before this one has left the package, it is loaded and nothing quantized."""

    def engine(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        import inductor_x86q

        path = Path(os.environ.get(PACKAGE_VARIABLE) or Path(tempfile.mkdtemp()) / "model.pt2")
        quantized = None if path.exists() else inductor_x86q.quantize(model, (x,), calibration=[x])

        def start() -> Callable[[], torch.Tensor]:
            if quantized is not None:
                inductor_x86q.package(quantized, (x,), path, options=options)
            loaded = compiling.load_package(str(path))
            return lambda: loaded(x)

        return _at_first_call(start)

    return engine


def _openvino(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=x, input=[list(x.shape)])
    kind = None if x.is_floating_point() else nncf.ModelType.TRANSFORMER
    quantized = nncf.quantize(converted, nncf.Dataset([x.numpy()]), model_type=kind)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    array = x.numpy()

    def start() -> Callable[[], torch.Tensor]:
        request = openvino.Core().compile_model(quantized, "CPU", options).create_infer_request()
        return lambda: torch.from_numpy(next(iter(request.infer([array], share_inputs=True).values())))

    return _at_first_call(start)


def _torch_dynamic(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """PyTorch's eager int8 modules."""
    kinds = {torch.nn.Linear, torch.nn.LSTM, torch.nn.GRU}
    quantized = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    return lambda: quantized(x)


def _onnxruntime(model: torch.nn.Module, x: torch.Tensor, *, dynamic: bool = False) -> Callable[[], torch.Tensor]:
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    from inductor_x86q import cpu

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = [{"x": x.numpy()}]

        def get_next(self) -> Any:
            return self._left.pop() if self._left else None

    with tempfile.TemporaryDirectory() as directory:
        source, prepared, target = (str(Path(directory) / f"{name}.onnx") for name in ("float", "prepared", "int8"))
        torch.onnx.export(model, (x,), source, input_names=["x"], dynamo=False)
        shape_inference.quant_pre_process(source, prepared)
        types = {"weight_type": quantization.QuantType.QInt8, "per_channel": True, "reduce_range": not cpu.has_vnni()}
        if dynamic:
            quantization.quantize_dynamic(prepared, target, **types)
        else:
            form = {"quant_format": quantization.QuantFormat.QDQ, "activation_type": quantization.QuantType.QUInt8}
            quantization.quantize_static(prepared, target, Reader(), **form, **types)
        quantized = Path(target).read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    feed = {"x": x.numpy()}

    def start() -> Callable[[], torch.Tensor]:
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return _at_first_call(start)


def _int8_peak(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One large int8 matrix product by the library, whatever the model is: what the machine can do at best."""
    onednn = torch.ops.onednn
    integers = torch.randint(-60, 60, (PEAK_SIZE, PEAK_SIZE), dtype=torch.int8)
    weight = onednn.qlinear_prepack(integers, [PEAK_SIZE, PEAK_SIZE])
    scales, zero_points = torch.ones(PEAK_SIZE), torch.zeros(PEAK_SIZE, dtype=torch.int32)
    rows = integers.abs().to(torch.uint8)
    parameters: tuple[Any, ...] = (1.0, 0, weight, scales, zero_points, None, 1e4, 60, torch.uint8, "none", [], "")
    return lambda: onednn.qlinear_pointwise(rows, *parameters)


PEAK = "int8-peak"
PEAK_SIZE = 1024  # rows, columns and depth of its matrices

ENGINES: dict[str, Callable[[torch.nn.Module, torch.Tensor], Callable[[], torch.Tensor]]] = {
    "eager": _eager,
    BASELINE: _inductor,
    "inductor-bf16": _inductor_bf16,
    "stock-int8": _stock,
    "x86q": _ours(None),
    "x86q-max-autotune": _ours("max-autotune-no-cudagraphs"),
    "x86q-dynamic": _ours(None, "per_token"),
    "x86q-package": _package({}),
    "x86q-package-max-autotune": _package({"max_autotune": True}),
    "openvino-int8": _openvino,
    "onnxruntime-int8": _onnxruntime,
    "onnxruntime-dynamic": functools.partial(_onnxruntime, dynamic=True),
    "torch-dynamic": _torch_dynamic,
    PEAK: _int8_peak,
}
DEFAULT_ENGINES = ("eager", BASELINE, "stock-int8", "x86q")
