"""The generated C++ of two blocks, as text that is the same on every supported torch; and what reads that text."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter

import pytest
import torch
from torch import nn

from inductor_x86q import CompileError, cpp_code, testing
from inductor_x86q.inductor import caches, cpp_text
from inductor_x86q.testing import QConv2d, QLinear, quantize_dequantize


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = QConv2d(16, 16, 3, padding=1)
        self.conv2 = QConv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = quantize_dequantize(x, 0.02, 0)
        return torch.relu(self.conv2(quantize_dequantize(torch.relu(self.conv1(x)), 0.02, 0)) + self.conv1(x))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = QLinear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(quantize_dequantize(x)))


@pytest.fixture(scope="module")
def residual() -> str:
    inputs = (torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last),)
    return cpp_code(testing.qdq_graph(Residual(), inputs), inputs, options=testing.PINNED)


@pytest.fixture(scope="module")
def linear() -> str:
    inputs = (torch.randn(4, 32),)
    return cpp_code(testing.qdq_graph(Linear(), inputs), inputs, options=testing.PINNED)


def test_residual_block(residual: str) -> None:
    testing.assert_expected_cpp(
        residual,
        """\

kernel0(input0, buf0);
aoti_torch_cpu__qconv_pointwise_tensor(buf0, constant0, constant1, constant2, constant3, constant4, &temporary_reference(constant5.get()), {1, 1}, 2, {1, 1}, 2, {1, 1}, 2, 1, 1.0, 0, &cached_torch_dtype_float32, "none", {nullptr}, 1, &"", &buf1_handle);
auto buf2 = std::move(buf0); // reuse
kernel1(buf1, buf2);
aoti_torch_cpu__qconv2d_pointwise_binary_tensor(buf2, constant0, constant1, constant6, constant3, constant4, buf1, &temporary_reference(constant5.get()), {1, 1}, 2, {1, 1}, 2, {1, 1}, 2, 1, 1.0, 0, &cached_torch_dtype_float32, 1.0, 0, "sum", &1.0, &"relu", {nullptr}, 1, &"", &buf4_handle);
output_handles[0] = buf1.release();

kernel0:
    {
        for(int64_t x0=0; x0<1024; x0+=8)
        {
            {
                if(C10_LIKELY(x0 >= 0 && x0 < 1024))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + x0, 8);
                    auto tmp1 = static_cast<float>(50.0);
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp4 = tmp3.round();
                    auto tmp5 = static_cast<float>(0.0);
                    auto tmp6 = at::vec::Vectorized<float>(tmp5);
                    auto tmp7 = tmp4 + tmp6;
                    auto tmp8 = at::vec::maximum(tmp7, tmp6);
                    auto tmp9 = static_cast<float>(127.0);
                    auto tmp10 = at::vec::Vectorized<float>(tmp9);
                    auto tmp11 = at::vec::minimum(tmp8, tmp10);
                    auto tmp12 = at::vec::convert<uint8_t>(tmp11);
                    tmp12.store(out_ptr0 + x0, 8);
                }
            }
        }
    }

kernel1:
    {
        for(int64_t x0=0; x0<1024; x0+=8)
        {
            {
                if(C10_LIKELY(x0 >= 0 && x0 < 1024))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + x0, 8);
                    auto tmp1 = at::vec::clamp_min(tmp0, decltype(tmp0)(0));
                    auto tmp2 = static_cast<float>(50.0);
                    auto tmp3 = at::vec::Vectorized<float>(tmp2);
                    auto tmp4 = tmp1 * tmp3;
                    auto tmp5 = tmp4.round();
                    auto tmp6 = static_cast<float>(0.0);
                    auto tmp7 = at::vec::Vectorized<float>(tmp6);
                    auto tmp8 = tmp5 + tmp7;
                    auto tmp9 = at::vec::maximum(tmp8, tmp7);
                    auto tmp10 = static_cast<float>(127.0);
                    auto tmp11 = at::vec::Vectorized<float>(tmp10);
                    auto tmp12 = at::vec::minimum(tmp9, tmp11);
                    auto tmp13 = at::vec::convert<uint8_t>(tmp12);
                    tmp13.store(out_ptr0 + x0, 8);
                }
            }
        }
    }
""",
    )


def test_linear(linear: str) -> None:
    testing.assert_expected_cpp(
        linear,
        """\

kernel0(input0, buf0);
aoti_torch_cpu__qlinear_pointwise_tensor(buf0, constant0, constant1, constant2, constant3, constant4, &temporary_reference(constant5.get()), 1.0, 0, &cached_torch_dtype_float32, "relu", {nullptr}, 1, "", &buf1_handle);
output_handles[0] = buf1.release();

kernel0:
    {
        for(int64_t x0=0; x0<128; x0+=8)
        {
            {
                if(C10_LIKELY(x0 >= 0 && x0 < 128))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + x0, 8);
                    auto tmp1 = static_cast<float>(50.0);
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp4 = tmp3.round();
                    auto tmp5 = static_cast<float>(60.0);
                    auto tmp6 = at::vec::Vectorized<float>(tmp5);
                    auto tmp7 = tmp4 + tmp6;
                    auto tmp8 = static_cast<float>(0.0);
                    auto tmp9 = at::vec::Vectorized<float>(tmp8);
                    auto tmp10 = at::vec::maximum(tmp7, tmp9);
                    auto tmp11 = static_cast<float>(127.0);
                    auto tmp12 = at::vec::Vectorized<float>(tmp11);
                    auto tmp13 = at::vec::minimum(tmp10, tmp12);
                    auto tmp14 = at::vec::convert<uint8_t>(tmp13);
                    tmp14.store(out_ptr0 + x0, 8);
                }
            }
        }
    }
""",
    )


class Between(nn.Module):
    """A product of int8 images between layers, and a quotient of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = QConv2d(16, 16, 1)

    def forward(self, x: torch.Tensor, bytes_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = quantize_dequantize(self.conv(quantize_dequantize(x)))
        return self.conv(quantize_dequantize(y * torch.sigmoid(y))), bytes_ // bytes_.flip(0)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="it is code for AVX2")
def test_eight_bytes_are_one_load() -> None:
    """And nothing is divided by what lies beside them."""
    inputs = (torch.randn(1, 16, 5, 5), torch.randint(1, 255, (44,), dtype=torch.uint8))
    compiled = testing.assert_close_to_reference(testing.qdq_graph(Between(), inputs), inputs, step=0.02)
    assert "_mm_loadl_epi64" in compiled.code
    assert not re.search(r"Vectorized<u?int8_t>::loadu\([^;]*, static_cast<int64_t>\(8\)\)", compiled.code)


def test_kernel_calls_counts_operators_and_generated_kernels(linear: str) -> None:
    (kernel,) = [name for name in testing.kernel_calls(linear) if name.startswith("cpp_")]
    assert testing.kernel_calls(linear) == Counter({"qlinear": 1, kernel: 1})
    assert testing.int8_calls(linear) == {"qlinear": 1}
    assert testing.float_calls(linear) == {}


def test_each_call_says_which_layer_it_serves(residual: str) -> None:
    lines = residual.splitlines()
    served = [before.strip() for before, line in itertools.pairwise(lines) if "aoti_torch_cpu__qconv" in line]
    assert sorted(served) == ["// layer: conv1", "// layer: conv2"]


def test_one_layer(residual: str) -> None:
    text = cpp_text.only_layer(residual, "conv2")
    assert text.count("aoti_torch_cpu__qconv") == 1
    assert "// layer: conv1" not in text


def test_unknown_layer_is_named_with_those_there_are() -> None:
    inputs = (torch.randn(4, 32),)
    with pytest.raises(CompileError, match=r"'fc2'; those that are served: .*fc"):
        cpp_code(testing.qdq_graph(Linear(), inputs), inputs, layer="fc2")


def test_a_single_layers_generated_kernel_comes_with_its_body() -> None:
    code = cpp_text.annotate(
        "void inductor_entry_impl(\n    cpp_fused_relu_0((const float*)(a.data_ptr()), (float*)(b.data_ptr()));\n"
        '} // inductor_entry_impl\nextern "C"  void  cpp_fused_relu_0(const float* x,\n float* y)\n{\n    body();\n}\n',
        {"a": ["before"], "b": ["act"]},
    )
    assert "// layer: act" in code
    assert "before" not in code
    assert "body();" in cpp_text.only_layer(code, "act")


def test_stable_drops_names_addresses_and_versions() -> None:
    def code(constant: str, array: str, blank: str) -> str:
        return (
            f"// {constant} device(type='cpu') torch.float32 (16,) (1,) 7efecfba0500\nvoid inductor_entry_impl(\n"
            "    auto inputs = steal(input_handles, 2);\n    auto arg0_1 = std::move(inputs[0]);\n"
            f"    [[maybe_unused]] auto {constant} = std::move(inputs[1]);\n"
            f"    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__qlinear_pointwise_tensor(arg0_1, {constant},{blank}{array}));\n"
            f"}} // inductor_entry_impl\nconstants_tensor = [{constant}]\n"
        )

    one = code("_frozen_param3", "std::array<int64_t, 2>{1L, 1L}.cbegin()", " ")
    two = code("fc_scale", "static_cast<const int64_t*>(std::array<int64_t, 2>{1L, 1L}.data())", "  ")
    assert (
        testing.stable(one)
        == testing.stable(two)
        == "aoti_torch_cpu__qlinear_pointwise_tensor(input0, constant0, {1, 1});\n"
    )


def test_assert_fused_says_what_differs_and_what_was_missed() -> None:
    class Float(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(quantize_dequantize(x))

    inputs = (torch.randn(4, 32),)
    with pytest.raises(AssertionError, match=r"qlinear: 0, expected 1(.|\n)*fc \(linear\): its input is quantized"):
        testing.assert_fused(testing.qdq_graph(Float(), inputs), inputs, {"qlinear": 1})


def test_snr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert testing.snr(x, x) == float("inf")
    assert testing.snr(x + torch.tensor([0.0, 0.5]), x) == pytest.approx(20.0)
    assert testing.snr(x * float("nan"), x) == float("-inf")


def test_assert_same_allows_one_step_on_few_integers_only() -> None:
    reference = torch.zeros(1000, dtype=torch.uint8)
    few, many, far = reference.clone(), reference.clone(), reference.clone()
    few[:10], many[:11], far[0] = 1, 1, 2
    testing.assert_same(few, reference)
    with pytest.raises(AssertionError, match="11 of 1000 elements differ"):
        testing.assert_same(many, reference)
    with pytest.raises(AssertionError, match="more than one step"):
        testing.assert_same(far, reference)
    with pytest.raises(AssertionError, match="float rounding"):
        testing.assert_same(torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.0]))


def test_isolated_caches_leave_no_trace(isolated_caches: None, inductor_cache_directory: str) -> None:
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == inductor_cache_directory
    inputs = (torch.randn(4, 32),)
    q = testing.qdq_graph(Linear(), inputs)
    compiled = torch.compile(q, backend="inductor_x86q")
    torch._dynamo.utils.counters.clear()  # of the tests before
    with torch.no_grad():
        compiled(*inputs)
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == 0


def test_after_isolated_caches_the_environment_is_as_it_was() -> None:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with caches.isolated_caches("elsewhere"):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
