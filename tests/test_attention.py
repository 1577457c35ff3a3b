"""Attention in int8: its kernel's numbers, what becomes of scaled_dot_product_attention, and when it stays float."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import QuantizationError, cpu, explain, inspection, testing
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.kernels import attention as kernels
from inductor_x86q.kernels.isa import ISAS
from inductor_x86q.passes.fuse import attention as fusing
from inductor_x86q.testing import quantize_dequantize

F = nn.functional
attention = torch.ops.inductor_x86q.attention
FLOAT_MASK = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention on operands of `bits` bits; its result stays float or is quantized."""

    queries: int
    keys: int
    width: int
    value_width: int
    heads: int = 2
    key_heads: int = 2
    batch: int = 1
    mask: str = ""
    is_causal: bool = False
    quantized: bool = True
    scale: float | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Query, key and value in the order in which a linear gives them, and the mask."""
        shapes = (
            (self.heads, self.queries, self.width),
            (self.key_heads, self.keys, self.width),
            (self.key_heads, self.keys, self.value_width),
        )
        found = [torch.randn(self.batch, rows, heads, width).transpose(1, 2) for heads, rows, width in shapes]
        full = (self.batch, 1, self.queries, self.keys)
        masks = {
            "boolean": lambda: torch.rand(self.batch, self.heads, *full[2:]) > 0.4,
            "keys": lambda: torch.rand(self.batch, 1, 1, self.keys) > 0.4,
            "two dimensions": lambda: torch.rand(*full[2:]) > 0.4,
            "added": lambda: torch.randn(full),
            "lowest": lambda: torch.where(torch.rand(full) > 0.4, 0.0, FLOAT_MASK),
            "one column": lambda: torch.randn(self.batch, 1, self.queries, 1),
        }
        return (*found, masks[self.mask]()) if self.mask else tuple(found)


CASES = (
    Case(32, 32, 32, 32),
    Case(32, 32, 32, 32, quantized=False),
    Case(1, 1, 8, 8, batch=2),
    Case(5, 7, 20, 12, heads=4, key_heads=1),
    Case(33, 65, 1, 3, heads=6, key_heads=2, is_causal=True),
    Case(70, 45, 33, 17, is_causal=True),
    Case(3, 130, 64, 40, scale=0.3),
    Case(40, 37, 16, 16, batch=2, mask="boolean"),
    Case(40, 37, 16, 16, batch=2, mask="keys", quantized=False),
    Case(17, 21, 16, 24, mask="two dimensions"),
    Case(40, 37, 16, 16, batch=2, mask="added"),
    Case(18, 50, 24, 16, batch=2, mask="lowest", quantized=False),
    Case(9, 12, 16, 16, mask="one column"),
)


class Cases(nn.Module):
    """All cases at once, so that one compile serves them."""

    def __init__(self, cases: tuple[Case, ...], bits: int, *, is_by_rows: bool = False) -> None:
        super().__init__()
        self.cases, self.top, self.is_by_rows = cases, 2**bits - 1, is_by_rows

    def forward(self, *operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        results = []
        for case, (query, key, value, *mask) in zip(self.cases, operands, strict=True):
            if self.is_by_rows:
                reals = [self.by_rows(query), self.by_rows(key), self.by_rows(value, is_value=True)]
            else:
                grid = {"scale": 6 / self.top, "zero_point": self.top // 2 + 3, "quant_max": self.top}
                reals = [quantize_dequantize(x, **grid) for x in (query, key, value)]
            result = attention(*reals, mask[0] if mask else None, case.is_causal, case.scale)
            results.append(quantize_dequantize(result, scale=0.02, zero_point=120) if case.quantized else result)
        return results

    def by_rows(self, x: torch.Tensor, is_value: bool = False) -> torch.Tensor:
        middle = (self.top + 1) // 2
        scales = (x.abs() / (self.top - middle)).amax(-1, keepdim=True).clamp(min=1e-7)
        if is_value:
            scales = scales.amax(-2, keepdim=True).expand_as(scales)
        grid = (scales, torch.full_like(scales, middle), 0, self.top, torch.uint8)
        decomposed = torch.ops.quantized_decomposed
        integers = decomposed.quantize_per_token(x, *grid)
        reals: torch.Tensor = decomposed.dequantize_per_token(integers, *grid, torch.float32)
        return reals


def usable(*names: str) -> list[Any]:
    missing = {name for name in names if not ISAS[name].cpu_flags <= cpu.usable_flags()}
    return [pytest.param(x, marks=pytest.mark.skipif(x in missing, reason=f"this CPU has no {x}")) for x in names]


@pytest.mark.parametrize("is_by_rows", [False, True])
@pytest.mark.parametrize("isa", usable("avx512_vnni", "avx2"))
def test_the_kernel_computes_what_the_operator_does(
    isa: str, is_by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = 8 if ISAS[isa].has_vnni else 7

    def choose(mask: Any, output_dtype: torch.dtype, largest: int, *, by_rows: bool) -> kernels.AttentionKernel:
        assert (largest, by_rows) == (2**bits - 1, is_by_rows)
        return kernels.AttentionKernel(isa, kernels.MASKS[mask], output_dtype, bits == 7, by_rows)

    monkeypatch.setattr(fusing, "choose", choose)
    operands = tuple(case.tensors() for case in CASES)
    model = Cases(CASES, bits, is_by_rows=is_by_rows)
    done = testing.compile_once(model, operands)
    assert testing.own_calls(done.code) == {"x86q.attention": len(CASES)}
    assert {fusion.operator for fusion in done.report.fused} == {"attention"}
    for case, actual, expected in zip(CASES, done.outputs, model(*operands), strict=True):
        assert testing.snr(actual, expected) > 40, case
        # A score's weight that is rounded the other way is a 255th of a value, as a row has several.
        assert (actual - expected).abs().max() < (0.021 if case.quantized else 0.01), case
        assert actual.transpose(1, 2).is_contiguous(), case


def test_without_bits_to_spare_products_are_exact_in_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.AttentionKernel("avx2", "none", torch.float32)
    monkeypatch.setattr(fusing, "choose", lambda *_, **__: kernel)
    case = Case(12, 40, 64, 16, quantized=False)
    operands, model = (tuple(2 * x for x in case.tensors()),), Cases((case,), 8)
    done = testing.compile_once(model, operands)
    assert testing.snr(done.outputs[0], model(*operands)[0]) > 60


def test_a_row_of_which_all_is_masked_gives_0() -> None:
    query = torch.randn(1, 1, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    model = Cases((dataclasses.replace(CASES[1], mask="boolean"),), 8)
    done = testing.compile_once(model, ((query, query, query, mask),))
    assert done.outputs[0][0, 0, 2].abs().max() == 0 and done.outputs[0].isfinite().all()


# --- quantize ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention between linears: [batch, tokens, 32] → the same."""

    def __init__(self, outlier: float = 0.0) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(32, 32) for _ in range(4))
        self.key.bias.data[0] += outlier

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads = [layer(x).view(batch, tokens, 4, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        result = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=2.0)
        return self.output(result.transpose(1, 2).reshape(batch, tokens, 32))


def test_attention_between_linears_is_one_kernel_and_nothing_is_copied() -> None:
    x = torch.randn(2, 20, 32)
    q = inductor_x86q.quantize(Block().eval(), (x,), calibration=[(x,)])
    done = testing.assert_close_to_reference(q, (x,), min_snr=45)
    assert testing.own_calls(done.code) == {"x86q.convolution": 4, "x86q.attention": 1}
    assert len([name for name in done.calls if name.startswith("cpp")]) == 1  # which quantizes the input
    (fusion,) = (fusion for fusion in done.report.fused if fusion.operator == "attention")
    assert (fusion.input_dtype, fusion.output_dtype, fusion.macs) == ("uint8", "uint8", 2 * 2 * 4 * 20 * 20 * 8)
    assert fusion.computed_by.startswith("x86q_attention_")
    assert not done.report.missed and not done.report.kept_float
    with pytest.raises(QuantizationError, match="attention is 'half'"):
        inductor_x86q.quantize(Block().eval(), (x,), calibration=[(x,)], attention="half")


def test_one_compile_serves_every_batch_and_length() -> None:
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    x, mask = torch.randn(3, 20, 32), torch.rand(3, 1, 20, 20) > 0.3
    shapes = (any_size, {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO})
    q = inductor_x86q.quantize(Block().eval(), (x, mask), calibration=[(x, mask)], dynamic_shapes=shapes)
    with torch._dynamo.config.patch(error_on_recompile=True, assume_static_by_default=False):
        done = testing.compile_once(q, (x, mask))
        assert testing.own_calls(done.code)["x86q.attention"] == 1
        for batch, tokens in ((2, 7), (4, 33), (5, 64), (2, 2)):
            x, mask = torch.randn(batch, tokens, 32), torch.rand(batch, 1, tokens, tokens) > 0.3
            assert testing.snr(done.run(x, mask), q(x, mask)) > 40, (batch, tokens)


def test_rows_whose_scales_lie_in_another_order() -> None:
    """torch fills zero points as such scales lie, and then exchanges their dimensions."""

    class Sliced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.transpose(0, 1)
            scales = x[..., :1].abs().clamp(0.01, 0.03)
            reals = []
            for each in (scales, scales, scales[:, :1].expand(-1, x.shape[1], 1)):
                grid = (each, torch.full_like(each, 128), 0, 255, torch.uint8)
                integers = torch.ops.quantized_decomposed.quantize_per_token(x, *grid)
                reals.append(torch.ops.quantized_decomposed.dequantize_per_token(integers, *grid, torch.float32))
            return attention(*reals, None, False, None)  # type: ignore[no-any-return]

    x = torch.randn(9, 3, 16)
    torch._dynamo.mark_dynamic(x, 1)
    done = testing.compile_once(Sliced(), (x,))
    assert testing.own_calls(done.code) == {"x86q.attention": 1} and not done.report.missed
    assert testing.snr(done.outputs, Sliced()(x)) > 40


@pytest.mark.parametrize("bits", [7, 8])
def test_attention_of_rows_with_scales_of_their_own(bits: int) -> None:
    x = torch.randn(2, 20, 32) * torch.rand(2, 20, 1)
    model = Block().eval()
    q = inductor_x86q.quantize(model, (x,), dynamic=True, reduce_range=bits == 7)
    done = testing.assert_close_to_reference(q, (x,), min_snr=60)
    assert testing.own_calls(done.code)["x86q.attention"] == 1 and not done.report.kept_float
    with torch.no_grad():
        assert testing.snr(q(x), model(x)) > (20 if bits == 7 else 26)
    asked = inductor_x86q.quantize(model, (x,), dynamic="per_token", attention="float")
    assert [miss.operator for miss in explain(asked, (x,)).kept_float] == ["attention"]


def test_attention_that_rows_of_int8_would_distort_stays_float_too() -> None:
    x = torch.randn(2, 20, 32)
    q = inductor_x86q.quantize(Block(outlier=1e4).eval(), (x,), dynamic="per_token")
    report = explain(q, (x,))
    assert [miss.operator for miss in report.kept_float] == ["attention"] and "stays float" in report.notes[0]


def test_attention_stays_float_where_it_is_asked_to() -> None:
    x = torch.randn(2, 20, 32)
    q = inductor_x86q.quantize(Block().eval(), (x,), calibration=[(x,)], attention="float")
    report = explain(q, (x,))
    assert len(report.fused) == 4
    (miss,) = report.kept_float
    assert (miss.operator, miss.reason) == ("attention", Reason.NOT_QUANTIZED)


def test_attention_that_int8_would_distort_stays_float_and_the_report_says_so() -> None:
    x = torch.randn(2, 20, 32)
    model = Block(outlier=100.0).eval()  # which changes nothing, as it is the same for all keys
    q = inductor_x86q.quantize(model, (x,), calibration=[(x,)])
    report = explain(q, (x,))
    assert len(report.fused) == 4 and [miss.operator for miss in report.kept_float] == ["attention"]
    (note,) = report.notes
    assert "stays float: int8 would leave" in note and "dB" in note
    # Nobody computes with bytes of query, key and value then: their linears give floats.
    assert [fusion.output_dtype for fusion in report.fused] == ["float32"] * 4
    forced = inductor_x86q.quantize(model, (x,), calibration=[(x,)], attention="int8")
    assert len(explain(forced, (x,)).fused) == 5


def test_attention_of_torch_between_quantized_operands_is_left_alone() -> None:
    """Its softmax is not rounded, and what the graph says is what is computed."""

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = quantize_dequantize(x)
            return F.scaled_dot_product_attention(x, x, x)

    (miss,) = explain(Plain(), (torch.randn(1, 2, 8, 16),)).kept_float
    assert miss.reason is Reason.NOT_QUANTIZED and "inductor_x86q.convert()" in str(miss)


def test_what_no_kernel_takes_is_computed_in_float_all_the_same() -> None:
    class Signed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = quantize_dequantize(x, dtype=torch.int8, zero_point=0, quant_min=-128, quant_max=127)
            return attention(x, x, x, None, False, None)

    x = torch.randn(1, 2, 8, 16)
    done = testing.assert_close_to_reference(Signed(), (x,), min_snr=60)
    (miss,) = done.report.missed
    assert miss.reason is Reason.ACTIVATION_TYPE


# --- other spellings --------------------------------------------------------------------------------------------------


class WrittenOut(Block):
    """As transformers' eager attention has it: products, a factor, a mask that is added, a softmax, a dropout."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, 4, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(query, key.transpose(2, 3)) / 8**0.5
        scores = scores if mask is None else scores + mask
        weights = F.dropout(
            F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), p=0.1, training=self.training
        )
        return self.output(torch.matmul(weights, value).transpose(1, 2).reshape(batch, tokens, 32))


class Windows(Block):
    """As shifted windows have it: four windows of an image are part of the batch, and each has a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 4, 5, 5))
        self.register_buffer("mask", torch.where(torch.rand(4, 5, 5) > 0.3, 0.0, -100.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.shape[0]
        x = x.view(images * 4, 5, 32)
        query, key, value = (layer(x).view(-1, 5, 4, 8).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = (query * 8**-0.5).matmul(key.transpose(-2, -1)) + self.bias
        scores = scores.view(images, 4, 4, 5, 5) + self.mask.unsqueeze(1).unsqueeze(0)
        weights = F.softmax(scores.view(-1, 4, 5, 5), dim=-1)
        return self.output(weights.matmul(value).transpose(1, 2).reshape(images, 20, 32))


class Multihead(nn.Module):
    def __init__(self, *, need_weights: bool, returned: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.need_weights, self.returned = need_weights, returned

    def forward(self, x: torch.Tensor) -> Any:
        found = self.attention(x, x, x, need_weights=self.need_weights)
        return found if self.returned else found[0]


MASKED = torch.where(torch.rand(2, 1, 20, 20) > 0.3, 0.0, FLOAT_MASK)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (WrittenOut(), (torch.randn(2, 20, 32),)),
        (WrittenOut(), (torch.randn(2, 20, 32), MASKED)),
        (Windows(), (torch.randn(3, 20, 32),)),
        (Multihead(need_weights=True), (torch.randn(2, 20, 32),)),
        (Multihead(need_weights=False), (torch.randn(2, 20, 32),)),
        (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (torch.randn(2, 20, 32),)),
    ],
    ids=["written out", "written out, masked", "windows", "multihead, weights", "multihead", "encoder layer"],
)
def test_attention_is_known_however_it_is_spelled(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    q = inductor_x86q.quantize(model.eval(), inputs, calibration=[inputs])
    report = explain(q, inputs, options={"strict": True})
    assert [fusion.operator for fusion in report.fused].count("attention") == 1
    assert not report.kept_float
    fused, _ = inspection.run_fused(q, inputs)
    assert testing.snr(fused, q(*inputs)) > 45
    assert testing.snr(q(*inputs), model(*inputs)) > 25


def test_where_somebody_looks_at_the_weights_attention_stays_as_it_is() -> None:
    inputs = (torch.randn(2, 20, 32),)
    q = inductor_x86q.quantize(Multihead(need_weights=True, returned=True).eval(), inputs, calibration=[inputs])
    assert "attention" not in {fusion.operator for fusion in explain(q, inputs).fused}


class OneQuery(nn.Module):
    """Scores of one query, of which a mask with a row for each of several makes as many."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.mask = nn.Linear(16, 16), nn.Parameter(torch.randn(5, 6))

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query, key = self.projection(query), self.projection(key)
        return (query @ key.transpose(-1, -2) / 4 + self.mask).softmax(-1) @ key


def test_a_mask_with_more_rows_than_queries_makes_no_attention() -> None:
    inputs = (torch.randn(2, 4, 1, 16), torch.randn(2, 4, 6, 16))
    q = inductor_x86q.quantize(OneQuery().eval(), inputs, calibration=[inputs])
    fused, report = inspection.run_fused(q, inputs)
    assert "attention" not in {fusion.operator for fusion in report.fused}
    testing.assert_same(fused, q(*inputs))


def test_drift_is_told_of_attention_too() -> None:
    x = torch.randn(2, 20, 32)
    model = Block(outlier=100.0).eval()
    q = inductor_x86q.quantize(model, (x,), calibration=[(x,)], attention="int8")
    drift = explain(q, (x,), drift=model).drift
    assert drift is not None
    ratios = {row.operator: row.here for row in drift.layers}
    assert ratios["attention"] is not None and ratios["attention"] < 20
    assert drift.layers[0].operator == "attention"
