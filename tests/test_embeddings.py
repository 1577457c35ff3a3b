"""Embedding tables in int8: what is looked up, what the compiled code holds, what stays float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, inspection, testing
from inductor_x86q.errors import QuantizationError

ROWS, WIDTH = 20_000, 64


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH, padding_idx=0)
        self.bags = nn.EmbeddingBag(40, WIDTH, mode="mean")
        self.weighted = nn.EmbeddingBag(40, WIDTH, mode="sum")
        self.padded = nn.EmbeddingBag(40, WIDTH, padding_idx=1)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor, few: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        bags = self.bags(few) + self.bags(few.flatten(), offsets) + self.weighted(few, per_sample_weights=weights)
        return self.head(self.words(x).mean(1) + bags + self.padded(few))


def tables() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    few = torch.randint(40, (3, 4))
    return Tables().eval(), (torch.randint(ROWS, (3, 5)), few, torch.tensor([0, 2, 9]), torch.rand(3, 4))


def test_rows_are_looked_up_in_int8_and_dequantized_then() -> None:
    model, given = tables()
    q = inductor_x86q.quantize(model, given, dynamic=True, embeddings="int8")
    stored = q.state_dict()
    assert {
        name: stored[name].dtype for name in stored if name.startswith(("words", "bags", "weighted", "padded"))
    } == {
        **dict.fromkeys(("words.weight_int8", "bags.weight_int8", "weighted.weight_int8"), torch.int8),
        **dict.fromkeys(("words.weight_scale", "bags.weight_scale", "weighted.weight_scale"), torch.float32),
        "padded.weight": torch.float32,  # rows that are left out are not known once rows are looked up
    }
    with torch.no_grad():
        fused, report = inspection.run_fused(q, given)
        assert testing.snr(fused, q(*given)) > 60
        assert testing.snr(q(*given), model(*given)) > 35
    rows = [fusion for fusion in report.fused if fusion.operator == "embedding"]
    assert sorted(fusion.layer for fusion in rows) == ["bags", "bags", "weighted", "words"]
    assert {fusion.weight_dtype for fusion in rows} == {"int8"}


def test_what_is_excluded_stays_float() -> None:
    model, given = tables()
    q = inductor_x86q.quantize(model, given, dynamic=True, embeddings="int8", exclude=["words"])
    assert q.state_dict()["words.weight"].dtype == torch.float32
    q = inductor_x86q.quantize(model, given, dynamic=True)
    assert "bags.weight" in q.state_dict()
    with pytest.raises(QuantizationError, match="embeddings"):
        inductor_x86q.quantize(model, given, dynamic=True, embeddings="int4")


def test_a_table_that_is_written_into_stays_float() -> None:
    """`max_norm` scales the rows of the float table down when they are looked up."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(40, WIDTH, max_norm=1.0), nn.Linear(WIDTH, 8)).eval(), torch.arange(12)
    q = inductor_x86q.quantize(model, (ids,), dynamic=True, embeddings="int8")
    assert q.state_dict()["0.weight"].dtype == torch.float32
    with torch.no_grad():
        assert testing.snr(q(ids), model(ids)) > 35


@pytest.mark.skipif(not cpu.int8_lanes(), reason="this CPU has no AVX2")
def test_a_package_holds_a_table_of_bytes(tmp_path: Path) -> None:
    """Nothing else of the model need be quantized."""
    model, ids = nn.Embedding(ROWS, WIDTH).eval(), torch.randint(ROWS, (3, 5))
    q = inductor_x86q.quantize(model, (ids,), dynamic=True, embeddings="int8")
    path = inductor_x86q.package(q, (ids,), str(tmp_path / "model.pt2"))
    assert Path(path).stat().st_size < ROWS * WIDTH * 2  # of 4 in float
    loaded = torch._inductor.aoti_load_package(path)
    assert torch.equal(loaded(ids), q(ids))
