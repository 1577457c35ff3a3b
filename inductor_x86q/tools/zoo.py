"""torchvision's networks with random weights but realistic statistics, for the coverage table, the benchmark and tests.

A random network whose batch-norms still hold mean 0 and variance 1 collapses to a constant within a few layers, and
one whose residual branches are as large as their shortcuts is chaotic: a single rounding grows into noise as large as
quantization's own. Trained networks do neither, so the statistics are set here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import Any

import torch

from inductor_x86q.errors import QuantizationError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network of torchvision and a small image size that it accepts."""

    name: str
    size: int = 64
    frames: int = 0  # of a video network

    def example(self, batch: int = 2, size: int | None = None) -> torch.Tensor:
        size = size or self.size
        frames = (self.frames,) if self.frames else ()
        return torch.randn(batch, 3, *frames, size, size)


# One small member of each family.
ZOO = {
    entry.name: entry
    for entry in (
        Entry("alexnet"), Entry("vgg11_bn"), Entry("resnet18"), Entry("resnet50"), Entry("resnext50_32x4d"),
        Entry("wide_resnet50_2"), Entry("densenet121"), Entry("googlenet"), Entry("inception_v3", 96),
        Entry("mobilenet_v2"), Entry("mobilenet_v3_small"), Entry("mobilenet_v3_large"), Entry("mnasnet0_5"),
        Entry("shufflenet_v2_x0_5"), Entry("shufflenet_v2_x1_0"), Entry("squeezenet1_1"), Entry("efficientnet_b0"),
        Entry("efficientnet_v2_s"), Entry("regnet_x_400mf"), Entry("regnet_y_400mf"), Entry("convnext_tiny"),
        Entry("vit_b_16", 224), Entry("swin_t"), Entry("swin_v2_t"), Entry("maxvit_t", 224),
        Entry("fcn_resnet50"), Entry("deeplabv3_mobilenet_v3_large"),
        Entry("r3d_18", 32, 8), Entry("mc3_18", 32, 8), Entry("s3d", 209, 13),
    )
}  # fmt: skip


def build(name: str, *, seed: int = 0, calibrate_at: int | None = None) -> torch.nn.Module:
    """A network of the zoo (or another of torchvision's), in eval mode; a dictionary of outputs is reduced to "out".

    Raises QuantizationError where torchvision is missing or has no such network.
    """
    try:
        import torchvision
    except Exception as error:
        raise QuantizationError(
            f"torchvision cannot be imported ({error}): pip install 'inductor-x86q[models]'"
        ) from error
    try:
        constructor = torchvision.models.get_model_builder(name)
    except ValueError as error:
        raise QuantizationError(f"torchvision has no network {name!r}: see torchvision.models.list_models()") from error
    entry = ZOO.get(name, Entry(name, 224))
    torch.manual_seed(seed)
    keywords: dict[str, Any] = {"weights": None}
    if constructor.__module__.startswith("torchvision.models.segmentation"):
        keywords["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        keywords.update(init_weights=False, aux_logits=False)
    with _quiet():
        model = constructor(**keywords)
    if "weights_backbone" in keywords:
        model = _Segmentation(model)
    make_realistic(model, entry.example(4, calibrate_at))
    return model


class _Segmentation(torch.nn.Module):
    """Only the segmentation map of a network that returns a dictionary."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)["out"]


def make_realistic(model: torch.nn.Module, batch: torch.Tensor) -> torch.nn.Module:
    """Gives batch-norms the statistics of `batch`, damps residual branches, fills zeroed heads; returns it in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average of what is seen
    for block in model.modules():
        last = _last_norm_of_residual_branch(block)
        if last is not None and last.weight is not None:
            torch.nn.init.constant_(last.weight, 0.25)
    for linear in model.modules():
        if isinstance(linear, torch.nn.Linear) and not linear.weight.count_nonzero():
            torch.nn.init.normal_(linear.weight, std=0.02)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or "StochasticDepth" in type(module).__name__:
            module.eval()
    if norms:
        with torch.no_grad():
            model(batch)
    return model.eval()


def _last_norm_of_residual_branch(block: torch.nn.Module) -> Any:
    for name in ("bn3", "bn2"):
        if hasattr(block, name) and hasattr(block, "downsample"):
            return getattr(block, name)
    if getattr(block, "use_res_connect", False):
        inner = [m for m in block.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        return inner[-1] if inner else None
    return None


@contextlib.contextmanager
def _quiet() -> Any:
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def rounding_floor(quantized: Any, inputs: tuple[Any, ...], *, share: float = 1e-5, seed: int = 0) -> float:
    """How sensitive a q/dq graph is to roundings that fall the other way, as a signal-to-noise ratio in dB.

    Runs the graph with one in `1 / share` of all quantized activations moved by a step (of each large tensor at least
    one element), and compares with the graph as it is. Two correct implementations that add in another order differ by
    as much: a fused graph cannot be asked to come closer to its reference than this.
    """
    from inductor_x86q.graph import qdq
    from inductor_x86q.testing import snr

    generator = torch.Generator().manual_seed(seed)

    class Moving(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if not qdq.is_quantize(node) or qdq.is_constant(node):
                return value
            parameters = qdq.qparams(node)
            hit = torch.rand(value.shape, generator=generator) < share
            if hit.numel() >= 4096:
                hit.view(-1)[torch.randint(hit.numel(), (1,), generator=generator)] = True
            step = torch.where(torch.rand(value.shape, generator=generator) < 0.5, -1, 1)
            shifted = (value.to(torch.int16) + step).clamp(parameters.quant_min, parameters.quant_max).to(value.dtype)
            return torch.where(hit, shifted, value)

    with torch.no_grad():
        return snr(Moving(quantized).run(*inputs), quantized(*inputs))
