"""Inductor's lowerings and decompositions of quantized_decomposed, in plain torch.compile without any backend of ours."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.guards import CheckFunctionManager
from torch._inductor.exc import InductorError

import inductor_x86q.graph.qdq  # noqa: F401 - registers quantized_decomposed

q = torch.ops.quantized_decomposed
X = torch.linspace(-20, 20, 64)


def assert_compiled_is_eager(function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = function(*inputs)
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(*inputs), expected)


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_range_of_a_quantize_with_tensors() -> None:
    """Inductor's lowering of quantized_decomposed.quantize_per_tensor.tensor forgets quant_min and quant_max

    Compiled, integers are clipped to what their type holds and not to the range that was asked for. The overload with
    numbers (.default) is right.
    Expected: -10 to 10, as eager mode gives; seen: -128 to 127.
    """
    scale, zero_point = torch.tensor([0.1]), torch.tensor([0])
    assert_compiled_is_eager(lambda x: q.quantize_per_tensor.tensor(x, scale, zero_point, -10, 10, torch.int8), X)


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_range_that_does_not_include_zero() -> None:
    """Inductor's decomposition of quantized_decomposed.choose_qparams.tensor forgets that the range has to include 0

    For an input whose numbers are all above 0 (or all below) the scale is made from the least and the largest number, where
    the operator itself widens that range to include 0, and the zero point is clipped: the least numbers are all lost.
    Expected: the scale of 0 to 40, as eager mode gives; seen: that of 21 to 40.
    """
    assert_compiled_is_eager(lambda x: q.choose_qparams.tensor(x.abs() + 21, 0, 255, 1e-5, torch.uint8), X)


@pytest.mark.xfail(strict=True, raises=(InductorError, AssertionError))
def test_quantize_of_float16() -> None:
    """Inductor has no lowering for quantized_decomposed.quantize_per_tensor of float16, which eager mode computes

    LoweringException: AssertionError: Expecting input to have dtype torch.float32, but got dtype: torch.float16. bfloat16
    is taken. Expected: as eager mode, which widens the input first.
    """
    assert_compiled_is_eager(lambda x: q.quantize_per_tensor.default(x, 0.1, 0, -128, 127, torch.int8), X.half())


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_frozen_weights_are_freed_with_the_model() -> None:
    """Inductor keeps the weights of every model that was compiled with freezing, for the life of the process

    A graph's constants are attributes of the Python module of its code, and that module stays in PyCodeCache.modules and in
    sys.modules when the compiled model is freed and Dynamo was reset: two linears of 2048 x 2048 in float32 are 32 MB more a
    round. `PyCodeCache.cache_clear()` empties the first list only.
    Expected: the packed weight is freed.
    """
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.compile(torch.nn.Linear(61, 67))(torch.randn(4, 61))
    torch._dynamo.reset()
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    assert not [tensor for tensor in tensors if tensor.shape in ((61, 67), (67, 61))]


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_a_package_is_unloaded_with_its_model(tmp_path: Path) -> None:
    """The library of an ahead-of-time package stays loaded, weights included, after the model that it was loaded for is freed

    The destructor calls dlclose, but g++ marks variables of inline functions in torch's headers as unique (STB_GNU_UNIQUE),
    and the loader never unloads what defines one. Each `aoti_load_package` of the same file adds a whole library.
    Expected: it is gone from the process. `-fno-gnu-unique` in the compiler's flags would do.
    """
    with torch.no_grad():
        exported = torch.export.export(torch.nn.Linear(8, 8), (torch.randn(4, 8),))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    before = libraries()
    model = torch._inductor.aoti_load_package(package)
    assert libraries() > before
    del model
    gc.collect()
    assert libraries() == before


def libraries() -> set[str]:
    """Addresses and names of the libraries in this process."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]
    return {f"{part[0].split('-')[0]} {part[5]}" for part in maps if part[2] == "00000000"}


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_compiling_a_model_again_leaves_nothing() -> None:
    """What Dynamo makes of guards stays for each compile of a model whose parameters live on, with the global freezing flag

    `id_ref` in torch/_dynamo/guards.py hands each parameter a finalizer that holds all of them, and with them the sizes and
    cached operators of that compile: 0.4 MB for a convolution and two linears with an open batch, as often as these are
    compiled. `torch._dynamo.reset()` frees nothing of it; it is freed with the parameters.
    Expected: a compile that was freed leaves none.
    """
    model, found = torch.nn.Linear(8, 8), []
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for _ in range(2):
            torch.compile(fx.symbolic_trace(model), backend="eager")(torch.randn(4, 8))
            gc.collect()
            found.append(sum(type(o) is CheckFunctionManager for o in gc.get_objects()))
    assert found[0] == found[1]
