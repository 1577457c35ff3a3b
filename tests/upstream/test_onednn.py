"""oneDNN's convolutions and linears, called as Inductor calls them. The same on torch 2.13.0, 2.14.1 and 2.15.0."""

from __future__ import annotations

import pytest
import torch

import inductor_x86q  # noqa: F401 - says so where this torch is too old
from inductor_x86q import cpu

onednn = torch.ops.onednn
on_avx512 = pytest.mark.skipif(not cpu.has("avx512_f"), reason="shows with AVX-512")


def integers(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0 if dtype == torch.uint8 else -127, 128, shape, dtype=dtype)


@on_avx512
@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_int8_column_with_a_stride() -> None:
    """qconv2d_pointwise gives wrong numbers for one input channel a group, a stride along rows and one column of outputs

    A quantized convolution of a group's single channel, whose rows give one output each, is wrong where its stride along
    the rows is not 1, though that stride moves nothing. Part of the outputs looks like memory that was never written:
    other numbers in each process. Right with ONEDNN_MAX_CPU_ISA=AVX2, wrong with AVX512_CORE and all above.
    Expected: what torch.conv2d gives for the same integers, exactly. Seen: differences of 60,000 and more.
    """
    x, weight = integers(2, 1, 9, 5), integers(17, 1, 5, 5, dtype=torch.int8)
    geometry = ([1, 3], [0, 1], [1, 1], 1)  # stride, padding, dilation, groups
    scales, zeros = torch.ones(17), torch.zeros(17, dtype=torch.int32)
    packed = onednn.qconv_prepack(weight, scales, 1.0, 0, *geometry, [2, 1, 9, 5])
    result = onednn.qconv2d_pointwise(x, 1.0, 0, packed, scales, zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], "")  # fmt: skip
    torch.testing.assert_close(result, torch.conv2d(x.float(), weight.float(), None, *geometry))


@on_avx512
@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_float_column_with_a_stride() -> None:
    """mkldnn._convolution_pointwise of a packed float32 weight gives wrong numbers for one column of outputs and a stride

    The float32 form of the bug above, as Inductor calls it with freezing: the weight packed by
    mkldnn._reorder_convolution_weight. Some outputs are wrong by more than the result is large, or NaN. torch.conv2d, which
    packs nothing, is right; so is this with ONEDNN_MAX_CPU_ISA=AVX2.
    Expected: torch.conv2d to rounding.
    """
    x, weight = torch.randn(2, 1, 9, 5), torch.randn(17, 1, 5, 5)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [0, 1], [1, 3], [1, 1], 1, [2, 1, 9, 5])
    result = torch.ops.mkldnn._convolution_pointwise(x, packed, None, [0, 1], [1, 3], [1, 1], 1, "none", [], "")
    torch.testing.assert_close(result, torch.conv2d(x, weight, None, (1, 3), (0, 1)))


@pytest.mark.xfail(strict=True, raises=RuntimeError)
def test_convolution_sums_into_every_other_column() -> None:
    """qconv2d_pointwise.binary with "sum" refuses an accumulator that is a view, and Inductor gives it one

    Post-op "sum" raises "For post op sum, accum tensor must be contiguous" for columns 0, 2, 4, ... of an image. Neither the
    operator's fake kernel nor Inductor's lowering says so when compiling: the compiled model raises at its first call.
    Expected: the sum, or a refusal when compiling.
    """
    x, weight = integers(1, 16, 6, 6), integers(16, 16, 1, 1, dtype=torch.int8)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    scales, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    packed = onednn.qconv_prepack(weight, scales, 1.0, 0, *geometry, [1, 16, 6, 6])
    added = torch.zeros(1, 16, 6, 12).contiguous(memory_format=torch.channels_last)[..., ::2]
    result = onednn.qconv2d_pointwise.binary(
        x,
        1.0,
        0,
        packed,
        scales,
        zeros,
        added,
        None,
        *geometry,
        1.0,
        0,
        torch.float32,
        1.0,
        0,
        "sum",
        1.0,
        "none",
        [],
        "",
    )
    torch.testing.assert_close(result, torch.conv2d(x.float(), weight.float()))


@pytest.mark.xfail(strict=True, raises=AssertionError)
@pytest.mark.parametrize(
    "added",
    [torch.zeros(8, 96)[:, :48], torch.zeros(8, 96)[:, ::2], torch.zeros(48, 8).t()],
    ids=["half of each row", "every other column", "transposed"],
)
def test_linear_sums_into_a_view(added: torch.Tensor) -> None:
    """qlinear_pointwise.binary with "sum" writes past an accumulator's rows where they do not lie one after another

    The accumulator is taken for contiguous rows whatever its strides are: the result is wrong without an error, and what
    lies between the rows in memory is overwritten. With "add" in the place of "sum" the same call is right.
    Expected: the sum, or an error as qconv2d_pointwise.binary raises it.
    """
    x, weight = integers(8, 32), integers(48, 32, dtype=torch.int8)
    scales, zeros = torch.ones(48), torch.zeros(48, dtype=torch.int32)
    packed = onednn.qlinear_prepack(weight, [8, 32])
    result = onednn.qlinear_pointwise.binary(
        x, 1.0, 0, packed, scales, zeros, added, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
    )
    torch.testing.assert_close(result, x.float() @ weight.float().t())
